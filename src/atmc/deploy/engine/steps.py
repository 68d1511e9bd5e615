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
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from atmc.deploy.engine.shifts import Diagonal, Entries, Phases, entries_of, in_fours, phase_of_taps, range_of
from atmc.deploy.graph.graph import Add, Affine, Conv, Flatten, Graph, Linear, Op, Pair, Relu, Shape
from atmc.deploy.graph.rewrite import remove_dead_nodes


@dataclass(frozen=True, eq=False)
class Step:
    """One operation: `low` and `high` clamp what it writes, `other` is a value that is added before.

    phases: of a strided convolution's input, the (row, column) offsets that it holds; of `Phases` steps alone.
    """

    op: Op | Phases | Diagonal
    source: int
    output: int
    other: int | None = None
    low: float = -math.inf
    high: float = math.inf

    @property
    def clamped(self) -> bool:
        """Whether there is an activation already."""
        return (self.low, self.high) != (-math.inf, math.inf)


@dataclass
class Layout:
    """Of the streams that share one: floats a row, rows an image, and how far before and behind them somebody reads."""

    row: int = 1
    rows: int = 1
    lead: int = 0
    tail: int = 0


@dataclass(frozen=True, eq=False)
class Steps:
    """The network as the engine runs it. Value 0 is the images; steps are in order; the last one writes the logits.

    Args:
        shapes: of every value by its number, (c, h, w) or (features,).
        layouts: of every spatial value.
        first: scale and shift (2, c) that the images are given as they are read.
        entries: of the layer that computes a value.
        fours: the same, where it pays to take four outputs together (`in_fours`).
    """

    steps: tuple[Step, ...]
    shapes: dict[int, Shape]
    layouts: dict[int, Layout]
    first: NDArray[np.float32]
    entries: dict[int, Entries]
    fours: dict[int, Entries]


def steps_of(graph: Graph, *, four_cost: float = math.inf) -> Steps:
    """Fuse activations, sums and the first normalization into what comes before; lay out every activation.

    Args:
        four_cost: of a tap of four outputs together, in taps of one output, on the kernel that is to run them.

    Raises:
        ValueError: the graph is not consistent, or does not end in (classes,).
    """
    graph = remove_dead_nodes(graph)
    shapes = dict(enumerate(graph.shapes()))
    if len(shapes[len(graph.nodes)]) != 1:
        raise ValueError(
            f"expected a network that ends in (n, classes), got a value of shape {shapes[len(graph.nodes)]}"
        )
    fused, first = _fused(graph)
    steps, shapes = _without_strides(fused, shapes)
    layers = ((s.output, s.op, _phases_of(s, steps)) for s in steps if isinstance(s.op, Conv | Linear | Diagonal))
    entries = {value: entries_of(op, phases) for value, op, phases in layers}
    layouts = _layouts(steps, shapes, entries)
    fours = {value: found for value, each in entries.items() if (found := in_fours(each, four_cost)) is not None}
    return Steps(tuple(steps), shapes, layouts, first, entries, fours)


def _fused(graph: Graph) -> tuple[list[Step], NDArray[np.float32]]:
    """The steps; and scale and shift of the images, which keep the number 0 after it."""
    shapes, readers = graph.shapes(), [len(found) for found in graph.consumers()]
    channels = graph.input_shape[0]
    first = np.stack([np.ones(channels, np.float32), np.zeros(channels, np.float32)])
    steps: list[Step] = []
    normalized = None  # the value that stands for the images once they are scaled and shifted
    for output, node in enumerate(graph.nodes, start=1):
        op, inputs = node.op, [0 if value == normalized else value for value in node.inputs]
        if isinstance(op, Affine) and node.inputs == (0,) and readers[0] == 1:
            first, normalized = np.stack([op.scale, op.shift]).astype(np.float32), output
        elif isinstance(op, Relu):
            _activate(steps, readers, inputs[0], output, op, shapes[output])
        elif isinstance(op, Add):
            _add(steps, readers, inputs, output, shapes[output])
        elif isinstance(op, Affine) and len(shapes[output]) == 1:
            steps.append(Step(Diagonal(op.scale, op.shift), inputs[0], output))
        else:
            steps.append(Step(op, inputs[0], output))
    return steps, first


def _writer(steps: Sequence[Step], readers: Sequence[int], value: int) -> int | None:
    """Which step writes a value that has one reader and no activation yet."""
    for index, step in enumerate(steps):
        if step.output == value and readers[value] == 1 and not step.clamped:
            return index
    return None


def _activate(steps: list[Step], readers: Sequence[int], value: int, output: int, op: Relu, shape: Shape) -> None:
    """An activation goes to the step that writes its input, where that can clamp; else it is a step of its own."""
    high = math.inf if op.ceiling is None else op.ceiling
    before = _writer(steps, readers, value)
    if before is not None and not isinstance(steps[before].op, Flatten):
        steps[before] = replace(steps[before], output=output, low=0.0, high=high)
    else:
        steps.append(Step(_identity(shape), value, output, low=0.0, high=high))


def _add(steps: list[Step], readers: Sequence[int], terms: Sequence[int], output: int, shape: Shape) -> None:
    """A sum goes to a step that writes one of its terms, moved to here, where that can add; else to one of its own."""
    for value, other in (terms, terms[::-1]):
        index = _writer(steps, readers, value)
        step = None if index is None or value == other else steps[index]
        if step is not None and isinstance(step.op, Conv | Linear | Diagonal) and step.other is None:
            steps.remove(step)
            steps.append(replace(step, output=output, other=other))
            return
    steps.append(Step(_identity(shape), terms[0], output, other=terms[1]))


def _identity(shape: Shape) -> Affine | Diagonal:
    ones, zeros = np.ones(shape[0], np.float32), np.zeros(shape[0], np.float32)
    return Affine(ones, zeros) if len(shape) == 3 else Diagonal(ones, zeros)


def _without_strides(steps: list[Step], shapes: dict[int, Shape]) -> tuple[list[Step], dict[int, Shape]]:
    """Convolutions of stride 1 only, of phases; shapes with the new values', whose h, w is the largest phase's."""
    wanted: dict[tuple[int, Pair], set[Pair]] = {}
    for step in steps:
        if isinstance(step.op, Conv) and step.op.stride != (1, 1):
            offsets = wanted.setdefault((step.source, step.op.stride), set())
            offsets |= {(int(y), int(x)) for y, x in phase_of_taps(step.op).reshape(-1, 2)}
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
    reach: dict[int, list[tuple[Pair, Pair]]] = {}
    for step in steps:
        if isinstance(step.op, Conv):
            taps = entries[step.output]
            down, across = (range_of(taps.down), range_of(taps.across))
            (_, hi, wi), (_, ho, wo) = shapes[step.source], shapes[step.output]
            layout = found[find(step.source)]
            layout.rows = max(layout.rows, ho + down[1], hi - down[0])
            layout.row = max(layout.row, wo + across[1], wi - across[0])
            reach.setdefault(find(step.source), []).append((down, across))
    for root, pairs in reach.items():
        row = found[root].row
        found[root].lead = max(-down[0] * row - across[0] for down, across in pairs)
        found[root].tail = max(down[1] * row + across[1] for down, across in pairs)
    return {value: found[find(value)] for value in parent}
