"""Convert floats to integers of the same order, the form in which the coder codes them, and back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32s = NDArray[np.float32]
Int64s = NDArray[np.int64]


def fits_float16(values: Float32s) -> bool:
    """Return whether float16 holds every value exactly."""
    with np.errstate(over="ignore"):
        return bool(np.array_equal(values.astype(np.float16).astype(np.float32), values))


def to_sortable(values: Float32s, half: bool) -> Int64s:
    """Return integers in the order of the values: the bit patterns, with those of negative values reversed.

    Args:
        half: take the bit patterns of float16 (16 bits), which must hold the values exactly; otherwise of float32.
    """
    kind, top = (np.float16, 0x8000) if half else (np.float32, 0x80000000)
    pattern = values.astype(kind).view(np.uint16 if half else np.uint32).astype(np.int64)
    return np.where(pattern >= top, 2 * top - 1 - pattern, pattern + top)


def from_sortable(numbers: Int64s, depth: int) -> Float32s:
    """Invert `to_sortable`; depth is the number of bits, 16 or 32."""
    top = 1 << (depth - 1)
    pattern = np.where(numbers < top, 2 * top - 1 - numbers, numbers - top)
    if depth == 16:
        return pattern.astype(np.uint16).view(np.float16).astype(np.float32)
    return pattern.astype(np.uint32).view(np.float32)


def flatten_finite(values: np.ndarray) -> Float32s:
    """Return the values as a flat float32 array in which negative zeros are zeros.

    Raises:
        ValueError: a value is nan or infinite.
    """
    flat: Float32s = np.ascontiguousarray(values, np.float32).reshape(-1) + np.float32(0)  # -0.0 becomes 0.0
    if not np.isfinite(flat).all():
        raise ValueError("expected finite values, got nan or infinity")
    return flat
