"""Give a run the global state of torch that it needs, and restore the caller's at the end.

Torch keeps switches for a whole process or thread: inference mode, autocast, the default number type and device, the
precision of float32 products, random generators. A caller may have set any of them otherwise, and two runs in two
threads may set them at the same time. Of a switch of the process, the first context that is entered saves the
caller's value, and the last one that is left restores it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_Value = TypeVar("_Value")
_Restore = Callable[[], None]


@contextmanager
def prepared_torch(device: torch.device) -> Iterator[None]:
    """Prepare torch for a whole run: repeatable steps, gradients, float32, new tensors on the CPU, no autocast."""
    with ExitStack() as stack:
        stack.enter_context(deterministic(device))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", device.type} | ({"cuda"} if torch.cuda.is_available() else set()):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_DEFAULT_NUMBERS.held())
        yield


@contextmanager
def full_float32() -> Iterator[None]:
    """Forbid TF32 and bfloat16 for float32 matrix products and convolutions within the context, on every device.

    Both interfaces of torch are switched: the older one of two flags, and that of torch 2.9, in which each backend has
    its own precision. Reading the older one fails if a user has set the newer one to a value that it cannot express.
    """
    with _FULL_PRECISION.held():
        yield


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Make a training step on a CUDA device repeatable bit for bit, so that a resumed run can end in the same file.

    Within the context cuDNN chooses no algorithm by trial runs, torch uses deterministic algorithms (and warns of an
    operation that has none), and cuBLAS has a fixed workspace. For other devices nothing is changed.
    """
    if device.type != "cuda":
        yield
        return
    with _REPEATABLE.held():
        yield


@contextmanager
def seeded_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators, from which dropout draws, within the context; restore them at the end.

    The generators belong to the process: one thread at a time is within this context, and others wait for it.
    """
    with own_generators(device):
        torch.manual_seed(seed)
        yield


@contextmanager
def own_generators(device: torch.device) -> Iterator[None]:
    """Keep other threads of ours from torch's global generators within the context; restore these at the end."""
    with _GENERATORS, torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


_GENERATORS = threading.RLock()


class _Switch:
    """A state of the process that several threads may hold at the same time.

    Args:
        turn: sets the state and returns the function that restores the one before.
    """

    def __init__(self, turn: Callable[[], _Restore]) -> None:
        self._turn, self._lock, self._holders = turn, threading.Lock(), 0
        self._restore: _Restore = lambda: None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the state within the context."""
        with self._lock:
            if not self._holders:
                self._restore = self._turn()
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    self._restore()


def _use_full_precision() -> _Restore:
    backends = _backends()
    precisions = [backend.fp32_precision for backend in backends]
    products = _read_or_none(torch.get_float32_matmul_precision)
    convolutions = _read_or_none(lambda: torch.backends.cudnn.allow_tf32)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for backend in backends:
        backend.fp32_precision = "ieee"

    def restore() -> None:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            torch.backends.cudnn.allow_tf32 = convolutions
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision

    return restore


def _backends() -> list[Any]:
    """List the backends that have their own precision; none before torch 2.9."""
    names = (("cuda", "matmul"), ("cudnn", "conv"), ("cudnn", "rnn"), ("mkldnn", "matmul"), ("mkldnn", "conv"))
    backends = [getattr(getattr(torch.backends, library), kind, None) for library, kind in names]
    return [backend for backend in backends if hasattr(backend, "fp32_precision")]


def _read_or_none(read: Callable[[], _Value]) -> _Value | None:
    """Return ``read()``, or None if torch refuses to read the setting."""
    try:
        return read()
    except RuntimeError:
        return None


def _use_repeatable_steps() -> _Restore:
    cudnn, strict = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    flags, workspace = (cudnn.benchmark, cudnn.deterministic), os.environ.get(_CUBLAS)
    cudnn.benchmark, cudnn.deterministic = False, True
    torch.use_deterministic_algorithms(True, warn_only=warn_only or not strict)
    os.environ.setdefault(_CUBLAS, ":4096:8")

    def restore() -> None:
        cudnn.benchmark, cudnn.deterministic = flags
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
        if workspace is None:
            os.environ.pop(_CUBLAS, None)

    return restore


def _use_float32() -> _Restore:
    numbers = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    return lambda: torch.set_default_dtype(numbers)


_FULL_PRECISION = _Switch(_use_full_precision)
_REPEATABLE = _Switch(_use_repeatable_steps)
_DEFAULT_NUMBERS = _Switch(_use_float32)
