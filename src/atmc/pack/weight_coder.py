"""Tensors <-> bits: what is written of a tensor, and which of several models says it shortest.

A weight is taken as a matrix: which entries are nonzero (`bits.code_positions`), then their values in that order,
either as they are or as codes into a codebook of ascending values (`bits.code_placed`). Every choice is measured, not
guessed; all of them stand in the first bits. Biases, norms and other small tensors: see `small`. Decoders treat their
input as data from a stranger: they read zeros past its end, and nothing in it makes them allocate more than the shape
asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import lgamma, log

import numpy as np
from numpy.typing import NDArray

from atmc.pack.arithmetic import DECODE, ENCODE, MEASURE
from atmc.pack.coder_run import Stream
from atmc.pack.sortable_floats import Floats, Integers, cleaned, from_ordered, is_half, ordered, room_for

MAX_LEVELS = 256
MAX_GROUP = 256
MAX_SIDES = 1 << 22  # rows and columns together: each has contexts, which take memory
MAX_NEAR = 1 << 14  # rows and input channels together up to which values have contexts for each
POSITION_SCALES, VALUE_SCALES = (0, 1, 2, 4, 6), (0, 2, 4)  # searched from the second on
FULL_SEARCH = 1 << 19  # entries up to which every group is tried
POSITION_SAMPLE = 1 << 19  # entries on which groups and scales are judged
VALUE_SAMPLE = 1 << 16  # values on which the scale of their statistics is judged
SIGNS = np.array([1, 3])  # kinds of plain values, by their first bit
MODELLED = 9  # leading bits of a plain value that are modelled, the others are taken as random

Flags = NDArray[np.uint8]


class CodingError(ValueError):
    """The bytes are not an encoding of such a tensor."""


class TooManySides(CodingError):
    """The tensor has more rows and columns than any that is written."""


@dataclass(frozen=True)
class Matrix:
    """How a weight is laid out: (rows, columns), a kernel of so many columns to an input channel, and its width."""

    rows: int
    columns: int
    kernel: int = 1
    width: int = 1

    @classmethod
    def of(cls, shape: Sequence[int]) -> Matrix:
        """The matrix of a weight (out, in, *kernel), or of a vector. TooManySides if it is beyond all measure.

        >>> Matrix.of((20, 1, 5, 5))
        Matrix(rows=20, columns=25, kernel=25, width=5)
        """
        columns, kernel = 1, 1
        for side in shape[1:]:
            columns *= side
        for side in shape[2:]:
            kernel *= side
        if shape[0] + columns > MAX_SIDES:
            raise TooManySides(f"{shape[0]:,} rows and {columns:,} columns; at most {MAX_SIDES:,} together")
        return cls(shape[0], columns, kernel, shape[-1] if len(shape) > 2 else 1)

    def groups(self) -> tuple[int, ...]:
        """Group sizes worth trying: a kernel, a row of it, single entries; 16, 4, 1 where there is no kernel."""
        tried = (self.kernel, self.width, 1) if self.kernel > 1 else (16, 4, 1)
        sizes = tuple(size for size in dict.fromkeys(tried) if size <= min(MAX_GROUP, max(self.columns, 1)))
        return sizes if self.rows * self.columns <= FULL_SEARCH else sizes[:1]

    @property
    def has_near(self) -> bool:
        """Whether values may be coded under contexts of their surroundings; else these would take too much memory."""
        return self.rows + self.columns // self.kernel <= MAX_NEAR

    def work(self, group: int) -> int:
        """Decisions about groups of that size, at least; a quarter of the entries where there are no positions."""
        return self.rows * -(-self.columns // group) if group else self.rows * self.columns // 4

    def across(self) -> int:
        """How far back in a group the entry above in the kernel is."""
        return self.width if self.kernel > 1 else 4

    def classes(self, group: int, hint: Integers | None) -> Integers:
        """A class for each group of columns, from the nonzeros of the rows that feed it; 0 where nothing is known."""
        starts = np.arange(0, self.columns, group)
        if hint is None or not len(hint) or self.columns % len(hint):
            return np.zeros(len(starts), np.int64)
        lengths = np.searchsorted([1, 2, 4, 8], hint, side="right")  # bit lengths, at most POSITION_CLASSES - 2
        return 1 + lengths[starts // (self.columns // len(hint))].astype(np.int64)


@dataclass(frozen=True)
class Choice:
    """How a tensor is written.

    Args:
        group: entries of a group of positions; 0 where no entry is zero and positions are left out.
        position_scale, value_scale: how strongly contexts are held to their prior, 0 to 7.
        half: values are exact in float16.
        levels: size of the codebook, 0 for plain values.
        near: values are coded under contexts of their row, their input channel and their neighbours.
    """

    group: int = 0
    position_scale: int = 0
    half: bool = False
    levels: int = 0
    near: bool = False
    value_scale: int = 0


@dataclass(frozen=True)
class Spent:
    """Code length of a tensor's parts, in bits."""

    header: float = 0.0
    positions: float = 0.0
    codebook: float = 0.0
    values: float = 0.0

    @property
    def total(self) -> float:
        """All of it, bits."""
        return self.header + self.positions + self.codebook + self.values


def log2_binomial(n: int, k: int) -> float:
    """log2 of the number of ways to choose k of n: the floor of k positions without contexts, bits.

    >>> round(log2_binomial(5, 2), 6) == round(log(10, 2), 6)
    True
    """
    return (lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)) / log(2)


def entropy_bits(symbols: np.ndarray) -> float:
    """Length of the symbols under their own frequencies (order 0, frequencies not counted), bits."""
    counts = np.unique(symbols, return_counts=True)[1]
    return float(-(counts * np.log2(counts / max(len(symbols), 1))).sum()) if len(symbols) else 0.0


def write_weight(values: np.ndarray, matrix: Matrix, hint: Integers | None = None) -> tuple[bytes, Spent]:
    """The shortest of the encodings of a weight, and its length by parts; no bytes where all values are zero.

    Args:
        values: float32, rows * columns of them, finite; a negative zero is written as zero.
        hint: nonzeros of each row of the weight before, whose outputs may be this one's inputs; None if there is none.

    Raises:
        ValueError: nan or infinity.
    """
    flat = cleaned(values)
    flags = (flat != 0).astype(np.uint8)
    nonzero = flat[flags != 0]
    if not len(nonzero):
        return b"", Spent()
    choice = _choose_values(nonzero, matrix, flags)
    if len(nonzero) < len(flat):
        choice = _choose_positions(flags, matrix, hint, choice)
    work = matrix.work(choice.group) + 16 * len(nonzero)
    stream = Stream(ENCODE, room=8 * len(nonzero) + len(flat) + 4096, work=work)
    spent = _code_weight(stream, matrix, hint, choice, flags, nonzero)[2]
    return stream.finish(), spent


def read_weight(data: bytes, matrix: Matrix, hint: Integers | None = None) -> tuple[Floats, Spent]:
    """What `write_weight` was given, flat, and its length by parts.

    Raises:
        CodingError: the bytes are no such encoding.
    """
    size = matrix.rows * matrix.columns
    values = np.zeros(size, np.float32)
    if not data:
        return values, Spent()
    stream = Stream(DECODE, data=data, work=matrix.work(4) + 8 * len(data))
    flags, nonzero, spent = _code_weight(stream, matrix, hint, Choice(), np.zeros(size, np.uint8), values[:0])
    if stream.over_read:
        raise CodingError("the code is cut off")
    if not np.isfinite(nonzero).all():
        raise CodingError("a value is not finite")
    values[flags != 0] = nonzero
    return values, spent


def _code_weight(
    stream: Stream, matrix: Matrix, hint: Integers | None, choice: Choice, flags: Flags, nonzero: Floats
) -> tuple[Flags, Floats, Spent]:
    """A weight that is not all zero, written (or measured) as chosen, or read: (flags, nonzero values, lengths)."""
    if stream.number(1, 0):  # a stream of no bytes reads as ones: all zero
        return flags, nonzero, Spent(header=stream.spent)
    choice = _code_choice(stream, matrix, choice)
    header = stream.spent
    if choice.group:
        classes = matrix.classes(choice.group, hint)
        layout = (matrix.rows, matrix.columns, choice.group, matrix.across())
        flags = stream.positions(flags, *layout, classes, choice.position_scale)
    else:
        flags = np.ones_like(flags)
    positions = stream.spent
    nonzero, codebook = _code_values(stream, matrix, choice, nonzero, flags)
    spent = Spent(header, positions - header, codebook, stream.spent - positions - codebook)
    return flags, nonzero, spent


def _code_choice(stream: Stream, matrix: Matrix, choice: Choice) -> Choice:
    groups = (0, *matrix.groups())
    where = stream.number(2, groups.index(choice.group))
    if where >= len(groups):
        raise CodingError(f"unknown layout {where}")
    position_scale = stream.number(3, choice.position_scale) if where else 0
    half = bool(stream.number(1, choice.half))
    levels = stream.number(8, choice.levels - 1) + 1 if stream.number(1, choice.levels > 0) else 0
    near = bool(stream.number(1, choice.near))
    if near and not matrix.has_near:
        raise CodingError("the tensor has too many rows and channels for contexts of each")
    return Choice(groups[where], position_scale, half, levels, near, stream.number(3, choice.value_scale))


def _code_values(stream: Stream, matrix: Matrix, choice: Choice, values: Floats, flags: Flags) -> tuple[Floats, float]:
    """The values at the flags, in order: (those given or read, bits of the codebook)."""
    depth = 16 if choice.half else 32
    numbers, levels, kinds, codebook = ordered(values, choice.half), 1 << depth, SIGNS, 0.0
    if choice.levels:
        before = stream.spent
        book, numbers = np.unique(numbers, return_inverse=True)
        book = stream.ascending(room_for(book, choice.levels))
        if book[-1] >> depth:
            raise CodingError("a codebook value is out of range")
        codebook = stream.spent - before
        centers = from_ordered(book, depth)
        if not np.isfinite(centers).all():
            raise CodingError("a value is not finite")
        levels, kinds = choice.levels, _kinds(centers)
        depth = (levels - 1).bit_length()
    modelled = min(depth, MODELLED)
    numbers = room_for(numbers, int(flags.sum()))
    if stream.over_read:  # before memory is taken for contexts
        raise CodingError("the code is cut off")
    if choice.near:
        places = np.flatnonzero(flags)
        shape = (matrix.rows, matrix.columns, matrix.kernel, matrix.width, matrix.across())
        numbers = stream.placed(numbers, levels, depth, modelled, choice.value_scale, places, shape, kinds)
    else:
        numbers = stream.symbols(numbers, levels, depth, modelled, stream.model(modelled, choice.value_scale))
    return centers[numbers] if choice.levels else from_ordered(numbers, depth), codebook


def _kinds(centers: Floats) -> Integers:
    """1 to 4 for each value of a codebook: its sign, and whether it is one of the larger half."""
    size = np.abs(centers)
    large = size > np.sort(size)[(len(size) - 1) // 2]
    kinds: Integers = (1 + 2 * (centers > 0) + large).astype(np.int64)
    return kinds


def _choose_values(nonzero: Floats, matrix: Matrix, flags: Flags) -> Choice:
    """Codebook or plain values, under which contexts, and how firmly these hold to their prior."""
    half = is_half(nonzero)
    few = len(np.unique(nonzero[: 64 * MAX_LEVELS])) <= MAX_LEVELS
    levels = len(np.unique(nonzero)) if few else MAX_LEVELS + 1
    sizes = [0] if levels > MAX_LEVELS else [levels] if len(nonzero) > 8 * levels else [levels, 0]
    contexts = [False, True] if matrix.has_near else [False]

    sample = nonzero[:VALUE_SAMPLE]
    held = len(np.unique(sample))
    there = flags[: np.flatnonzero(flags)[len(sample) - 1] + 1]

    @cache
    def length(choice: Choice) -> float:
        stream = Stream(MEASURE, work=6 * 16 * len(sample))
        _code_values(stream, matrix, replace(choice, levels=min(choice.levels, held)), sample, there)
        return stream.spent

    start = Choice(half=half, value_scale=VALUE_SCALES[1])
    best = min((replace(start, levels=size, near=near) for size in sizes for near in contexts), key=length)
    return _lowest([replace(best, value_scale=scale) for scale in VALUE_SCALES], length)


def _choose_positions(flags: Flags, matrix: Matrix, hint: Integers | None, choice: Choice) -> Choice:
    """The best group size at one scale, then the best scale for it; of a large matrix by its first rows."""
    rows = min(matrix.rows, max(POSITION_SAMPLE // matrix.columns, 1))

    @cache
    def length(option: Choice) -> float:
        stream = Stream(MEASURE, work=4 * matrix.work(1))
        classes = matrix.classes(option.group, hint)
        layout = (rows, matrix.columns, option.group, matrix.across())
        stream.positions(flags[: rows * matrix.columns], *layout, classes, option.position_scale)
        return stream.spent

    groups = [replace(choice, group=group, position_scale=POSITION_SCALES[1]) for group in matrix.groups()]
    best = min(groups, key=length)
    return _lowest([replace(best, position_scale=scale) for scale in POSITION_SCALES], length)


def _lowest(options: Sequence[Choice], length: Callable[[Choice], float]) -> Choice:
    """Downhill from the second option: lengths are taken to fall and then to rise."""
    at = 1
    for step in (1, -1):
        while 0 <= at + step < len(options) and length(options[at + step]) < length(options[at]):
            at += step
    return options[at]
