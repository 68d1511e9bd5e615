"""Code all tensors that are not weights (biases, norms, buffers), one after another, in one code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from atmc.pack.arithmetic import DECODE, ENCODE
from atmc.pack.coder_run import Stream
from atmc.pack.sortable_floats import fits_float16, flatten_finite, from_sortable, to_sortable
from atmc.pack.weight_coder import MODELLED, CodingError, given_or_zeros

# Part of the format:
MAX_SETS = 256  # sets of contexts of their own, one per role and kind of symbol; further ones share
FLAG_SCALE, VALUE_SCALE = 0, 2  # how strongly contexts of zero flags, and of values, are held to their prior

ContextSets = dict[tuple[str, int], Any]  # (role, depth of the symbols) -> contexts


def encode_other_tensors(tensors: Sequence[tuple[str, np.ndarray]]) -> tuple[bytes, list[float]]:
    """Return the encoding of the tensors, and the code length of each in bits.

    Args:
        tensors: (role, values). Tensors of one role share contexts, and so do roles beyond MAX_SETS. float32 values
            are stored in float16 if that is exact, a single value once, zeros as flags; other types as they are.

    Raises:
        ValueError: nan or infinity.
    """
    flat = [
        (role, flatten_finite(values) if values.dtype == np.float32 else values.reshape(-1)) for role, values in tensors
    ]
    for role, values in flat:
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(f"expected finite values, got nan or infinity in {role}")
    room = 2 * sum(values.nbytes for _, values in flat) + 64 + 4 * len(flat)
    stream = Stream(ENCODE, room=room, decisions=sum(8 * values.nbytes for _, values in flat))
    lengths: list[float] = []
    sets: ContextSets = {}
    for role, values in flat:
        before = stream.code_length
        _code_tensor(stream, sets, role, values.dtype, values, len(values))
        lengths.append(stream.code_length - before)
    return stream.finish(), lengths


def decode_other_tensors(
    data: bytes, kinds: Sequence[tuple[str, np.dtype[Any], int]]
) -> tuple[list[np.ndarray], list[float]]:
    """Invert `encode_other_tensors`, given (role, number type, size) of each tensor.

    Raises:
        CodingError: the bytes are no such encoding.
    """
    stream = Stream(DECODE, data=data, decisions=sum(8 * dtype.itemsize * size for _, dtype, size in kinds))
    arrays, lengths = [], []
    sets: ContextSets = {}
    for role, dtype, size in kinds:
        before = stream.code_length
        if stream.over_read:
            raise CodingError("the code is cut off")
        values = _code_tensor(stream, sets, role, dtype, np.zeros(0, dtype), size)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise CodingError("a value is not finite")
        arrays.append(values)
        lengths.append(stream.code_length - before)
    if stream.over_read:
        raise CodingError("the code is cut off")
    return arrays, lengths


def _code_tensor(
    stream: Stream, sets: ContextSets, role: str, dtype: np.dtype[Any], values: np.ndarray, size: int
) -> np.ndarray:
    """Write the values of one tensor, or read them if `values` is empty; return them."""
    if dtype != np.float32:
        return _code_bytes(stream, dtype, values, size)
    constant = bool(stream.code_number(1, bool(len(values)) and bool((values == values[0]).all())))
    half = bool(stream.code_number(1, fits_float16(values)))
    count = min(size, 1) if constant else size
    depth = 16 if half else 32
    flags = np.ones(count, np.int64)
    if not constant and stream.code_number(1, not values.all()):
        flags = given_or_zeros((values != 0).astype(np.int64), count)
        flags = stream.code_symbols(flags, 2, 1, 1, _shared_contexts(stream, sets, role, 1))
    symbols = to_sortable(values[:count][flags != 0] if len(values) else values, half)
    contexts = _shared_contexts(stream, sets, role, depth)
    coded = np.zeros(count, np.float32)
    symbols = stream.code_symbols(given_or_zeros(symbols, int(flags.sum())), 1 << depth, depth, MODELLED, contexts)
    coded[flags != 0] = from_sortable(symbols, depth)
    return np.repeat(coded, size) if constant and size else coded


def _code_bytes(stream: Stream, dtype: np.dtype[Any], values: np.ndarray, size: int) -> np.ndarray:
    """Code values of a type other than float32 byte by byte."""
    octets = values.astype(dtype.newbyteorder("<")).tobytes()
    coded = bytearray()
    for i in range(size * dtype.itemsize):
        if stream.over_read:
            raise CodingError("the code is cut off")
        coded.append(stream.code_number(8, octets[i] if octets else 0))
    if dtype == np.bool_ and any(octet > 1 for octet in coded):
        raise CodingError("a truth value is neither 0 nor 1")
    return np.frombuffer(coded, dtype.newbyteorder("<")).astype(dtype)


def _shared_contexts(stream: Stream, sets: ContextSets, role: str, depth: int) -> Any:
    """Return the contexts, with what they have learned, of a role's zero flags (depth 1), float16 or float32 values."""
    key = (role, depth) if len(sets) < MAX_SETS or (role, depth) in sets else ("", depth)
    if key not in sets:
        flags = depth == 1
        sets[key] = (
            stream.new_tree_contexts(1, FLAG_SCALE) if flags else stream.new_tree_contexts(MODELLED, VALUE_SCALE)
        )
    return sets[key]
