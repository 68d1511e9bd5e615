"""Switch torch's numerics within a context, to full float32 or to repeatable steps, and restore the user's settings.

Both matter on CUDA devices. The tests run on the CPU and cover only the switching; results/cifar10/README.md says what
was tried on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_Value = TypeVar("_Value")


@contextmanager
def full_float32() -> Iterator[None]:
    """Forbid TF32 and bfloat16 for float32 matrix products and convolutions within the context, on every device.

    Both interfaces of torch are switched: the older one of two flags, and that of torch 2.9, in which each backend has
    its own precision. Reading the older one fails if a user has set the newer one to a value that it cannot express.
    """
    backends = _backends()
    precisions = [backend.fp32_precision for backend in backends]
    products = _read_or_none(torch.get_float32_matmul_precision)
    convolutions = _read_or_none(lambda: torch.backends.cudnn.allow_tf32)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            torch.backends.cudnn.allow_tf32 = convolutions
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision


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


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Make a training step on a CUDA device repeatable bit for bit, so that a resumed run can end in the same file.

    Within the context cuDNN chooses no algorithm by trial runs, torch uses deterministic algorithms (and warns of an
    operation that has none), and cuBLAS has a fixed workspace. For other devices nothing is changed.
    """
    if device.type != "cuda":
        yield
        return
    cudnn, strict = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    flags, workspace = (cudnn.benchmark, cudnn.deterministic), os.environ.get(_CUBLAS)
    cudnn.benchmark, cudnn.deterministic = False, True
    torch.use_deterministic_algorithms(True, warn_only=warn_only or not strict)
    os.environ.setdefault(_CUBLAS, ":4096:8")
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = flags
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
        if workspace is None:
            os.environ.pop(_CUBLAS, None)
