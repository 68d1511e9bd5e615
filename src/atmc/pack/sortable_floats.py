"""Floats as integers in their order, which is how the coder takes them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


def room_for(numbers: Integers, count: int) -> Integers:
    """The numbers to write, or room for those to be read."""
    return numbers if len(numbers) else np.zeros(count, np.int64)


def is_half(values: Floats) -> bool:
    """Whether float16 holds every value."""
    with np.errstate(over="ignore"):
        return bool(np.array_equal(values.astype(np.float16).astype(np.float32), values))


def ordered(values: Floats, half: bool) -> Integers:
    """Integers in the order of the values: bit patterns with the negative ones turned round."""
    kind, top = (np.float16, 0x8000) if half else (np.float32, 0x80000000)
    pattern = values.astype(kind).view(np.uint16 if half else np.uint32).astype(np.int64)
    return np.where(pattern >= top, 2 * top - 1 - pattern, pattern + top)


def from_ordered(numbers: Integers, depth: int) -> Floats:
    """What `ordered` was given; depth is 16 or 32."""
    top = 1 << (depth - 1)
    pattern = np.where(numbers < top, 2 * top - 1 - numbers, numbers - top)
    if depth == 16:
        return pattern.astype(np.uint16).view(np.float16).astype(np.float32)
    return pattern.astype(np.uint32).view(np.float32)


def cleaned(values: np.ndarray) -> Floats:
    """Flat float32 without negative zeros. Raises ValueError where a value is not finite."""
    flat: Floats = np.ascontiguousarray(values, np.float32).reshape(-1) + np.float32(0)  # -0.0 becomes 0.0
    if not np.isfinite(flat).all():
        raise ValueError("expected finite values, got nan or infinity")
    return flat
