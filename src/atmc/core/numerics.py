"""How torch may compute, for a while: float32 in full, and the same bits again. The user's own settings come back.

Written for CUDA devices; no release has been run on one yet, only the switching itself is tested.
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
    """Within, no device shortens float32 factors to TF32 or bfloat16 in matrix products and convolutions.

    Both interfaces of torch are switched: the older one of two flags, and that of 2.9 where each backend has its own
    precision. Reading the older one fails where a user has set the newer one to something it cannot express.
    """
    backends = _backends()
    precisions = [backend.fp32_precision for backend in backends]
    products = _readable(torch.get_float32_matmul_precision)
    convolutions = _readable(lambda: torch.backends.cudnn.allow_tf32)
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
    """What has a precision of its own; nothing before torch 2.9."""
    places = (("cuda", "matmul"), ("cudnn", "conv"), ("cudnn", "rnn"), ("mkldnn", "matmul"), ("mkldnn", "conv"))
    found = [getattr(getattr(torch.backends, library), kind, None) for library, kind in places]
    return [backend for backend in found if hasattr(backend, "fp32_precision")]


def _readable(read: Callable[[], _Value]) -> _Value | None:
    try:
        return read()
    except RuntimeError:
        return None


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Within, on a CUDA device, the same step gives the same bits, so that a resumed run can end in the same file.

    No trial runs that choose an algorithm, deterministic algorithms where there are some (torch warns of an operation
    that has none), and cuBLAS with a fixed workspace. Nothing is changed for other devices.
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
