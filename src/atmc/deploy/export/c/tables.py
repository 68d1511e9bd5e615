"""Encode a sparse matrix as a table for C: a stream of bits that is read once, from the first row to the last.

Each nonzero is written as the number of zeros before it, in a Rice code (quotient by 2^rice in ones, a zero, `rice`
bits of remainder), and a value in `bits` bits: an index into the table's levels or, without levels, a float16 or a
float32. The lowest bit comes first. Levels are the distinct values, those that float16 holds exactly before the others.
Source: Rice, "Some practical universal noiseless coding techniques", JPL 79-22, 1979; for independent zeros the code is
within a few percent of the shortest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MAX_BITS = 16  # bits that the C code reads at once
_LINE_WIDTH = 116  # characters of a line of numbers

# bits per value, what the stream holds for each value, levels in float16, other levels
Encoding = tuple[int, NDArray[np.int64], tuple[int, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Table:
    """A sparse matrix, encoded.

    Args:
        columns, count: of the matrix: number of columns, of nonzeros.
        stream: the nonzeros.
        rice, bits: bits of a remainder, and of a value.
        halves, floats: the levels, as bits of float16 and as float32.
    """

    columns: int
    count: int
    stream: bytes
    rice: int
    bits: int
    halves: tuple[int, ...] = ()
    floats: tuple[float, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of constant data."""
        return len(self.stream) + 2 * len(self.halves) + 4 * len(self.floats)


def encode(matrix: NDArray[np.float32]) -> Table:
    """Return the shortest table of a float32 matrix (rows, columns); no value is rounded.

    Raises:
        ValueError: a value is not finite.

    >>> encode(np.array([[0, 0, 0.5], [0, 0.5, 0]], np.float32)).size
    3
    """
    if not np.isfinite(matrix).all():
        raise ValueError("expected weights to be finite")
    flat = np.ascontiguousarray(matrix, np.float32).ravel()
    assert flat.size < 2**31 - 1
    places = np.flatnonzero(flat)
    zeros = np.diff(places, prepend=-1) - 1
    rice = min(range(_MAX_BITS + 1), key=lambda bits: int((zeros >> bits).sum()) + bits * len(zeros))
    bits, codes, halves, floats = min(
        _encodings(flat[places]), key=lambda coded: coded[0] * len(places) + 16 * len(coded[2]) + 32 * len(coded[3])
    )
    return Table(
        columns=matrix.shape[1],
        count=len(places),
        stream=_pack(zeros, rice, codes, bits),
        rice=rice,
        bits=bits,
        halves=halves,
        floats=floats,
    )


def declaration(table: Table, name: str) -> str:
    """Return the C text that declares a table's arrays."""
    parts = [("uint8_t", name, map(str, table.stream))]
    parts += [("uint16_t", f"{name}_halves", map(str, table.halves))] if table.halves else []
    parts += [("float", f"{name}_floats", map(literal, table.floats))] if table.floats else []
    return "".join(f"static const {kind} {label}[] = {{\n{_lines(items)}}};\n" for kind, label, items in parts)


def reader(table: Table, name: str) -> str:
    """Return the C expression for a reader at the start of a table."""
    halves = f"{name}_halves" if table.halves else "0"
    floats = f"{name}_floats" if table.floats else "0"
    return f"opened({name}, {table.count}, {table.rice}, {table.bits}, {halves}, {len(table.halves)}, {floats})"


def literal(value: float) -> str:
    """Return a float32 as a constant of C, exactly.

    >>> literal(1.0), literal(1e-7)
    ('1.0f', '1e-07f')
    """
    digits = f"{value:.9g}"
    return f"{digits}f" if set(digits) & set(".en") else f"{digits}.0f"


def _encodings(values: NDArray[np.float32]) -> Iterable[Encoding]:
    """Yield the ways to write values."""
    with np.errstate(over="ignore"):
        short = values.astype(np.float16)
    exact = short.astype(np.float32) == values
    yield 32, values.view(np.uint32).astype(np.int64), (), ()
    if exact.all():
        yield 16, short.view(np.uint16).astype(np.int64), (), ()
    levels, first, codes = np.unique(values, return_index=True, return_inverse=True)
    if not 1 <= len(levels) <= 2**_MAX_BITS:
        return
    inexact = ~exact[first]
    rank = np.empty(len(levels), np.int64)
    rank[np.argsort(inexact, kind="stable")] = np.arange(len(levels))
    halves = short[first][~inexact].view(np.uint16)
    yield (
        (len(levels) - 1).bit_length(),
        rank[codes.reshape(-1)],
        tuple(int(half) for half in halves),
        tuple(float(level) for level in levels[inexact]),
    )


def _pack(zeros: NDArray[np.int64], rice: int, codes: NDArray[np.int64], bits: int) -> bytes:
    quotients = zeros >> rice
    ends = np.cumsum(quotients + 1 + rice + bits)
    if not len(ends):
        return b""
    stops = ends - bits - rice - 1  # place of the zero that ends the quotient
    edges = np.zeros(int(ends[-1]) + 1, np.int8)
    np.add.at(edges, stops - quotients, 1)
    np.add.at(edges, stops, -1)
    stream = np.cumsum(edges[:-1]).astype(np.uint8)
    for bit in range(rice):
        stream[stops + 1 + bit] = (zeros >> bit) & 1
    for bit in range(bits):
        stream[stops + 1 + rice + bit] = (codes >> bit) & 1
    return np.packbits(stream, bitorder="little").tobytes()


def _lines(items: Iterable[str]) -> str:
    words = list(items)
    count = _LINE_WIDTH // (max(map(len, words)) + 2)
    return "".join(f"    {', '.join(words[at : at + count])},\n" for at in range(0, len(words), count))
