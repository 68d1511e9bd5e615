"""Dense engines as functions from images (n, c, h, w) to logits (n, classes), all numpy float32.

The sparse engine is compared with them, and `open_fastest` gives the one that replaces it if it would be slower.
onnxruntime and openvino are imported only if they are used.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from atmc.deploy.export import onnx_export
from atmc.deploy.graph.graph import FloatArray, Graph, LogitsFunction, run_graph

CALIBRATION_BATCH = 32


def open_fastest(graph: Graph, threads: int) -> tuple[str, LogitsFunction]:
    """Return the name of the fastest dense float32 engine among ONNX Runtime and PyTorch, and a function that runs it.

    It is ONNX Runtime if it is installed, else PyTorch. Raises ValueError if the graph is not consistent.
    """
    if all(find_spec(name) for name in ("onnx", "onnxruntime")):
        return "ONNX Runtime", onnx_export.open_runtime(onnx_export.to_bytes(graph), threads)
    return "PyTorch, channels_last", open_torch(lambda x: run_graph(graph, x), threads, channels_last=True)


def open_torch(
    model: nn.Module | Callable[[Tensor], Tensor], threads: int, *, channels_last: bool = False
) -> LogitsFunction:
    """Return a function that runs a module in evaluation mode, or a function of images, by PyTorch.

    Each call uses that number of threads and restores the number that the process had before.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if isinstance(model, nn.Module) and channels_last:
        model.to(memory_format=layout)  # type: ignore[call-overload]  # the stubs lack the overload for modules

    def run(images: FloatArray) -> FloatArray:
        with torch.inference_mode(), _torch_threads(threads):
            logits: FloatArray = model(torch.from_numpy(images).contiguous(memory_format=layout)).numpy()
            return logits

    return run


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if before != threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if before != threads:
            torch.set_num_threads(before)


def open_openvino(model: bytes, threads: int, *, precision: str | None = None) -> LogitsFunction:
    """Return a function that runs an ONNX model by OpenVINO.

    The model is compiled for each batch size when it first occurs; the one compiled last is kept.

    Args:
        model: the bytes of an ONNX model.
        precision: ``f32``; None for what OpenVINO chooses for the machine, bfloat16 if it is fast.
    """
    runtime = onnx_export.import_extra("openvino")
    core = runtime.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    settings |= {"INFERENCE_PRECISION_HINT": precision} if precision else {}

    @lru_cache(maxsize=1)
    def compile_for(batch: int) -> Any:
        network = core.read_model(model, b"")
        network.reshape({onnx_export.INPUT: [batch, *list(network.input(0).partial_shape)[1:]]})
        return core.compile_model(network, "CPU", settings).create_infer_request()

    def run(images: FloatArray) -> FloatArray:
        return np.array(compile_for(len(images)).infer([images], share_inputs=True)[0])

    return run


def openvino_precision() -> str:
    """Return the precision that OpenVINO chooses on this machine, ``bf16``, ``f16`` or ``f32``."""
    hint = onnx_export.import_extra("openvino").Core().get_property("CPU", "INFERENCE_PRECISION_HINT")
    return str(hint.get_type_name())


def quantize_int8(model: bytes, images: FloatArray) -> bytes:
    """Quantize an ONNX model by ONNX Runtime: weights of 8 bits per channel, activations of 8 bits per tensor.

    Args:
        model: the bytes of an ONNX model.
        images: (n, c, h, w), on which the ranges of activations are measured.
    """
    onnx_export.import_extra("onnxruntime")
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            self._parts = iter(np.array_split(images, -(-len(images) // CALIBRATION_BATCH)))

        def get_next(self) -> dict[str, FloatArray] | None:
            part = next(self._parts, None)
            return None if part is None else {onnx_export.INPUT: part}

    with tempfile.TemporaryDirectory() as folder, _without_advice():
        before, after = Path(folder, "model.onnx"), Path(folder, "int8.onnx")
        before.write_bytes(model)
        quantization.quantize_static(
            before,
            after,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return after.read_bytes()


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silence the advice that the quantizer logs; a model from `to_bytes` needs none of it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
