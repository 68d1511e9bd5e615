"""One engine of `atmc bench` in a process of its own: loads the model, times calls, weighs its memory.

Engines that shared a process would share thread pools and memory; here one that waits costs the others nothing.
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

WARM_SECONDS, WARM_CALLS = 0.1, 3
TINY_SHAPE = (1, 8, 8)


@dataclass(frozen=True)
class Files:
    """Where the model lies: our file, a pickled module, and ONNX: simplified, in int8, and as the module is.

    factory: of a user's own class.
    """

    model: Path
    module: Path
    dense: Path
    int8: Path
    plain: Path
    input_shape: tuple[int, int, int]
    factory: str | None = None


Load = Callable[[Files, int], tuple[LogitsFunction, dict[str, Any]]]
PRECISIONS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}  # as OpenVINO calls them


@dataclass(frozen=True)
class Kind:
    """An engine.

    Args:
        precision: of its arithmetic; None where the engine says.
        packages: beyond the package's own dependencies, that it needs.
        form: the field of `Files` that it loads.
        load: (files, threads) -> the function to run, and what the engine says of itself.
    """

    name: str
    precision: str | None
    packages: tuple[str, ...]
    form: str
    load: Load


def _ours(files: Files, threads: int) -> tuple[LogitsFunction, dict[str, Any]]:
    factory = models.import_factory(files.factory) if files.factory else None
    engine = Engine(files.model, threads=threads, factory=factory, input_shape=files.input_shape)
    return engine, {"runs": engine.describe(), "macs": engine.graph.macs()}


def _torch(channels_last: bool) -> Load:
    def load(files: Files, threads: int) -> tuple[LogitsFunction, dict[str, Any]]:
        factory = models.import_factory(files.factory) if files.factory else None
        if files.module.exists():
            model = torch.load(files.module, weights_only=False)  # which this program has just written
        else:
            model = artifact.load(files.model, factory=factory)
        return dense.open_torch(model, threads, channels_last=channels_last), {}

    return load


def _onnxruntime(form: str) -> Load:
    return lambda files, threads: (onnx_export.open_runtime(getattr(files, form).read_bytes(), threads), {})


def _openvino(form: str, precision: str | None = None) -> Load:
    def load(files: Files, threads: int) -> tuple[LogitsFunction, dict[str, Any]]:
        return dense.open_openvino(getattr(files, form).read_bytes(), threads, precision=precision), {}

    return load


def _openvino_default(files: Files, threads: int) -> tuple[LogitsFunction, dict[str, Any]]:
    precision = dense.openvino_precision()
    return dense.open_openvino(files.dense.read_bytes(), threads), {"precision": PRECISIONS.get(precision, precision)}


OURS, PLAIN = "atmc", "plain"
_RUNTIME, _VINO = ("onnx", "onnxruntime"), ("onnx", "openvino")
KINDS = (
    Kind(OURS, "float32", (), "model", _ours),
    Kind("PyTorch", "float32", (), "module", _torch(False)),
    Kind("PyTorch, channels_last", "float32", (), "module", _torch(True)),
    Kind("ONNX Runtime", "float32", _RUNTIME, "dense", _onnxruntime("dense")),
    Kind("OpenVINO", "float32", _VINO, "dense", _openvino("dense", "f32")),
    Kind("OpenVINO, its default", None, _VINO, "dense", _openvino_default),
    Kind("ONNX Runtime, unsimplified", "float32", _RUNTIME, PLAIN, _onnxruntime(PLAIN)),
    Kind("OpenVINO, unsimplified", "float32", _VINO, PLAIN, _openvino(PLAIN, "f32")),
    Kind("ONNX Runtime int8", "int8", _RUNTIME, "int8", _onnxruntime("int8")),
    Kind("OpenVINO int8", "int8", (*_VINO, "onnxruntime"), "int8", _openvino("int8")),
)


def work(pipe: Connection, name: str, files: Files, smallest: Files) -> None:
    """Answer (method of `Worker`, arguments) with (True, what it returns) or (False, why not), until the pipe ends.

    An error of any other class ends this process, which is what the report says then.
    """
    worker = None
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            worker = worker or Worker(name, files, smallest)
            pipe.send((True, getattr(worker, method)(*arguments)))
        except USER_CODE_ERRORS as error:  # it stands in the report in place of the engine's figures
            pipe.send((False, first_line(error)))


def tiny(num_classes: int = 64) -> nn.Module:
    """A network for images of `TINY_SHAPE` with many zeros and few values, so that its file needs the whole decoder."""
    c, h, w = TINY_SHAPE
    layers = nn.Conv2d(c, 8, 3, padding=1), nn.Linear(8 * h * w, num_classes)
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_((3 * layer.weight / layer.weight.abs().max()).round() / 4)
    return nn.Sequential(layers[0], nn.ReLU(), nn.Flatten(), layers[1]).eval()


class Worker:
    """An engine that has run a tiny network, so that what its packages take is known; `load` comes first."""

    def __init__(self, name: str, files: Files, smallest: Files) -> None:
        self._kind, self._files = next(kind for kind in KINDS if kind.name == name), files
        self._run, _ = self._kind.load(smallest, 1)
        self._run(np.zeros((1, *TINY_SHAPE), np.float32))
        self._forget()
        self._baseline = memory("VmRSS") if reset_peak() else None

    def load(self, threads: int) -> dict[str, Any]:
        """Load the model, in place of the one before; what the engine says, and bytes of memory at the peak."""
        self._forget()
        reset_peak()
        self._run, about = self._kind.load(self._files, threads)
        peak = self._above(memory("VmHWM"))
        trim()
        return {"precision": self._kind.precision} | about | {"load_bytes": peak}

    def _forget(self) -> None:
        self._run = lambda images: images
        trim()

    def warm(self, images: FloatArray) -> dict[str, Any]:
        """Run images (n, c, h, w) a few times: seconds a call takes, and bytes of memory at the peak of these calls."""
        reset_peak()
        times: list[float] = []
        while len(times) < 2 or (len(times) < WARM_CALLS and sum(times) < WARM_SECONDS):
            times += self.time(images, 1)
        return {"seconds": times[-1], "run_bytes": self._above(memory("VmHWM"))}

    def time(self, images: FloatArray, calls: int) -> list[float]:
        """Seconds of each of some calls."""
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            self._run(images)
            times.append(time.perf_counter() - start)
        return times

    def logits(self, images: FloatArray, batch: int) -> FloatArray:
        """(n, classes), in batches."""
        return np.concatenate([self._run(images[at : at + batch]) for at in range(0, len(images), batch)])

    def _above(self, found: int | None) -> int | None:
        return None if found is None or self._baseline is None else max(0, found - self._baseline)


def memory(what: str) -> int | None:
    """VmRSS, the memory that this process holds, or VmHWM, its peak, in bytes; None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{what}:")), None)


def reset_peak() -> bool:
    """Whether VmHWM is VmRSS now, as it can be on Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def trim() -> None:
    """Give memory that is free back to the system, as far as it can be."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return
