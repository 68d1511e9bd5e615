"""Code one matrix of a weight: W itself, or a factor U, V or C.

A header of some bits comes first (`CodeHeader`), then which entries are nonzero (`arithmetic.code_positions`), then
their values in that order, either as they are or as codes into a codebook of ascending values. The encoder measures
the length of every choice that the header holds and takes the shortest. Biases, norms and other tensors: see
`other_tensors`. Decoders treat their input as data from a stranger: they read zeros past its end, and nothing in it
makes them allocate more than the shape asks for.
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
from atmc.pack.sortable_floats import Float32s, Int64s, fits_float16, flatten_finite, from_sortable, to_sortable

# Part of the format:
MAX_LEVELS = 256  # values of a codebook
MAX_GROUP = 256  # entries of a group of positions
SINGLE_GROUP_ABOVE = 1 << 19  # entries of a matrix above which only the largest group is allowed
MAX_NEIGHBOR_SIDES = 1 << 14  # rows and input channels together up to which values may have contexts of their neighbors
STRIDE = 4  # how many columns back the second neighbor is if there is no kernel
MODELLED = 9  # leading bits of a plain value that are adaptive; the others are taken as equally likely
SIGN_KINDS = np.array([1, 3])  # kinds of plain values, by their first bit: negative, positive

# Choices of the encoder and limits of the decoder:
MAX_SIDES = 1 << 22  # rows and columns together: each has contexts, which take memory
POSITION_SCALES, VALUE_SCALES = (0, 1, 2, 4, 6), (0, 2, 4)  # tried from the second on
POSITION_SAMPLE = 1 << 19  # entries on which groups and scales are measured
VALUE_SAMPLE = 1 << 16  # values on which the contexts of values and their scale are measured

Flags = NDArray[np.uint8]


class CodingError(ValueError):
    """The bytes are not an encoding of such a tensor."""


class TooManySides(CodingError):
    """The tensor has more rows and columns together than `MAX_SIDES`."""


@dataclass(frozen=True)
class Layout:
    """A weight's layout as a matrix.

    Args:
        rows, columns: its sides; a column is an input channel and a place in the kernel.
        kernel: columns per input channel, the entries of a kernel; 1 if there is none.
        width: entries in a row of the kernel.
    """

    rows: int
    columns: int
    kernel: int = 1
    width: int = 1

    @classmethod
    def of(cls, shape: Sequence[int]) -> Layout:
        """Return the layout of a weight (out, in, *kernel), or of a vector.

        Raises:
            TooManySides: rows and columns together are more than MAX_SIDES.

        >>> Layout.of((20, 1, 5, 5))
        Layout(rows=20, columns=25, kernel=25, width=5)
        """
        columns, kernel = 1, 1
        for side in shape[1:]:
            columns *= side
        for side in shape[2:]:
            kernel *= side
        if shape[0] + columns > MAX_SIDES:
            raise TooManySides(f"{shape[0]:,} rows and {columns:,} columns; at most {MAX_SIDES:,} together")
        return cls(shape[0], columns, kernel, shape[-1] if len(shape) > 2 else 1)

    def group_sizes(self) -> tuple[int, ...]:
        """Return the sizes of groups of positions: a kernel, a row of it, an entry; 16, 4, 1 if there is no kernel."""
        sizes = (self.kernel, self.width, 1) if self.kernel > 1 else (16, 4, 1)
        allowed = tuple(size for size in dict.fromkeys(sizes) if size <= min(MAX_GROUP, max(self.columns, 1)))
        return allowed if self.rows * self.columns <= SINGLE_GROUP_ABOVE else allowed[:1]

    @property
    def allows_neighbors(self) -> bool:
        """Whether values may be coded under contexts of their neighbors; else these would take too much memory."""
        return self.rows + self.columns // self.kernel <= MAX_NEIGHBOR_SIDES

    def count_decisions(self, group: int) -> int:
        """Return the least number of decisions about groups of that size; a quarter of the entries if group is 0."""
        return self.rows * -(-self.columns // group) if group else self.rows * self.columns // 4

    @property
    def stride(self) -> int:
        """How many columns back the entry above in the kernel is."""
        return self.width if self.kernel > 1 else STRIDE

    def group_classes(self, group: int, input_counts: Int64s | None) -> Int64s:
        """Return a class for each group of columns, by the nonzeros that feed it; 0 if these are not known."""
        starts = np.arange(0, self.columns, group)
        if input_counts is None or not len(input_counts) or self.columns % len(input_counts):
            return np.zeros(len(starts), np.int64)
        lengths = np.searchsorted([1, 2, 4, 8], input_counts, side="right")  # bit lengths, at most POSITION_CLASSES - 2
        return 1 + lengths[starts // (self.columns // len(input_counts))].astype(np.int64)


@dataclass(frozen=True)
class CodeHeader:
    """The first bits of a matrix's code, which say how the matrix is coded.

    Args:
        group: entries of a group of positions; 0 if no entry is zero and positions are left out.
        position_scale, value_scale: how strongly contexts are held to their prior, 0 to 7.
        half: values are exact in float16.
        levels: size of the codebook, 0 for plain values.
        neighbors: values are coded under contexts of their neighbors, row and input channel.
    """

    group: int = 0
    position_scale: int = 0
    half: bool = False
    levels: int = 0
    neighbors: bool = False
    value_scale: int = 0


@dataclass(frozen=True)
class CodeLengths:
    """Code lengths of a matrix by purpose, in bits."""

    header: float = 0.0
    positions: float = 0.0
    codebook: float = 0.0
    values: float = 0.0

    @property
    def total(self) -> float:
        """The sum, bits."""
        return self.header + self.positions + self.codebook + self.values


def log2_binomial(n: int, k: int) -> float:
    """Return log2 of the number of ways to choose k of n: the floor of k positions without contexts, bits.

    >>> round(log2_binomial(5, 2), 6) == round(log(10, 2), 6)
    True
    """
    return (lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)) / log(2)


def entropy_bits(symbols: np.ndarray) -> float:
    """Return the length of the symbols under their own frequencies (order 0, frequencies not counted), bits."""
    counts = np.unique(symbols, return_counts=True)[1]
    return float(-(counts * np.log2(counts / max(len(symbols), 1))).sum()) if len(symbols) else 0.0


def encode_matrix(values: np.ndarray, layout: Layout, input_counts: Int64s | None = None) -> tuple[bytes, CodeLengths]:
    """Return the shortest encoding of a matrix and its code lengths; no bytes if all values are zero.

    Args:
        values: float32, rows * columns of them, finite; a negative zero is written as zero.
        input_counts: nonzeros of each row of the weight before in the file, whose outputs may be the inputs of this
            one; None if there is none.

    Raises:
        ValueError: nan or infinity.
    """
    flat = flatten_finite(values)
    flags = (flat != 0).astype(np.uint8)
    nonzero = flat[flags != 0]
    if not len(nonzero):
        return b"", CodeLengths()
    header = _choose_values(nonzero, layout, flags)
    if len(nonzero) < len(flat):
        header = _choose_positions(flags, layout, input_counts, header)
    decisions = layout.count_decisions(header.group) + 16 * len(nonzero)
    stream = Stream(ENCODE, room=8 * len(nonzero) + len(flat) + 4096, decisions=decisions)
    lengths = _code_matrix(stream, layout, input_counts, header, flags, nonzero)[2]
    return stream.finish(), lengths


def decode_matrix(data: bytes, layout: Layout, input_counts: Int64s | None = None) -> tuple[Float32s, CodeLengths]:
    """Invert `encode_matrix`: return the flat values and their code lengths.

    Raises:
        CodingError: the bytes are no such encoding.
    """
    size = layout.rows * layout.columns
    values = np.zeros(size, np.float32)
    if not data:
        return values, CodeLengths()
    stream = Stream(DECODE, data=data, decisions=layout.count_decisions(4) + 8 * len(data))
    no_flags, no_values = np.zeros(size, np.uint8), values[:0]
    flags, nonzero, lengths = _code_matrix(stream, layout, input_counts, CodeHeader(), no_flags, no_values)
    if stream.over_read:
        raise CodingError("the code is cut off")
    if not np.isfinite(nonzero).all():
        raise CodingError("a value is not finite")
    values[flags != 0] = nonzero
    return values, lengths


def _code_matrix(
    stream: Stream, layout: Layout, input_counts: Int64s | None, header: CodeHeader, flags: Flags, nonzero: Float32s
) -> tuple[Flags, Float32s, CodeLengths]:
    """Write, measure or read a matrix that is not all zero; return (flags, nonzero values, code lengths)."""
    if stream.code_number(1, 0):  # a stream of no bytes reads as ones: all zero
        return flags, nonzero, CodeLengths(header=stream.code_length)
    header = _code_header(stream, layout, header)
    after_header = stream.code_length
    if header.group:
        classes = layout.group_classes(header.group, input_counts)
        sides = (layout.rows, layout.columns, header.group, layout.stride)
        flags = stream.code_positions(flags, *sides, classes, header.position_scale)
    else:
        flags = np.ones_like(flags)
    after_positions = stream.code_length
    nonzero, codebook = _code_values(stream, layout, header, nonzero, flags)
    values = stream.code_length - after_positions - codebook
    lengths = CodeLengths(
        header=after_header, positions=after_positions - after_header, codebook=codebook, values=values
    )
    return flags, nonzero, lengths


def _code_header(stream: Stream, layout: Layout, header: CodeHeader) -> CodeHeader:
    groups = (0, *layout.group_sizes())
    number = stream.code_number(2, groups.index(header.group))
    if number >= len(groups):
        raise CodingError(f"there is no group size {number}, only {len(groups) - 1}")
    position_scale = stream.code_number(3, header.position_scale) if number else 0
    half = bool(stream.code_number(1, header.half))
    levels = stream.code_number(8, header.levels - 1) + 1 if stream.code_number(1, header.levels > 0) else 0
    neighbors = bool(stream.code_number(1, header.neighbors))
    if neighbors and not layout.allows_neighbors:
        raise CodingError("the tensor has too many rows and channels for contexts of neighbors")
    return CodeHeader(
        group=groups[number],
        position_scale=position_scale,
        half=half,
        levels=levels,
        neighbors=neighbors,
        value_scale=stream.code_number(3, header.value_scale),
    )


def _code_values(
    stream: Stream, layout: Layout, header: CodeHeader, values: Float32s, flags: Flags
) -> tuple[Float32s, float]:
    """Code the values at the flags, in order; return them and the code length of the codebook in bits."""
    depth = 16 if header.half else 32
    symbols, levels, kinds, codebook = to_sortable(values, header.half), 1 << depth, SIGN_KINDS, 0.0
    if header.levels:
        before = stream.code_length
        book, symbols = np.unique(symbols, return_inverse=True)
        book = stream.code_ascending(given_or_zeros(book, header.levels))
        if book[-1] >> depth:
            raise CodingError("a codebook value is out of range")
        codebook = stream.code_length - before
        centers = from_sortable(book, depth)
        if not np.isfinite(centers).all():
            raise CodingError("a value is not finite")
        levels, kinds = header.levels, _codebook_kinds(centers)
        depth = (levels - 1).bit_length()
    modelled = min(depth, MODELLED)
    symbols = given_or_zeros(symbols, int(flags.sum()))
    if stream.over_read:  # before memory is taken for contexts
        raise CodingError("the code is cut off")
    if header.neighbors:
        places = np.flatnonzero(flags)
        shape = (layout.rows, layout.columns, layout.kernel, layout.width, layout.stride)
        scale = header.value_scale
        symbols = stream.code_symbols_with_neighbors(symbols, levels, depth, modelled, scale, places, shape, kinds)
    else:
        contexts = stream.new_tree_contexts(modelled, header.value_scale)
        symbols = stream.code_symbols(symbols, levels, depth, modelled, contexts)
    return centers[symbols] if header.levels else from_sortable(symbols, depth), codebook


def given_or_zeros(numbers: Int64s, count: int) -> Int64s:
    """Return the numbers to encode, or if there are none, zeros as room for the count of numbers to decode."""
    return numbers if len(numbers) else np.zeros(count, np.int64)


def _codebook_kinds(centers: Float32s) -> Int64s:
    """Return 1 to 4 for each value of a codebook: its sign, and whether it is one of the larger half."""
    size = np.abs(centers)
    large = size > np.sort(size)[(len(size) - 1) // 2]
    kinds: Int64s = (1 + 2 * (centers > 0) + large).astype(np.int64)
    return kinds


def _choose_values(nonzero: Float32s, layout: Layout, flags: Flags) -> CodeHeader:
    """Choose codebook or plain values, with or without neighbors, and the scale of their contexts."""
    half = fits_float16(nonzero)
    few = len(np.unique(nonzero[: 64 * MAX_LEVELS])) <= MAX_LEVELS
    levels = len(np.unique(nonzero)) if few else MAX_LEVELS + 1
    sizes = [0] if levels > MAX_LEVELS else [levels] if len(nonzero) > 8 * levels else [levels, 0]
    neighbors = [False, True] if layout.allows_neighbors else [False]

    sample = nonzero[:VALUE_SAMPLE]
    sample_levels = len(np.unique(sample))
    sample_flags = flags[: np.flatnonzero(flags)[len(sample) - 1] + 1]

    @cache
    def measure(header: CodeHeader) -> float:
        stream = Stream(MEASURE, decisions=6 * 16 * len(sample))
        sample_header = replace(header, levels=min(header.levels, sample_levels))
        _code_values(stream, layout, sample_header, sample, sample_flags)
        return stream.code_length

    start = CodeHeader(half=half, value_scale=VALUE_SCALES[1])
    options = [replace(start, levels=size, neighbors=near) for size in sizes for near in neighbors]
    best = min(options, key=measure)
    return _descend([replace(best, value_scale=scale) for scale in VALUE_SCALES], measure)


def _choose_positions(flags: Flags, layout: Layout, input_counts: Int64s | None, header: CodeHeader) -> CodeHeader:
    """Choose the best group size at one scale, then the best scale for it; of a large matrix by its first rows."""
    rows = min(layout.rows, max(POSITION_SAMPLE // layout.columns, 1))

    @cache
    def measure(option: CodeHeader) -> float:
        stream = Stream(MEASURE, decisions=4 * layout.count_decisions(1))
        classes = layout.group_classes(option.group, input_counts)
        sides = (rows, layout.columns, option.group, layout.stride)
        stream.code_positions(flags[: rows * layout.columns], *sides, classes, option.position_scale)
        return stream.code_length

    groups = [replace(header, group=group, position_scale=POSITION_SCALES[1]) for group in layout.group_sizes()]
    best = min(groups, key=measure)
    return _descend([replace(best, position_scale=scale) for scale in POSITION_SCALES], measure)


def _descend(options: Sequence[CodeHeader], measure: Callable[[CodeHeader], float]) -> CodeHeader:
    """Go downhill from the second option, and return where it ends: lengths are taken to fall and then to rise."""
    at = 1
    for step in (1, -1):
        while 0 <= at + step < len(options) and measure(options[at + step]) < measure(options[at]):
            at += step
    return options[at]
