"""Tensors that are no weights <-> bits: biases, norms, buffers, one after the other in one code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from atmc.pack.arithmetic import DECODE, ENCODE
from atmc.pack.coder_run import Stream
from atmc.pack.sortable_floats import cleaned, from_ordered, is_half, ordered, room_for
from atmc.pack.weight_coder import MODELLED, CodingError

MAX_ROLES = 256  # roles with statistics of their own; further ones share
FLAG_SCALE, SMALL_SCALE = 0, 2  # how strongly contexts of zero flags, and of values, are held to their prior


def write_small(tensors: Sequence[tuple[str, np.ndarray]]) -> tuple[bytes, list[float]]:
    """Biases, norms and whatever else is no weight, one after the other; and the bits that each takes.

    Args:
        tensors: (role, values): tensors of one role share statistics, and so do roles after MAX_ROLES. float32
            values are stored in float16 where that is exact, a single value once, zeros as flags; other types as they
            are.

    Raises:
        ValueError: nan or infinity.
    """
    flat = [(role, cleaned(values) if values.dtype == np.float32 else values.reshape(-1)) for role, values in tensors]
    for role, values in flat:
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(f"expected finite values, got nan or infinity in {role}")
    room = 2 * sum(values.nbytes for _, values in flat) + 64 + 4 * len(flat)
    stream = Stream(ENCODE, room=room, work=sum(8 * values.nbytes for _, values in flat))
    lengths: list[float] = []
    models: dict[tuple[str, int], Any] = {}
    for role, values in flat:
        before = stream.spent
        _code_small(stream, models, role, values.dtype, values, len(values))
        lengths.append(stream.spent - before)
    return stream.finish(), lengths


def read_small(data: bytes, kinds: Sequence[tuple[str, np.dtype[Any], int]]) -> tuple[list[np.ndarray], list[float]]:
    """What `write_small` was given, from (role, number type, size) of each tensor; and the bits that each takes.

    Raises:
        CodingError: the bytes are no such encoding.
    """
    stream = Stream(DECODE, data=data, work=sum(8 * dtype.itemsize * size for _, dtype, size in kinds))
    found, lengths = [], []
    models: dict[tuple[str, int], Any] = {}
    for role, dtype, size in kinds:
        before = stream.spent
        if stream.over_read:
            raise CodingError("the code is cut off")
        values = _code_small(stream, models, role, dtype, np.zeros(0, dtype), size)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise CodingError("a value is not finite")
        found.append(values)
        lengths.append(stream.spent - before)
    if stream.over_read:
        raise CodingError("the code is cut off")
    return found, lengths


def _code_small(
    stream: Stream, models: dict[tuple[str, int], Any], role: str, dtype: np.dtype[Any], values: np.ndarray, size: int
) -> np.ndarray:
    """One tensor, written or read: the values given or found."""
    if dtype != np.float32:
        octets = values.astype(dtype.newbyteorder("<")).tobytes()
        read = bytearray()
        for i in range(size * dtype.itemsize):
            if stream.over_read:
                raise CodingError("the code is cut off")
            read.append(stream.number(8, octets[i] if octets else 0))
        found = np.frombuffer(read, dtype.newbyteorder("<")).astype(dtype)
        if dtype == np.bool_ and any(octet > 1 for octet in read):
            raise CodingError("a truth value is neither 0 nor 1")
        return found
    constant = bool(stream.number(1, bool(len(values)) and bool((values == values[0]).all())))
    half = bool(stream.number(1, is_half(values)))
    count = min(size, 1) if constant else size
    depth = 16 if half else 32
    held = np.ones(count, np.int64)
    if not constant and stream.number(1, not values.all()):
        flags = room_for((values != 0).astype(np.int64), count)
        held = stream.symbols(flags, 2, 1, 1, _shared(stream, models, role, 1))
    numbers = ordered(values[:count][held != 0] if len(values) else values, half)
    model = _shared(stream, models, role, depth)
    found = np.zeros(count, np.float32)
    numbers = stream.symbols(room_for(numbers, int(held.sum())), 1 << depth, depth, MODELLED, model)
    found[held != 0] = from_ordered(numbers, depth)
    return np.repeat(found, size) if constant and size else found


def _shared(stream: Stream, models: dict[tuple[str, int], Any], role: str, depth: int) -> Any:
    """The statistics so far of a role's zero flags (depth 1), float16 or float32 values."""
    key = (role, depth) if len(models) < MAX_ROLES or (role, depth) in models else ("", depth)
    if key not in models:
        models[key] = stream.model(1, FLAG_SCALE) if depth == 1 else stream.model(MODELLED, SMALL_SCALE)
    return models[key]
