"""Compile functions with Numba, cached on disk if there is a folder that can be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Compiled = Callable[..., Any]


def compile_function(function: Compiled, signature: Any = None, **options: Any) -> Compiled:
    """Return a function compiled by Numba; one that was compiled before is read from a cache.

    In a read-only installation without a writable home there is no cache, and every process compiles the function.

    Args:
        signature: the types for which it is compiled now; None to compile it at its first call.
        options: of `numba.njit`.

    Raises:
        ImportError: Numba is not installed.
    """
    import numba

    njit: Any = numba.njit
    compiled: Compiled
    try:
        compiled = njit(signature, cache=True, **options)(function)
    except (RuntimeError, OSError):  # "no locator available", or a disk that is full
        compiled = njit(signature, cache=False, **options)(function)
    return compiled
