"""Arrays <-> bytes: every encoding of a tensor that the file format knows, and the choice of the shortest.

Decoders treat their input as data from a stranger: every length is checked against the bytes that are there and the
number of values that is expected, before anything is allocated. All numbers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np


class CodingError(ValueError):
    """The bytes are not an encoding of such a tensor."""


RAW_TYPES = {0: "<f4", 1: "<f2", 2: "<f8", 3: "<i8", 4: "<i4", 5: "|u1", 6: "|b1"}
RAW, SPARSE, SPARSE_CODES, DENSE_CODES = 0, 1, 2, 3
ENCODINGS = {RAW: "raw", SPARSE: "sparse", SPARSE_CODES: "sparse codes", DENSE_CODES: "codes"}
MAX_LEVELS = 256


def encode(values: np.ndarray) -> tuple[int, bytes]:
    """The shortest encoding of an array: (a key of `ENCODINGS`, its bytes). A pure function of the values.

    float32 arrays may be stored sparse, as codes into a codebook, or both, in fp16 where that is exact; a negative
    zero is written as zero. Other types are stored raw.

    >>> kind, data = encode(np.float32([0, 0, 0, 0, 0, 0, 2, 0]))
    >>> decode(kind, data, 8).tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0]
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.dtype.kind == "f" and not np.isfinite(flat).all():
        raise ValueError("expected finite values, got nan or infinity")
    if flat.dtype != np.float32:
        return RAW, _raw(flat)
    flat = flat + np.float32(0)  # -0.0 becomes 0.0
    positions = np.flatnonzero(flat)
    nonzero = flat[positions]
    where = _encode_positions(positions, len(flat))
    options = [(RAW, _raw(_short(flat))), (SPARSE, where + _raw(_short(nonzero)))]
    levels = np.unique(nonzero)
    if 0 < len(levels) <= MAX_LEVELS:
        codes = np.searchsorted(levels, nonzero)
        options.append((SPARSE_CODES, where + _encode_codes(levels, codes)))
    levels = np.unique(flat)
    if 0 < len(levels) <= MAX_LEVELS:
        options.append((DENSE_CODES, _encode_codes(levels, np.searchsorted(levels, flat))))
    return min(options, key=lambda option: len(option[1]))


def decode(kind: int, data: bytes, size: int) -> np.ndarray:
    """The (size,) array that `encode` was given.

    Raises:
        CodingError: the data is too short, too long, or describes something else.
    """
    reader = Reader(data)
    if kind == RAW:
        values = _read_raw(reader, size)
    elif kind in (SPARSE, SPARSE_CODES):
        positions = _read_positions(reader, size)
        read = _read_raw if kind == SPARSE else _read_codes
        nonzero = read(reader, len(positions))
        if nonzero.dtype != np.float32:
            raise CodingError("sparse values must be floats")
        values = np.zeros(size, np.float32)
        values[positions] = nonzero
    elif kind == DENSE_CODES:
        values = _read_codes(reader, size)
    else:
        raise CodingError(f"unknown encoding {kind}")
    reader.expect_end()
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise CodingError("a value is not finite")
    return values


def part_sizes(kind: int, data: bytes, size: int) -> dict[str, int]:
    """Bytes of positions, codebook, codes and plain values in an encoding that `decode` accepts."""
    reader = Reader(data)
    sizes = {"positions": 0, "codebook": 0, "codes": 0, "values": 0}
    count = size
    if kind in (SPARSE, SPARSE_CODES):
        count = len(_read_positions(reader, size))
        sizes["positions"] = reader.at
    if kind in (SPARSE_CODES, DENSE_CODES):
        before = reader.at
        levels = len(_read_levels(reader))
        sizes["codebook"] = reader.at - before
        sizes["codes"] = (count * _width(levels) + 7) // 8
    else:
        sizes["values"] = len(data) - reader.at
    return sizes


class Reader:
    """Takes bytes off the front of a buffer and never past its end."""

    def __init__(self, data: bytes, error: Callable[[str], Exception] = CodingError) -> None:
        self._data, self._error, self.at = memoryview(data), error, 0

    def take(self, count: int) -> memoryview:
        """The next count bytes."""
        if count < 0 or count > len(self._data) - self.at:
            raise self._error(f"{count} bytes expected, {len(self._data) - self.at} left")
        self.at += count
        return self._data[self.at - count : self.at]

    def unpack(self, layout: str) -> tuple[int, ...]:
        """Integers of a struct layout, little-endian."""
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    def expect_end(self) -> None:
        """Raises unless everything was read."""
        if self.at != len(self._data):
            raise self._error(f"{len(self._data) - self.at} bytes left over")


def _short(flat: np.ndarray) -> np.ndarray:
    """float16 where that is exact."""
    with np.errstate(over="ignore"):
        half = flat.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), flat) else flat


def _raw(flat: np.ndarray) -> bytes:
    little = flat.astype(flat.dtype.newbyteorder("<"))
    code = next((code for code, name in RAW_TYPES.items() if np.dtype(name) == little.dtype), None)
    if code is None:
        raise ValueError(f"cannot store values of type {flat.dtype}")
    return bytes([code]) + little.tobytes()


def _read_raw(reader: Reader, count: int) -> np.ndarray:
    (code,) = reader.unpack("B")
    if code not in RAW_TYPES:
        raise CodingError(f"unknown number type {code}")
    dtype = np.dtype(RAW_TYPES[code])
    data = reader.take(count * dtype.itemsize)
    if dtype.kind == "b" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise CodingError("a truth value is neither 0 nor 1")
    values = np.frombuffer(data, dtype).copy()
    return values.astype(np.float32) if dtype == np.dtype("<f2") else values.astype(dtype.newbyteorder("="))


def _encode_positions(positions: np.ndarray, size: int) -> bytes:
    """u32 count, u8 mode, then a bitmap (mode 0) or the gaps in units of 1 or 2 bytes (modes 1, 2)."""
    bitmap = np.zeros(size, np.uint8)
    bitmap[positions] = 1
    gaps = np.diff(positions, prepend=-1) - 1
    options = [np.packbits(bitmap, bitorder="little").tobytes(), _encode_gaps(gaps, 1), _encode_gaps(gaps, 2)]
    mode = min(range(3), key=lambda i: len(options[i]))
    return struct.pack("<IBI", len(positions), mode, len(options[mode])) + options[mode]


def _encode_gaps(gaps: np.ndarray, unit: int) -> bytes:
    """Each gap in one unsigned integer of so many bytes; the largest integer adds itself and goes on."""
    top = 256**unit - 1
    ends = np.cumsum(gaps // top + 1)
    coded = np.full(int(ends[-1]) if len(ends) else 0, top, f"<u{unit}")
    coded[ends - 1] = gaps % top
    return coded.tobytes()


def _read_positions(reader: Reader, size: int) -> np.ndarray:
    count, mode, length = reader.unpack("IBI")
    if count > size:
        raise CodingError(f"{count} nonzeros among {size} values")
    data = reader.take(length)
    if mode == 0:
        if length != (size + 7) // 8:
            raise CodingError(f"a bitmap of {length} bytes for {size} values")
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        if bits[size:].any():
            raise CodingError("padding bits are set")
        positions = np.flatnonzero(bits[:size])
    elif mode in (1, 2):
        if length % mode:
            raise CodingError("a gap is cut off")
        coded = np.frombuffer(data, f"<u{mode}").astype(np.int64)
        last = coded != 256**mode - 1
        if len(coded) and not last[-1]:
            raise CodingError("a gap is cut off")
        positions = np.cumsum(coded)[last] + np.arange(int(last.sum()))
    else:
        raise CodingError(f"unknown position mode {mode}")
    if len(positions) != count or (count and positions[-1] >= size):
        raise CodingError("positions do not match their count and size")
    return positions


def _width(levels: int) -> int:
    return max(levels - 1, 0).bit_length()


def _encode_codes(levels: np.ndarray, codes: np.ndarray) -> bytes:
    """u16 count, the values raw, then codes of as few bits as index them, packed from the lowest bit."""
    width = _width(len(levels))
    bits = (codes[:, None] >> np.arange(width)) & 1
    packed = np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")
    return struct.pack("<H", len(levels)) + _raw(_short(levels)) + packed.tobytes()


def _read_levels(reader: Reader) -> np.ndarray:
    (count,) = reader.unpack("H")
    if not 1 <= count <= MAX_LEVELS:
        raise CodingError(f"a codebook of {count} values")
    levels = _read_raw(reader, count)
    if levels.dtype != np.float32:
        raise CodingError("codebook values must be floats")
    return levels


def _read_codes(reader: Reader, count: int) -> np.ndarray:
    levels = _read_levels(reader)
    width = _width(len(levels))
    data = np.frombuffer(reader.take((count * width + 7) // 8), np.uint8)
    bits = np.unpackbits(data, bitorder="little")
    if bits[count * width :].any():
        raise CodingError("padding bits are set")
    codes = bits[: count * width].reshape(count, width).astype(np.int64) @ (1 << np.arange(width))
    if count and codes.max(initial=0) >= len(levels):
        raise CodingError("a code is outside its codebook")
    return levels[codes]
