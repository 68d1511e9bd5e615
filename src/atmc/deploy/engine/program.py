"""Turn the steps of a network into a program for one batch size: records and tables of numbers that a kernel runs.

Every activation gets a place in one block of memory, the arena; activations that are needed at different times may
share a place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from atmc.deploy.engine.shifts import Diagonal, Polyphase, Taps
from atmc.deploy.engine.steps import LoweredNetwork, Step
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
    """What a kernel runs; native/kernel.cpp defines the operations.

    Args:
        ops: one record `OP` per operation.
        nonzeros: of all layers, with their offsets; starts: where those of each output begin.
        floats: biases, scales and shifts.
        masks: which positions of streams hold values, -1 or 0.
        arena_floats: memory that the activations take.
        batch, classes: the shape of the logits.
    """

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
    """The constants of a program while it is built; lengths: numbers so far in each table."""

    nonzeros: list[NDArray[np.void]] = field(default_factory=list)
    starts: list[NDArray[np.int32]] = field(default_factory=list)
    floats: list[NDArray[np.float32]] = field(default_factory=list)
    masks: list[NDArray[np.int32]] = field(default_factory=list)
    mask_starts: dict[tuple[int, ...], int] = field(default_factory=dict)  # geometry -> where its mask begins
    lengths: dict[str, int] = field(default_factory=lambda: {"nonzeros": 0, "starts": 0, "floats": 0, "masks": 0})

    def add(self, table: str, values: NDArray[np.generic]) -> int:
        """Append values to a table and return where they begin in it."""
        start = self.lengths[table]
        getattr(self, table).append(values)
        self.lengths[table] += len(values)
        return start


@dataclass(frozen=True)
class _Place:
    """Where an activation lies in the arena.

    Args:
        shape: (c, h, w) or (features,); batch: images at once.
        row, image, stride: floats from one row, image, channel to the next.
        lead, tail: floats before and after the activation that are read as zeros.
        offset: where channel 0 begins.
    """

    shape: tuple[int, ...]
    batch: int
    row: int
    image: int
    stride: int
    lead: int
    tail: int = 0
    offset: int = -1

    @property
    def floats(self) -> int:
        """The memory that it takes, with its lead and tail."""
        return self.lead + self.shape[0] * self.stride + self.tail

    @property
    def vectors(self) -> int:
        """The length of a stream up to its last value, in vectors."""
        if len(self.shape) == 1:
            return -(-self.batch // VECTOR)
        last = (self.batch - 1) * self.image + (self.shape[1] - 1) * self.row + self.shape[2]
        return -(-last // VECTOR)


def build_program(network: LoweredNetwork, batch: int) -> Program:
    """Return the program that runs `batch` images at once.

    Raises:
        ValueError: the activations of the batch take more floats than an offset of 32 bits can address.
    """
    places, arena = _place_all(network, batch)
    if arena > np.iinfo(np.int32).max:
        raise ValueError(f"a batch of {batch} images needs {arena} floats for activations: expected less than 2^31")
    tables = _Tables()
    ops = [_pack_record(network, places[0], tables)]
    for step in network.steps:
        ops.extend(_step_records(step, network, places, tables))
    logits = places[network.steps[-1].output]
    classes = logits.shape[0]
    ops.append(
        _record("unpack", {"in": logits.offset, "in_stride": logits.stride, "channels": classes, "batch": batch})
    )
    return Program(
        ops=np.array(ops, OP),
        nonzeros=np.concatenate([np.zeros(0, NONZERO), *tables.nonzeros]),
        starts=np.concatenate([np.zeros(0, np.int32), *tables.starts]),
        floats=np.concatenate(tables.floats),
        masks=np.concatenate([np.zeros(0, np.int32), *tables.masks]),
        arena_floats=arena,
        batch=batch,
        classes=classes,
    )


def _record(kind: str, fields: dict[str, int], low: float = -math.inf, high: float = math.inf) -> tuple[float, ...]:
    defaults = {"kind": KINDS.index(kind), "other": -1}
    return (*(fields.get(name, defaults.get(name, 0)) for name in INTEGERS), low, high)


def _round_up(floats: int) -> int:
    return -(-floats // VECTOR) * VECTOR


def _plan_place(network: LoweredNetwork, value: int, batch: int) -> _Place:
    """Return how an activation lies in memory; its offset is not known yet."""
    shape = network.shapes[value]
    if len(shape) == 1:
        stride = 1 if batch == 1 else _round_up(batch)
        return _Place(shape=shape, batch=batch, row=1, image=1, stride=stride, lead=0)
    layout = network.layouts[value]
    image = layout.row * layout.rows
    stride = _round_up(batch * image)
    stride += VECTOR if stride % 256 == 0 else 0  # channels a power of two apart would share their places in the cache
    return _Place(
        shape=shape,
        batch=batch,
        row=layout.row,
        image=image,
        stride=stride,
        lead=_round_up(layout.lead),
        tail=_round_up(layout.tail) + 2 * VECTOR,  # a pool reads up to two registers past its last window
    )


def _place_all(network: LoweredNetwork, batch: int) -> tuple[dict[int, _Place], int]:
    """Place every activation in the arena; return the places by value, and the size of the arena in floats."""
    written = {0: -1} | {step.output: index for index, step in enumerate(network.steps)}
    reads = [[value for value in (step.source, step.other) if value is not None] for step in network.steps]
    last = last_reads([*reads, [network.steps[-1].output]])
    values = sorted(written)
    places = [_plan_place(network, value, batch) for value in values]
    buffers = [
        Buffer(place.floats, written[value], last.get(value, written[value]))
        for value, place in zip(values, places, strict=True)
    ]
    offsets, size = place_buffers(buffers, alignment=VECTOR)
    placed = [replace(place, offset=offset + place.lead) for place, offset in zip(places, offsets, strict=True)]
    return dict(zip(values, placed, strict=True)), size


def _pack_record(network: LoweredNetwork, place: _Place, tables: _Tables) -> tuple[float, ...]:
    bias = tables.add("floats", network.input_affine.T.reshape(-1))
    return _record("pack", _geometry(place, place) | {"in": 0, "bias": bias})


def _geometry(source: _Place, place: _Place) -> dict[str, int]:
    """Return the fields of a record that describe its input and output."""
    fields = {"in": source.offset, "out": place.offset, "lead": place.lead}
    fields |= {"batch": place.batch, "channels": place.shape[0]}
    fields |= {"in_stride": source.stride, "out_stride": place.stride, "vectors": place.vectors}
    for prefix, end in (("", source), ("out_", place)):
        h, w = end.shape[1:] if len(end.shape) == 3 else (1, 1)
        fields |= {f"{prefix}height": h, f"{prefix}width": w, f"{prefix}row": end.row, f"{prefix}image": end.image}
    return fields


def _add_mask(place: _Place, tables: _Tables) -> int:
    """Return where the mask of a stream begins: -1 at every position that holds a value, 0 in the padding."""
    key = (*place.shape[1:], place.batch, place.row, place.image, place.vectors)
    if key not in tables.mask_starts:
        mask = np.zeros(max(place.batch * place.image, place.vectors * VECTOR), np.int32)
        valid = mask[: place.batch * place.image].reshape(place.batch, -1, place.row)
        h, w = place.shape[1:] if len(place.shape) == 3 else (1, 1)
        valid[:, :h, :w] = -1
        tables.mask_starts[key] = tables.add("masks", mask[: place.vectors * VECTOR])
    return tables.mask_starts[key]


def _step_records(
    step: Step, network: LoweredNetwork, places: dict[int, _Place], tables: _Tables
) -> list[tuple[float, ...]]:
    """Return the records of a step: one per phase for `Polyphase`, else one."""
    source, place, op = places[step.source], places[step.output], step.op
    fields = _geometry(source, place)
    if step.other is not None:
        fields["other"] = places[step.other].offset
    match op:
        case Conv() | Linear() | Diagonal():
            taps, fours = network.taps[step.output], network.fours.get(step.output)
            fields["bias"] = tables.add("floats", op.bias)
            kind = "dot"
            if len(place.shape) == 3 or place.batch > 1:
                fields["mask"] = _add_mask(place, tables)
                kind, taps = ("convolve", taps) if fours is None else ("convolve_fours", fours)
            return [_record(kind, fields | _add_nonzeros(taps, source, tables), step.low, step.high)]
        case Affine():
            fields["bias"] = tables.add("floats", np.stack([op.scale, op.shift], axis=1).reshape(-1))
            return [_record("elementwise", fields | {"mask": _add_mask(place, tables)}, step.low, step.high)]
        case Polyphase():
            return _phase_records(op, fields | {"channels": source.shape[0]})
        case MaxPool() | AvgPool() | GlobalAvgPool():
            kind = "max_pool" if isinstance(op, MaxPool) else "mean_pool"
            return [_record(kind, fields | _window_fields(op, source), step.low, step.high)]
        case Flatten():
            assert not step.clamped
            return [_record("flatten", fields | {"channels": source.shape[0]})]
        case _:
            raise AssertionError(op)


def _phase_records(op: Polyphase, fields: dict[str, int]) -> list[tuple[float, ...]]:
    fields |= {"stride_y": op.stride[0], "stride_x": op.stride[1], "kernel_y": len(op.offsets)}
    return [
        _record("phases", fields | {"mask": i, "pad_y": y, "pad_x": x, "lead": fields["lead"] if i == 0 else 0})
        for i, (y, x) in enumerate(op.offsets)
    ]


def _window_fields(op: MaxPool | AvgPool | GlobalAvgPool, source: _Place) -> dict[str, int]:
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


def _add_nonzeros(taps: Taps, source: _Place, tables: _Tables) -> dict[str, int]:
    first = tables.lengths["nonzeros"]
    records = np.empty(len(taps.weights), NONZERO)
    records["weight"] = taps.weights
    records["offset"] = taps.channels * source.stride + taps.down * source.row + taps.across
    tables.add("nonzeros", records)
    return {"rows": tables.add("starts", (taps.starts + first).astype(np.int32))}
