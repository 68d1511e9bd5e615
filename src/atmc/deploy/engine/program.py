"""The steps of a network for a batch of a given size as numbers in memory: what the kernel runs.

Every activation gets its place in one block of memory, the arena; two that are never needed at once may share it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from atmc.deploy.engine.shifts import Diagonal, Entries, Phases
from atmc.deploy.engine.steps import Step, Steps
from atmc.deploy.graph.graph import Affine, AvgPool, Conv, Flatten, GlobalAvgPool, Linear, MaxPool
from atmc.deploy.graph.memory import Buffer, last_reads, place_buffers

VECTOR = 16  # floats: the unit of the kernel's lengths, whatever the machine's registers
KINDS = (
    *("pack", "convolve", "convolve_fours", "dot", "phases"),
    *("elementwise", "max_pool", "mean_pool", "flatten", "unpack"),
)
INTEGERS = (
    *("kind", "in", "other", "out", "lead", "channels", "in_stride", "out_stride", "vectors", "mask", "rows", "bias"),
    *("batch", "height", "width", "row", "image", "out_height", "out_width", "out_row", "out_image"),
    *("kernel_y", "kernel_x", "stride_y", "stride_x", "pad_y", "pad_x", "dilation_y", "dilation_x", "count_padding"),
)
OP = np.dtype([(name, np.int64) for name in INTEGERS] + [("low", np.float64), ("high", np.float64)])
NONZERO = np.dtype([("weight", np.float32), ("offset", np.int32)])


@dataclass(frozen=True, eq=False)
class Program:
    """What `compiled` and `fallback` run: see kernel.cpp. arena_floats: how much memory activations take."""

    ops: NDArray[np.void]
    nonzeros: NDArray[np.void]
    starts: NDArray[np.int32]
    floats: NDArray[np.float32]
    masks: NDArray[np.int32]
    arena_floats: int
    batch: int
    classes: int


@dataclass
class _Tables:
    """Constants of a program as they accumulate."""

    nonzeros: list[NDArray[np.void]] = field(default_factory=list)
    starts: list[NDArray[np.int32]] = field(default_factory=list)
    floats: list[NDArray[np.float32]] = field(default_factory=list)
    masks: list[NDArray[np.int32]] = field(default_factory=list)
    known: dict[tuple[int, ...], int] = field(default_factory=dict)  # where the mask of some geometry is
    lengths: dict[str, int] = field(default_factory=lambda: {"nonzeros": 0, "starts": 0, "floats": 0, "masks": 0})

    def add(self, table: str, values: NDArray[np.generic]) -> int:
        """Where the values begin in their table."""
        at = self.lengths[table]
        getattr(self, table).append(values)
        self.lengths[table] += len(values)
        return at


@dataclass(frozen=True)
class _Place:
    """An activation in memory. image, row, stride: floats between images, rows, channels; at: of channel 0."""

    shape: tuple[int, ...]
    batch: int
    row: int
    image: int
    stride: int
    lead: int
    tail: int = 0
    at: int = -1

    @property
    def floats(self) -> int:
        """Memory that it takes, with what is read before and behind it."""
        return self.lead + self.shape[0] * self.stride + self.tail

    @property
    def vectors(self) -> int:
        """How much of a stream holds values."""
        if len(self.shape) == 1:
            return -(-self.batch // VECTOR)
        last = (self.batch - 1) * self.image + (self.shape[1] - 1) * self.row + self.shape[2]
        return -(-last // VECTOR)


def program_of(steps: Steps, batch: int) -> Program:
    """The program that runs `batch` images at once.

    Raises:
        ValueError: the activations of so many images take more floats than an offset of 32 bits can tell.
    """
    places, arena = _place_all(steps, batch)
    if arena > np.iinfo(np.int32).max:
        raise ValueError(f"a batch of {batch} images needs {arena} floats for activations: expected less than 2^31")
    tables = _Tables()
    ops = [_pack(steps, places[0], tables)]
    for step in steps.steps:
        ops.extend(_emit(step, steps, places, tables))
    last = places[steps.steps[-1].output]
    ops.append(_record("unpack", {"in": last.at, "in_stride": last.stride, "channels": last.shape[0], "batch": batch}))
    starts = np.concatenate(tables.starts) if tables.starts else np.zeros(0, np.int32)
    nonzeros = np.concatenate(tables.nonzeros) if tables.nonzeros else np.zeros(0, NONZERO)
    masks = np.concatenate(tables.masks) if tables.masks else np.zeros(0, np.int32)
    floats = np.concatenate(tables.floats)
    return Program(np.array(ops, OP), nonzeros, starts, floats, masks, arena, batch, last.shape[0])


def _record(kind: str, values: dict[str, int], low: float = -math.inf, high: float = math.inf) -> tuple[float, ...]:
    defaults = {"kind": KINDS.index(kind), "other": -1}
    return (*(values.get(name, defaults.get(name, 0)) for name in INTEGERS), low, high)


def _round(floats: int) -> int:
    return -(-floats // VECTOR) * VECTOR


def _place(steps: Steps, value: int, batch: int) -> _Place:
    shape = steps.shapes[value]
    if len(shape) == 1:
        return _Place(shape, batch, 1, 1, 1 if batch == 1 else _round(batch), 0)
    layout = steps.layouts[value]
    image = layout.row * layout.rows
    stride = _round(batch * image)
    stride += VECTOR if stride % 256 == 0 else 0  # channels a power of two apart would share their places in the cache
    # a pool reads up to two registers behind its last window
    return _Place(shape, batch, layout.row, image, stride, _round(layout.lead), _round(layout.tail) + 2 * VECTOR)


def _place_all(steps: Steps, batch: int) -> tuple[dict[int, _Place], int]:
    """Place every activation in the arena; return the places by value, and the size of the arena in floats."""
    written = {0: -1} | {step.output: index for index, step in enumerate(steps.steps)}
    reads = [[value for value in (step.source, step.other) if value is not None] for step in steps.steps]
    last = last_reads([*reads, [steps.steps[-1].output]])
    values = sorted(written)
    places = [_place(steps, value, batch) for value in values]
    buffers = [
        Buffer(place.floats, written[value], last.get(value, written[value]))
        for value, place in zip(values, places, strict=True)
    ]
    offsets, size = place_buffers(buffers, alignment=VECTOR)
    moved = [replace(place, at=offset + place.lead) for place, offset in zip(places, offsets, strict=True)]
    return dict(zip(values, moved, strict=True)), size


def _pack(steps: Steps, place: _Place, tables: _Tables) -> tuple[float, ...]:
    values = _geometry(place, place) | {"in": 0, "bias": tables.add("floats", steps.first.T.reshape(-1))}
    return _record("pack", values)


def _geometry(source: _Place, place: _Place) -> dict[str, int]:
    """What most operations need to know of their input and output."""
    found = {"in": source.at, "out": place.at, "lead": place.lead, "batch": place.batch, "channels": place.shape[0]}
    found |= {"in_stride": source.stride, "out_stride": place.stride, "vectors": place.vectors}
    for prefix, each in (("", source), ("out_", place)):
        h, w = each.shape[1:] if len(each.shape) == 3 else (1, 1)
        found |= {f"{prefix}height": h, f"{prefix}width": w, f"{prefix}row": each.row, f"{prefix}image": each.image}
    return found


def _mask(place: _Place, tables: _Tables) -> int:
    """Where -1 for every position that holds a value of the stream, 0 for its padding, begins."""
    key = (*place.shape[1:], place.batch, place.row, place.image, place.vectors)
    if key not in tables.known:
        mask = np.zeros(max(place.batch * place.image, place.vectors * VECTOR), np.int32)
        valid = mask[: place.batch * place.image].reshape(place.batch, -1, place.row)
        h, w = place.shape[1:] if len(place.shape) == 3 else (1, 1)
        valid[:, :h, :w] = -1
        tables.known[key] = tables.add("masks", mask[: place.vectors * VECTOR])
    return tables.known[key]


def _emit(step: Step, steps: Steps, places: dict[int, _Place], tables: _Tables) -> list[tuple[float, ...]]:
    """The records of one step: one, but for `Phases`."""
    source, place, op = places[step.source], places[step.output], step.op
    values = _geometry(source, place)
    if step.other is not None:
        values["other"] = places[step.other].at
    match op:
        case Conv() | Linear() | Diagonal():
            entries = steps.entries[step.output]
            values |= {"bias": tables.add("floats", op.bias)}
            if len(place.shape) == 1 and place.batch == 1:
                return [_record("dot", values | _nonzeros(entries, source, tables), step.low, step.high)]
            values |= {"mask": _mask(place, tables)}
            fours = steps.fours.get(step.output)
            if fours is not None:
                return [_record("convolve_fours", values | _nonzeros(fours, source, tables), step.low, step.high)]
            return [_record("convolve", values | _nonzeros(entries, source, tables), step.low, step.high)]
        case Affine():
            values["bias"] = tables.add("floats", np.stack([op.scale, op.shift], axis=1).reshape(-1))
            return [_record("elementwise", values | {"mask": _mask(place, tables)}, step.low, step.high)]
        case Phases():
            return _phases(op, values | {"channels": source.shape[0]})
        case MaxPool() | AvgPool() | GlobalAvgPool():
            kind = "max_pool" if isinstance(op, MaxPool) else "mean_pool"
            return [_record(kind, values | _window(op, source), step.low, step.high)]
        case Flatten():
            assert not step.clamped
            return [_record("flatten", values | {"channels": source.shape[0]})]
        case _:
            raise AssertionError(op)


def _phases(op: Phases, values: dict[str, int]) -> list[tuple[float, ...]]:
    values |= {"stride_y": op.stride[0], "stride_x": op.stride[1], "kernel_y": len(op.offsets)}
    return [
        _record("phases", values | {"mask": i, "pad_y": y, "pad_x": x, "lead": values["lead"] if i == 0 else 0})
        for i, (y, x) in enumerate(op.offsets)
    ]


def _window(op: MaxPool | AvgPool | GlobalAvgPool, source: _Place) -> dict[str, int]:
    if isinstance(op, GlobalAvgPool):
        kernel, stride, padding, dilation, count = source.shape[1:], (1, 1), (0, 0), (1, 1), 0
    else:
        dilation = op.dilation if isinstance(op, MaxPool) else (1, 1)
        count = int(isinstance(op, AvgPool) and op.count_padding)
        kernel, stride, padding = op.kernel, op.stride, op.padding
    pairs = {"kernel": kernel, "stride": stride, "pad": padding, "dilation": dilation}
    return {f"{k}_{side}": pair[i] for k, pair in pairs.items() for i, side in enumerate("yx")} | {
        "count_padding": count
    }


def _nonzeros(entries: Entries, source: _Place, tables: _Tables) -> dict[str, int]:
    at = tables.lengths["nonzeros"]
    records = np.empty(len(entries.weights), NONZERO)
    records["weight"] = entries.weights
    records["offset"] = entries.channels * source.stride + entries.down * source.row + entries.across
    tables.add("nonzeros", records)
    return {"rows": tables.add("starts", (entries.starts + at).astype(np.int32))}
