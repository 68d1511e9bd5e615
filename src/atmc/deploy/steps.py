"""From a graph to the steps that the sparse engine takes: operations fused, strides taken apart, streams laid out.

A stream is what the engine makes of one channel of an activation: all images one after the other, each with `rows`
rows of `row` floats, of which the valid ones come first and the rest are zeros. The zeros behind a row are the padding
right of it and left of the next one, those behind an image the padding below it and above the next one. So a nonzero
weight of a convolution of stride 1 is one shift of the whole input stream, and its output has the same layout. A
convolution of stride s reads the s x s phases of its input (every s-th row and column), in which it has stride 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from atmc.deploy.graph import Add, Affine, Conv, Flatten, GlobalAvgPool, Graph, Linear, MaxPool, Op, Pair, Relu, Shape

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Step:
    """One operation: `low` and `high` clamp what it writes, `other` is a value that is added before.

    phases: of a strided convolution's input, the (row, column) offsets that it holds; of `Phases` steps alone.
    """

    op: Op | Phases
    source: int
    output: int
    other: int | None = None
    low: float = -math.inf
    high: float = math.inf

    @property
    def clamped(self) -> bool:
        """Whether there is an activation already."""
        return (self.low, self.high) != (-math.inf, math.inf)


@dataclass(frozen=True)
class Phases:
    """Every stride-th row and column, begun at each offset (row, column), as channels: channel * len(offsets) + i."""

    stride: Pair
    offsets: tuple[Pair, ...]


@dataclass
class Layout:
    """Of the streams that share one: floats a row, rows an image, and how far before a stream somebody reads."""

    row: int = 1
    rows: int = 1
    lead: int = 0


@dataclass(frozen=True, eq=False)
class Entries:
    """The nonzeros of a layer, sorted by output: row starts (outputs + 1,), weights, input channels, shifts in y and x."""

    starts: Ints
    weights: NDArray[np.float32]
    channels: Ints
    down: Ints
    across: Ints


@dataclass(frozen=True, eq=False)
class Steps:
    """The network as the engine runs it. Value 0 is the images; steps are in order; the last one writes the logits.

    Args:
        shapes: of every value by its number, (c, h, w) or (features,).
        layouts: of every spatial value.
        first: scale and shift (2, c) that the images are given as they are read.
    """

    steps: tuple[Step, ...]
    shapes: dict[int, Shape]
    layouts: dict[int, Layout]
    first: NDArray[np.float32]
    entries: dict[int, Entries] = field(default_factory=dict)  # by output


def steps_of(graph: Graph) -> Steps:
    """Fuse activations, sums and the first normalization into what comes before; lay out every activation.

    Raises:
        ValueError: the graph is not consistent, or does not end in (classes,).
    """
    shapes = dict(enumerate(graph.shapes()))
    if len(shapes[len(graph.nodes)]) != 1:
        raise ValueError(
            f"expected a network that ends in (n, classes), got a value of shape {shapes[len(graph.nodes)]}"
        )
    steps, first, images = _fused(graph)
    steps, shapes = _without_strides(steps, shapes)
    entries = {s.output: entries_of(s.op, _phases_of(s, steps)) for s in steps if isinstance(s.op, Conv | Linear)}
    layouts = _layouts(steps, shapes, entries)
    assert images in shapes
    return Steps(tuple(steps), shapes, layouts, first, entries)


def _fused(graph: Graph) -> tuple[list[Step], NDArray[np.float32], int]:
    """The steps; and what happens to the images first, whose result keeps the number 0."""
    readers = [len(found) for found in graph.consumers()]
    channels = graph.input_shape[0]
    first = np.stack([np.ones(channels, np.float32), np.zeros(channels, np.float32)])
    alias: dict[int, int] = {}  # values that are another one
    steps: list[Step] = []

    def writer(value: int) -> int | None:
        """The step that writes a value nobody else reads."""
        found = [index for index, step in enumerate(steps) if step.output == value]
        return found[0] if found and readers[value] == 1 else None

    shapes = graph.shapes()
    for index, node in enumerate(graph.nodes):
        output, op = index + 1, node.op
        inputs = [alias.get(value, value) for value in node.inputs]
        source = inputs[0]
        before = writer(source)
        if isinstance(op, Affine) and node.inputs == (0,) and readers[0] == 1:
            first = np.stack([op.scale, op.shift]).astype(np.float32)
            alias[output] = 0
        elif isinstance(op, Relu):
            high = math.inf if op.ceiling is None else op.ceiling
            if before is not None and not steps[before].clamped:
                steps[before] = replace(steps[before], output=output, low=0.0, high=high)
            else:
                steps.append(Step(_identity(shapes[output]), source, output, low=0.0, high=high))
        elif isinstance(op, Add):
            steps = _added(steps, inputs, output, writer, shapes[output])
        elif isinstance(op, Affine) and len(shapes[output]) == 1:
            steps.append(Step(Linear(np.diag(op.scale), op.shift), source, output))
        else:
            steps.append(Step(op, source, output))
    return steps, first, 0


def _added(steps: list[Step], inputs: Sequence[int], output: int, writer: object, shape: Shape) -> list[Step]:
    """A sum goes to the last step that writes one of its terms, where that can add; else it is a step of its own."""
    assert callable(writer)
    for value, other in (inputs, inputs[::-1]):
        index = writer(value)
        if index is not None and value != other:
            step = steps[index]
            if isinstance(step.op, Conv | Linear) and step.other is None and not step.clamped:
                return [*steps[:index], *steps[index + 1 :], replace(step, output=output, other=other)]
    return [*steps, Step(_identity(shape), inputs[0], output, other=inputs[1])]


def _identity(shape: Shape) -> Affine | Linear:
    ones, zeros = np.ones(shape[0], np.float32), np.zeros(shape[0], np.float32)
    return Affine(ones, zeros) if len(shape) == 3 else Linear(np.diag(ones), zeros)


def _without_strides(steps: list[Step], shapes: dict[int, Shape]) -> tuple[list[Step], dict[int, Shape]]:
    """Convolutions of stride 1 only, of phases; shapes with those of the new values, whose h, w is the largest phase's."""
    wanted: dict[tuple[int, Pair], set[Pair]] = {}
    for step in steps:
        if isinstance(step.op, Conv) and step.op.stride != (1, 1):
            offsets = wanted.setdefault((step.source, step.op.stride), set())
            offsets |= {(int(y), int(x)) for y, x in _phase_of_taps(step.op).reshape(-1, 2)}
    shapes, made, result = dict(shapes), {}, []
    for step in steps:
        if isinstance(step.op, Conv) and step.op.stride != (1, 1):
            key = step.source, step.op.stride
            if key not in made:
                made[key] = value = max(shapes) + 1
                phases = Phases(step.op.stride, tuple(sorted(wanted[key])))
                c, h, w = shapes[step.source]
                sides = -(-h // phases.stride[0]), -(-w // phases.stride[1])
                shapes[value] = (c * len(phases.offsets), *sides)
                result.append(Step(phases, step.source, value))
            step = replace(step, source=made[key])
        result.append(step)
    return result, shapes


def _phases_of(step: Step, steps: Sequence[Step]) -> Phases | None:
    for other in steps:
        if other.output == step.source and isinstance(other.op, Phases):
            return other.op
    return None


def _phase_of_taps(op: Conv) -> Ints:
    """(kh, kw, 2): which phase each tap of the kernel reads."""
    taps = np.stack(np.meshgrid(*_taps(op), indexing="ij"), axis=-1)
    return taps % np.array(op.stride)


def _taps(op: Conv) -> list[Ints]:
    """Offsets (kh,) and (kw,) of the kernel's rows and columns in the input."""
    sides = zip(op.weight.shape[2:], op.dilation, op.padding, strict=True)
    return [np.arange(k) * d - p for k, d, p in sides]


def entries_of(op: Conv | Linear, phases: Phases | None) -> Entries:
    """The nonzeros of a layer as shifts of its input's streams."""
    if isinstance(op, Linear):
        rows, columns = np.nonzero(op.weight)
        zero = np.zeros(len(rows), np.int64)
        return Entries(_starts(rows, len(op.weight)), op.weight[rows, columns], columns, zero, zero)
    outputs, channels, ky, kx = np.nonzero(op.weight)
    weights = op.weight[outputs, channels, ky, kx]
    per_group = len(op.weight) // op.groups
    channels = channels + outputs // per_group * op.weight.shape[1]
    down, across = (taps[k] for taps, k in zip(_taps(op), (ky, kx), strict=True))
    if phases is not None:
        sy, sx = phases.stride
        number = {offset: i for i, offset in enumerate(phases.offsets)}
        table = np.zeros(phases.stride, np.int64)
        for offset, i in number.items():
            table[offset] = i
        channels = channels * len(number) + table[down % sy, across % sx]
        down, across = down // sy, across // sx
    return Entries(_starts(outputs, len(op.weight)), weights, channels, down, across)


def _starts(rows: Ints, outputs: int) -> Ints:
    return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=outputs))])


def _layouts(steps: Sequence[Step], shapes: dict[int, Shape], entries: dict[int, Entries]) -> dict[int, Layout]:
    """One layout for all values that are shifts of each other, wide enough for every shift."""
    parent = {value: value for value, shape in shapes.items() if len(shape) == 3}

    def find(value: int) -> int:
        while parent[value] != value:
            value = parent[value]
        return value

    for step in steps:
        if isinstance(step.op, Conv | Affine):
            parent[find(step.source)] = find(step.output)
            if step.other is not None:
                parent[find(step.other)] = find(step.output)
    found: dict[int, Layout] = {}
    for value in parent:
        layout = found.setdefault(find(value), Layout())
        layout.rows, layout.row = max(layout.rows, shapes[value][1]), max(layout.row, shapes[value][2])
    reach: dict[int, tuple[int, int]] = {}
    for step in steps:
        if isinstance(step.op, Conv):
            taps = entries[step.output]
            down, across = (_range(taps.down), _range(taps.across))
            (_, hi, wi), (_, ho, wo) = shapes[step.source], shapes[step.output]
            layout = found[find(step.source)]
            layout.rows = max(layout.rows, ho + down[1], hi - down[0])
            layout.row = max(layout.row, wo + across[1], wi - across[0])
            old = reach.get(find(step.source), (0, 0))
            reach[find(step.source)] = min(old[0], down[0]), min(old[1], across[0])
    for root, (down_first, across_first) in reach.items():
        found[root].lead = -down_first * found[root].row - across_first
    return {value: found[find(value)] for value in parent}


def _range(shifts: Ints) -> Pair:
    """The least and the greatest shift, 0 among them."""
    return (min(0, int(shifts.min())), max(0, int(shifts.max()))) if len(shifts) else (0, 0)


__all__ = [
    "Entries",
    "Flatten",
    "GlobalAvgPool",
    "Layout",
    "MaxPool",
    "Phases",
    "Step",
    "Steps",
    "entries_of",
    "steps_of",
]
