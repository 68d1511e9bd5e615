"""A second decoder of model files, written from part I of docs/file-format.md alone, in plain Python.

It shares no code and no table with `atmc.pack`. The preset dictionary is read from the page itself. It decodes whole
files of trusted origin: limits and most checks are left out.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "file-format.md"
P = [min(max(math.floor(65536 / (1 + math.exp(-i / 1024)) + 0.5), 1), 65535) for i in range(-11264, 11265)]
FORMATS = {"float32": "f", "float64": "d", "int64": "q", "int32": "i", "uint8": "B", "bool": "?"}

Tensor = tuple[str, Sequence[int], str]  # name, shape, type


def dictionary() -> bytes:
    """Return the preset dictionary of the metadata, from the page."""
    block = re.search(r"```text dictionary\n(.*?)\n```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    return block[1].replace("\n", "").encode("ascii")


def start(p: int) -> int:
    """Return the theta at which p is the probability."""
    return next(i - 11264 for i, value in enumerate(P) if value >= p) << 22


def unit(scale: int) -> int:
    return 1 << (30 + scale)


class Contexts:
    """Sections of contexts, one after the other: (number, theta or a list of thetas, info)."""

    def __init__(self, *sections: tuple[int, int | list[int], int]) -> None:
        self.theta: list[int] = []
        self.info: list[int] = []
        self.begin: list[int] = []
        for count, theta, info in sections:
            self.begin.append(len(self.theta))
            self.theta += theta if isinstance(theta, list) else [theta] * count
            self.info += [info] * count
        self.variance = [(1 << 54) // info for info in self.info]
        self.due = [info + (info >> 5) for info in self.info]


class Decoder:
    """The arithmetic decoder over the bytes of one code."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 4
        self.low, self.high = 0, 0xFFFFFFFF
        self.code = int.from_bytes(data[:4].ljust(4, b"\0"), "big")

    def settle(self) -> None:
        while (self.low ^ self.high) < 1 << 24:
            octet = self.data[self.at] if self.at < len(self.data) else 0
            self.at += 1
            self.code = (self.code & 0xFFFFFF) << 8 | octet
            self.low = (self.low & 0xFFFFFF) << 8
            self.high = (self.high & 0xFFFFFF) << 8 | 255
        assert self.at <= len(self.data) + 12, "the code is cut off"

    def bit(self, p: int) -> int:
        width = self.high - self.low
        middle = self.low + (width >> 16) * p + (((width & 65535) * p) >> 16)
        bit = int(self.code <= middle)
        if bit:
            self.high = middle
        else:
            self.low = middle + 1
        self.settle()
        return bit

    def number(self, width: int) -> int:
        number = 0
        while width:
            if width == 1 or self.high - self.low < 1 << 24:
                width -= 1
                number = 2 * number + self.bit(32768)
                continue
            size = min(width, 12)
            width -= size
            step = (self.high - self.low + 1) >> size
            value = (self.code - self.low) // step
            assert value < 1 << size, "malformed"
            self.low += value * step
            self.high = self.low + step - 1
            self.settle()
            number = (number << size) + value
        return number

    def decide(self, contexts: Contexts, which: Sequence[int]) -> int:
        x = spread = 0
        for k in which:
            x += contexts.theta[k]
            spread += contexts.variance[k]
        p = P[min(max(x >> 22, -11264), 11264) + 11264]
        bit = self.bit(p)
        gained = p * (65536 - p)
        damping = (gained * spread) >> 38
        step = (65536 * bit - p) << 6
        if damping > 255:
            step = (step << 16) // (65536 + damping)
        for k in which:
            contexts.theta[k] += (contexts.variance[k] * step) >> 12
            contexts.info[k] += gained
            if contexts.info[k] >= contexts.due[k]:
                contexts.variance[k] = (1 << 54) // contexts.info[k]
                contexts.due[k] = contexts.info[k] + (contexts.info[k] >> 5)
        return bit

    def tree(
        self, depth: int, levels: int, modelled: int, contexts: Contexts, of_node: Callable[[int], Sequence[int]]
    ) -> int:
        node = 1
        for shift in range(depth - 1, depth - modelled - 1, -1):
            beyond = ((2 * node + 1) << shift) - (1 << depth) >= levels
            node = 2 * node + (0 if beyond else self.decide(contexts, of_node(node)))
        rest = depth - modelled
        if rest > 0:
            node = (node << rest) + self.number(rest)
        return node - (1 << depth)


def alone(node: int) -> Sequence[int]:
    """Return the contexts of a node that has no others."""
    return (node,)


def nodes(modelled: int, scale: int) -> Contexts:
    return Contexts((1 << modelled, 0, unit(scale)))


def from_sortable(number: int, depth: int) -> float:
    top = 1 << (depth - 1)
    pattern = number - top if number >= top else 2 * top - 1 - number
    value = struct.unpack("<e" if depth == 16 else "<f", pattern.to_bytes(depth // 8, "little"))[0]
    assert math.isfinite(value)
    return float(value)


class Matrix:
    """One matrix of a weight: its layout, and its decoded values in row-major order."""

    def __init__(self, rows: int, columns: int, kernel: int = 1, width: int = 1) -> None:
        self.rows, self.columns, self.kernel, self.width = rows, columns, kernel, width
        self.stride = width if kernel > 1 else 4
        self.values = [0.0] * (rows * columns)

    def group_sizes(self) -> list[int]:
        sizes = (self.kernel, self.width, 1) if self.kernel > 1 else (16, 4, 1)
        kept = [size for size in dict.fromkeys(sizes) if size <= min(256, self.columns)]
        return kept if self.rows * self.columns <= 1 << 19 else kept[:1]

    def row_nonzeros(self) -> list[int]:
        """Return the number of nonzeros of each row."""
        return [
            sum(value != 0 for value in self.values[at : at + self.columns])
            for at in range(0, self.rows * self.columns, self.columns)
        ]

    def decode(self, data: bytes, input_counts: Sequence[int] | None) -> None:
        """Fill in the values."""
        if not data:
            return
        decoder = Decoder(data)
        if decoder.number(1):
            return
        group = decoder.number(2)
        position_scale = decoder.number(3) if group else 0
        half = decoder.number(1)
        levels = decoder.number(8) + 1 if decoder.number(1) else 0
        neighbors = decoder.number(1)
        value_scale = decoder.number(3)
        if group:
            size = self.group_sizes()[group - 1]
            places = self.positions(decoder, size, position_scale, input_counts)
        else:
            places = list(range(self.rows * self.columns))
        depth = 16 if half else 32
        book = self.codebook(decoder, levels, depth) if levels else []
        self.decode_values(decoder, places, book, depth, neighbors, value_scale)

    def positions(self, decoder: Decoder, group: int, scale: int, input_counts: Sequence[int] | None) -> list[int]:
        """Return the indices of the nonzero entries."""
        groups = -(-self.columns // group)
        one = unit(scale)
        starts = []
        for i in range(group):
            starts += [start(min(65536 // (group - i), 64000)), start(6500), start(13000)]
        contexts = Contexts(
            (1, start(1200), 1 << 26),
            (self.rows, 0, one),
            (groups, 0, one),
            (9, 0, 2 * one),
            (6, 0, one // 2),
            (3 * group, starts, one // 3),
            (3, 0, 1 << 29),
            (self.rows, 0, 2 * one),
            (self.columns, 0, 2 * one),
            (8, 0, 2 * one),
        )
        _, by_row, by_column, by_near, by_class, by_place, by_seen, member_row, member_column, member_near = (
            contexts.begin
        )
        classes = [0] * groups
        if input_counts and self.columns % len(input_counts) == 0:
            fed = self.columns // len(input_counts)
            classes = [1 + min(input_counts[g * group // fed].bit_length(), 4) for g in range(groups)]
        places: list[int] = []
        above_row, above_counts = [0] * self.columns, [0] * groups
        for i in range(self.rows):
            row, counts = [0] * self.columns, [0] * groups
            for g in range(groups):
                begin = g * group
                size = min(group, self.columns - begin)
                left = counts[g - 1] if g else 0
                near = 3 * min(left, 2) + min(above_counts[g], 2)
                which = (0, by_row + i, by_column + g, by_near + near, by_class + classes[g])
                if not decoder.decide(contexts, which):
                    continue
                seen = 0
                for k in range(size):
                    m = begin + k
                    if k == size - 1 and not seen:
                        bit = 1
                    else:
                        near = 1 if k % self.stride and row[m - 1] else 0
                        near += 2 if k >= self.stride and row[m - self.stride] else 0
                        near += 4 * above_row[m]
                        which = (
                            by_place + 3 * k + min(seen, 2),
                            by_seen + min(seen, 2),
                            member_row + i,
                            member_column + m,
                            member_near + near,
                        )
                        bit = decoder.decide(contexts, which)
                    row[m] = bit
                    seen += bit
                    if bit:
                        places.append(i * self.columns + m)
                counts[g] = seen
            above_row, above_counts = row, counts
        return places

    @staticmethod
    def codebook(decoder: Decoder, levels: int, depth: int) -> list[float]:
        contexts, last, book = nodes(6, 0), -1, []
        for _ in range(levels):
            size = min(decoder.tree(6, 64, 6, contexts, alone), 33)
            gap = size if size <= 1 else (1 << (size - 1)) + decoder.number(size - 1)
            last += gap + 1
            book.append(from_sortable(last, depth))
        return book

    def decode_values(
        self, decoder: Decoder, places: Sequence[int], book: list[float], depth: int, neighbors: int, scale: int
    ) -> None:
        levels = len(book) or 1 << depth
        symbol_depth = (levels - 1).bit_length()
        modelled = min(symbol_depth, 9)
        count = 1 << modelled
        sections = [(count, 0, unit(scale))]
        if neighbors:
            channels = self.columns // self.kernel
            sections += [(8 * self.rows, 0, 4 * unit(scale)), (8 * channels, 0, 4 * unit(scale))]
            sections += [(25 * count, 0, 2 * unit(scale))]
        contexts = Contexts(*sections)
        middle = sorted(abs(value) for value in book)[(levels - 1) // 2] if book else 0.0

        def kind(at: int) -> int:
            value = self.values[at]
            if value == 0:
                return 0
            return (1 if value < 0 else 3) + (1 if book and abs(value) > middle else 0)

        for at in places:
            i, m = divmod(at, self.columns)
            of_node: Callable[[int], Sequence[int]] = alone
            if neighbors:
                inside = m % self.kernel if self.kernel > 1 else m
                has_left = inside % self.width != 0 if self.kernel > 1 else m > 0
                a = kind(at - 1) if has_left else 0
                b = kind(at - self.stride) if inside >= self.stride else 0
                row, channel, near = contexts.begin[1:]
                row, channel, near = row + 8 * i, channel + 8 * (m // self.kernel), near + (a + 5 * b) * count

                def of_node(node: int, row: int = row, channel: int = channel, near: int = near) -> Sequence[int]:
                    return (node, near + node, row + node, channel + node) if node < 8 else (node, near + node)

            symbol = decoder.tree(symbol_depth, levels, modelled, contexts, of_node)
            self.values[at] = book[symbol] if book else from_sortable(symbol, depth)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number and where it ends."""
    number = 0
    for shift in range(0, 35, 7):
        number |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return number, at
    raise ValueError("a varint of more than 5 bytes")


def split_parts(data: bytes) -> list[bytes]:
    """Check the container and return the content of its parts, metadata first."""
    assert data[:6] == b"ATMC\x03\x00"
    at, check, parts = 6, zlib.crc32(data[:6]), []
    while at < len(data):
        length, at = read_varint(data, at)
        part = data[at : at + length]
        check = zlib.crc32(part, check)
        assert struct.unpack("<I", data[at + length : at + length + 4]) == (check,)
        parts.append(part)
        at += length + 4
    return parts


def decode_weight(part: bytes, shape: Sequence[int], counts: Sequence[int] | None) -> tuple[list[float], list[int]]:
    """Return the entries of W, and the input counts for the weight after it."""
    kernel = math.prod(shape[2:])
    width = shape[-1] if len(shape) > 2 else 1
    rows, columns = shape[0], math.prod(shape[1:])
    form, at = part[0], 1
    if form == 0:
        w = Matrix(rows, columns, kernel, width)
        w.decode(part[1:], counts)
        return w.values, w.row_nonzeros()
    rank, at = read_varint(part, at)
    u, v, c = Matrix(rows, rank), Matrix(rank, columns, kernel, width), Matrix(rows, columns, kernel, width)
    length, at = read_varint(part, at)
    u.decode(part[at : at + length], None)
    at += length
    if form == 4:
        v.decode(part[at:], counts)
        totals = u.row_nonzeros()
    else:
        length, at = read_varint(part, at)
        v.decode(part[at : at + length], counts)
        c.decode(part[at + length :], counts)
        pairs = zip((v if form == 1 else u).row_nonzeros(), c.row_nonzeros(), strict=True)
        totals = [one + two for one, two in pairs]
    added = {1: v.values, 2: u.values}.get(form)
    v_rows = [
        [(m, v.values[j * columns + m]) for m in range(columns) if v.values[j * columns + m]] for j in range(rank)
    ]
    w_values: list[float] = []
    for i in range(rows):
        sums = [0.0] * columns
        for j in range(rank):
            factor = u.values[i * rank + j]
            if factor:
                for m, value in v_rows[j]:
                    sums[m] += factor * value
        for m in range(columns):
            total = sums[m]
            if added:
                total += added[i * columns + m]
            total += c.values[i * columns + m]
            w_values.append(struct.unpack("<f", struct.pack("<f", total))[0])
    return w_values, totals


def decode_others(data: bytes, tensors: Sequence[Tensor]) -> dict[str, list[float]]:
    """Return the values of all tensors that are not weights."""
    decoder = Decoder(data)
    sets: dict[tuple[str, str], Contexts] = {}

    def shared(role: str, kind: str) -> Contexts:
        key = (role, kind) if (role, kind) in sets or len(sets) < 256 else ("", kind)
        if key not in sets:
            sets[key] = nodes(1, 0) if kind == "flags" else nodes(9, 2)
        return sets[key]

    decoded: dict[str, list[float]] = {}
    for name, shape, kind in tensors:
        size, role = math.prod(shape), name.rpartition(".")[2]
        if kind != "float32":
            code = FORMATS[kind]
            octets = bytes(decoder.number(8) for _ in range(size * struct.calcsize(f"<{code}")))
            decoded[name] = list(struct.unpack(f"<{size}{code}", octets))
            continue
        constant, half = decoder.number(1), decoder.number(1)
        count = min(size, 1) if constant else size
        flags = [1] * count
        if not constant and decoder.number(1):
            flags = [decoder.tree(1, 2, 1, shared(role, "flags"), alone) for _ in range(count)]
        depth = 16 if half else 32
        contexts = shared(role, f"float{depth}")
        values = [
            from_sortable(decoder.tree(depth, 1 << depth, 9, contexts, alone), depth) if f else 0.0 for f in flags
        ]
        decoded[name] = values * size if constant else values
    return decoded


def decode(data: bytes, tensors: Sequence[Tensor] | None = None) -> dict[str, list[float]]:
    """Return the values of all stored tensors of a file, by name.

    Args:
        tensors: the list of a zoo model's tensors; a file of a user's own class has its own.
    """
    parts = split_parts(data)
    metadata = json.loads(zlib.decompressobj(-15, dictionary()).decompress(parts[0]))
    if tensors is None:
        tensors = [(name, tuple(shape), kind) for name, shape, kind in metadata["tensors"]]
    else:
        listed = repr([(name, tuple(shape), kind) for name, shape, kind in tensors])
        assert zlib.crc32(listed.encode()) == metadata["schema"]
    weights = [t for t in tensors if t[2] == "float32" and len(t[1]) >= 2 and math.prod(t[1]) > 0]
    assert len(parts) == len(weights) + 2
    decoded: dict[str, list[float]] = {}
    counts = None
    for (name, shape, _), part in zip(weights, parts[1:-1], strict=True):
        decoded[name], counts = decode_weight(part, shape, counts)
    others = [t for t in tensors if t not in weights]
    return decoded | decode_others(parts[-1], others)
