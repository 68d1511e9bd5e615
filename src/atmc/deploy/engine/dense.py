"""Dense engines as functions from images (n, c, h, w) to logits (n, classes), all numpy float32.

They are what the sparse engine is measured against, and `best_dense` is what runs in its place where it would not gain.
onnxruntime and openvino are imported only where they are asked for.
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
from atmc.deploy.graph.graph import Floats, Graph, evaluate

Runner = Callable[[Floats], Floats]
CALIBRATION_BATCH = 32


def best_dense(graph: Graph, threads: int) -> tuple[str, Runner]:
    """The name of the fastest dense engine of float32 that the package itself relies on, and a function that runs it.

    ONNX Runtime where it is installed, else PyTorch. Raises ValueError where the graph does not fit together.
    """
    if all(find_spec(name) for name in ("onnx", "onnxruntime")):
        return "ONNX Runtime", onnx_export.runner(onnx_export.to_bytes(graph), threads)
    return "PyTorch, channels_last", run_torch(lambda x: evaluate(graph, x), threads, channels_last=True)


def run_torch(model: nn.Module | Callable[[Tensor], Tensor], threads: int, *, channels_last: bool = False) -> Runner:
    """A module in evaluation mode, or a function of images, as it is. The process's own thread count comes back."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if isinstance(model, nn.Module) and channels_last:
        model.to(memory_format=layout)  # type: ignore[call-overload]  # it is a format, of any module

    def run(images: Floats) -> Floats:
        with torch.inference_mode(), _torch_threads(threads):
            logits: Floats = model(torch.from_numpy(images).contiguous(memory_format=layout)).numpy()
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


def run_openvino(model: bytes, threads: int, *, precision: str | None = None) -> Runner:
    """The bytes of an ONNX model with OpenVINO, compiled for each batch size as it comes; the last one is kept.

    Args:
        precision: ``f32``; None for what OpenVINO chooses for the machine, bfloat16 where it is fast.
    """
    runtime = onnx_export.installed("openvino")
    core = runtime.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    settings |= {"INFERENCE_PRECISION_HINT": precision} if precision else {}

    @lru_cache(maxsize=1)
    def request(batch: int) -> Any:
        network = core.read_model(model, b"")
        network.reshape({onnx_export.INPUT: [batch, *list(network.input(0).partial_shape)[1:]]})
        return core.compile_model(network, "CPU", settings).create_infer_request()

    def run(images: Floats) -> Floats:
        return np.array(request(len(images)).infer([images], share_inputs=True)[0])

    return run


def openvino_precision() -> str:
    """What OpenVINO computes in here if it is not told: ``bf16`` or ``f32``."""
    hint = onnx_export.installed("openvino").Core().get_property("CPU", "INFERENCE_PRECISION_HINT")
    return str(hint.get_type_name())


def quantized(model: bytes, images: Floats) -> bytes:
    """An ONNX model with weights of 8 bits a channel and activations of 8 bits a tensor, by ONNX Runtime.

    Args:
        images: (n, c, h, w) whose largest and smallest activations decide the scales.
    """
    onnx_export.installed("onnxruntime")
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            self._left = iter(np.array_split(images, -(-len(images) // CALIBRATION_BATCH)))

        def get_next(self) -> dict[str, Floats] | None:
            part = next(self._left, None)
            return None if part is None else {onnx_export.INPUT: part}

    with tempfile.TemporaryDirectory() as folder, _quiet():
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
def _quiet() -> Iterator[None]:
    """Without the advice that the quantizer logs; a model from `to_bytes` needs none of it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
