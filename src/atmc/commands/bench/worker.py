"""One engine of `atmc bench` in a process of its own: it loads the model, times calls and measures its memory.

Engines in one process would share thread pools and memory; a process that waits for its turn costs the others nothing.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from atmc import models
from atmc.deploy.engine import dense
from atmc.deploy.engine.engine import Engine
from atmc.deploy.export import onnx_export
from atmc.deploy.graph.graph import FloatArray, LogitsFunction
from atmc.models.factory import USER_CODE_ERRORS, first_line
from atmc.pack import artifact

WARM_UP_SECONDS, WARM_UP_CALLS = 0.1, 3  # calls before the timing stop after the first of both
TINY_SHAPE = (1, 8, 8)


@dataclass(frozen=True)
class ModelFiles:
    """Paths of the model in every form that an engine loads.

    Args:
        model: the model file.
        module: the pickled module.
        dense, int8, plain: ONNX models: simplified, simplified and quantized, and not simplified.
        input_shape: (c, h, w) of the images.
        factory: package.module:factory of a user's own class.
    """

    model: Path
    module: Path
    dense: Path
    int8: Path
    plain: Path
    input_shape: tuple[int, int, int]
    factory: str | None = None


Load = Callable[[ModelFiles, int], tuple[LogitsFunction, dict[str, Any]]]
PRECISIONS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}  # as OpenVINO calls them


@dataclass(frozen=True)
class EngineKind:
    """An engine that `atmc bench` can measure.

    Args:
        name: in the tables.
        precision: of its arithmetic; None if it is known only once the engine is loaded.
        packages: that it needs beyond the dependencies of atmc.
        form: the field of `ModelFiles` that it loads.
        load: (files, threads) -> the function to run, and what the engine says of itself.
    """

    name: str
    precision: str | None
    packages: tuple[str, ...]
    form: str
    load: Load


def _load_ours(files: ModelFiles, threads: int) -> tuple[LogitsFunction, dict[str, Any]]:
    factory = models.import_factory(files.factory) if files.factory else None
    engine = Engine(files.model, threads=threads, factory=factory, input_shape=files.input_shape)
    return engine, {"runs": engine.describe(), "macs": engine.graph.macs()}


def _torch_loader(channels_last: bool) -> Load:
    def load(files: ModelFiles, threads: int) -> tuple[LogitsFunction, dict[str, Any]]:
        factory = models.import_factory(files.factory) if files.factory else None
        if files.module.exists():
            model = torch.load(files.module, weights_only=False)  # the file was written by this program
        else:
            model = artifact.load(files.model, factory=factory)
        return dense.open_torch(model, threads, channels_last=channels_last), {}

    return load


def _onnxruntime_loader(form: str) -> Load:
    return lambda files, threads: (onnx_export.open_runtime(getattr(files, form).read_bytes(), threads), {})


def _openvino_loader(form: str, precision: str | None = None) -> Load:
    def load(files: ModelFiles, threads: int) -> tuple[LogitsFunction, dict[str, Any]]:
        return dense.open_openvino(getattr(files, form).read_bytes(), threads, precision=precision), {}

    return load


def _load_openvino_default(files: ModelFiles, threads: int) -> tuple[LogitsFunction, dict[str, Any]]:
    precision = dense.openvino_precision()
    return dense.open_openvino(files.dense.read_bytes(), threads), {"precision": PRECISIONS.get(precision, precision)}


OURS, PLAIN = "atmc", "plain"
_RUNTIME, _VINO = ("onnx", "onnxruntime"), ("onnx", "openvino")
KINDS = (
    EngineKind(OURS, "float32", (), "model", _load_ours),
    EngineKind("PyTorch", "float32", (), "module", _torch_loader(False)),
    EngineKind("PyTorch, channels_last", "float32", (), "module", _torch_loader(True)),
    EngineKind("ONNX Runtime", "float32", _RUNTIME, "dense", _onnxruntime_loader("dense")),
    EngineKind("OpenVINO", "float32", _VINO, "dense", _openvino_loader("dense", "f32")),
    EngineKind("OpenVINO, its default", None, _VINO, "dense", _load_openvino_default),
    EngineKind("ONNX Runtime, unsimplified", "float32", _RUNTIME, PLAIN, _onnxruntime_loader(PLAIN)),
    EngineKind("OpenVINO, unsimplified", "float32", _VINO, PLAIN, _openvino_loader(PLAIN, "f32")),
    EngineKind("ONNX Runtime int8", "int8", _RUNTIME, "int8", _onnxruntime_loader("int8")),
    EngineKind("OpenVINO int8", "int8", (*_VINO, "onnxruntime"), "int8", _openvino_loader("int8")),
)


def serve(pipe: Connection, name: str, files: ModelFiles, tiny_files: ModelFiles) -> None:
    """Answer calls (method of `Worker`, arguments) with (True, result) or (False, why there is none) until the end.

    An error outside `USER_CODE_ERRORS` ends the process; the report then says that the process ended.
    """
    worker = None
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            worker = worker or Worker(name, files, tiny_files)
            pipe.send((True, getattr(worker, method)(*arguments)))
        except USER_CODE_ERRORS as error:  # the report shows it in place of the engine's figures
            pipe.send((False, first_line(error)))


def build_tiny(num_classes: int = 64) -> nn.Module:
    """Build a network for images of `TINY_SHAPE` with many zeros and few values, whose file uses the whole decoder."""
    c, h, w = TINY_SHAPE
    layers = nn.Conv2d(c, 8, 3, padding=1), nn.Linear(8 * h * w, num_classes)
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_((3 * layer.weight / layer.weight.abs().max()).round() / 4)
    return nn.Sequential(layers[0], nn.ReLU(), nn.Flatten(), layers[1]).eval()


class Worker:
    """An engine; `load` is to be called first.

    It has run a tiny network, so that the memory of its packages is known and can be subtracted.
    """

    def __init__(self, name: str, files: ModelFiles, tiny_files: ModelFiles) -> None:
        self._kind, self._files = next(kind for kind in KINDS if kind.name == name), files
        self._run, _ = self._kind.load(tiny_files, 1)
        self._run(np.zeros((1, *TINY_SHAPE), np.float32))
        self._forget()
        self._package_bytes = read_memory("VmRSS") if reset_peak() else None

    def load(self, threads: int) -> dict[str, Any]:
        """Load the model in place of the one before; return what the engine says of itself, and its peak memory."""
        self._forget()
        reset_peak()
        self._run, figures = self._kind.load(self._files, threads)
        peak = self._without_packages(read_memory("VmHWM"))
        release_memory()
        return {"precision": self._kind.precision} | figures | {"load_bytes": peak}

    def _forget(self) -> None:
        self._run = lambda images: images
        release_memory()

    def warm_up(self, images: FloatArray) -> dict[str, Any]:
        """Run images (n, c, h, w) a few times; return the seconds per call and the peak memory in bytes."""
        reset_peak()
        times: list[float] = []
        while len(times) < 2 or (len(times) < WARM_UP_CALLS and sum(times) < WARM_UP_SECONDS):
            times += self.time(images, 1)
        return {"seconds": times[-1], "run_bytes": self._without_packages(read_memory("VmHWM"))}

    def time(self, images: FloatArray, calls: int) -> list[float]:
        """Return the seconds of each of a number of calls."""
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            self._run(images)
            times.append(time.perf_counter() - start)
        return times

    def logits(self, images: FloatArray, batch: int) -> FloatArray:
        """Return the logits (n, classes), computed in batches."""
        return np.concatenate([self._run(images[at : at + batch]) for at in range(0, len(images), batch)])

    def _without_packages(self, size: int | None) -> int | None:
        return None if size is None or self._package_bytes is None else max(0, size - self._package_bytes)


def read_memory(field: str) -> int | None:
    """Return a size of this process in bytes: VmRSS, its memory now, or VmHWM, its peak; None without /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def reset_peak() -> bool:
    """Set the peak VmHWM to the memory now, and return whether that is possible, as on Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def release_memory() -> None:
    """Give free memory back to the system if the C library can."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return
