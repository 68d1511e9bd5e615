"""Turn a graph into the steps of the sparse engine: fuse operations, split strides, lay out streams.

A stream is one channel of an activation in memory: all images one after the other, each with `rows` rows of `row`
floats, of which the valid ones come first and the rest are zeros. The zeros after a row are the padding to its right
and to the left of the next row; those after an image are the padding below it and above the next one. So a nonzero
weight of a convolution of stride 1 is one shift of the whole input stream, and the output has the same layout. A
convolution of stride s reads the s x s phases of its input (every s-th row and column); on these its stride is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from atmc.deploy.engine.shifts import Diagonal, Polyphase, Taps, find_taps, group_in_fours, phase_of_taps, shift_range
from atmc.deploy.graph.graph import Add, Affine, Conv, Flatten, FloatArray, Graph, Linear, Op, Pair, Relu, Shape
from atmc.deploy.graph.rewrite import remove_dead_nodes


@dataclass(frozen=True, eq=False)
class Step:
    """One operation: output = clamp(op(source) + other, low, high).

    Args:
        op: what is computed.
        source, output: the values that it reads and writes.
        other: a value that is added, if any.
    """

    op: Op | Polyphase | Diagonal
    source: int
    output: int
    other: int | None = None
    low: float = -math.inf
    high: float = math.inf

    @property
    def clamped(self) -> bool:
        """Whether an activation was fused into the step."""
        return (self.low, self.high) != (-math.inf, math.inf)


@dataclass
class StreamLayout:
    """The layout of streams: floats per row, rows per image, and how many floats before and after them are read."""

    row: int = 1
    rows: int = 1
    lead: int = 0
    tail: int = 0


@dataclass(frozen=True, eq=False)
class LoweredNetwork:
    """A network as the engine runs it, for any batch size. Value 0 is the images; the last step writes the logits.

    Args:
        steps: in the order in which they run.
        shapes: of every value by its number, (c, h, w) or (features,).
        layouts: of every spatial value.
        input_affine: scale and shift (2, c) that are applied to the images as they are read.
        taps: of the layer that computes a value.
        fours: the same in groups of four outputs (`group_in_fours`), for layers in which that is faster.
    """

    steps: tuple[Step, ...]
    shapes: dict[int, Shape]
    layouts: dict[int, StreamLayout]
    input_affine: FloatArray
    taps: dict[int, Taps]
    fours: dict[int, Taps]


def lower(graph: Graph, *, four_cost: float = math.inf) -> LoweredNetwork:
    """Fuse activations, sums and the normalization of images into the steps before them; lay out every activation.

    Args:
        four_cost: cost of a tap of four outputs, in taps of one output, on the kernel that will run the network.

    Raises:
        ValueError: the graph is not consistent, or does not end in (classes,).
    """
    graph = remove_dead_nodes(graph)
    shapes = dict(enumerate(graph.shapes()))
    if len(shapes[len(graph.nodes)]) != 1:
        raise ValueError(
            f"expected a network that ends in (n, classes), got a value of shape {shapes[len(graph.nodes)]}"
        )
    fused, input_affine = _fuse(graph)
    steps, shapes = _split_strides(fused, shapes)
    splits = {step.output: step.op for step in steps if isinstance(step.op, Polyphase)}
    taps = {
        step.output: find_taps(step.op, splits.get(step.source))
        for step in steps
        if isinstance(step.op, Conv | Linear | Diagonal)
    }
    grouped = {value: group_in_fours(layer_taps, four_cost) for value, layer_taps in taps.items()}
    return LoweredNetwork(
        steps=tuple(steps),
        shapes=shapes,
        layouts=_lay_out(steps, shapes, taps),
        input_affine=input_affine,
        taps=taps,
        fours={value: fours for value, fours in grouped.items() if fours is not None},
    )


def _fuse(graph: Graph) -> tuple[list[Step], FloatArray]:
    """Return the steps, and scale and shift (2, c) of the images; the normalized images keep the number 0."""
    shapes, reader_counts = graph.shapes(), [len(readers) for readers in graph.consumers()]
    channels = graph.input_shape[0]
    input_affine = np.stack([np.ones(channels, np.float32), np.zeros(channels, np.float32)])
    steps: list[Step] = []
    normalized = None  # the value that is the images, scaled and shifted
    for output, node in enumerate(graph.nodes, start=1):
        op, inputs = node.op, [0 if value == normalized else value for value in node.inputs]
        if isinstance(op, Affine) and node.inputs == (0,) and reader_counts[0] == 1:
            input_affine, normalized = np.stack([op.scale, op.shift]).astype(np.float32), output
        elif isinstance(op, Relu):
            _fuse_relu(steps, reader_counts, inputs[0], output, op, shapes[output])
        elif isinstance(op, Add):
            _fuse_sum(steps, reader_counts, inputs, output, shapes[output])
        elif isinstance(op, Affine) and len(shapes[output]) == 1:
            steps.append(Step(Diagonal(op.scale, op.shift), inputs[0], output))
        else:
            steps.append(Step(op, inputs[0], output))
    return steps, input_affine


def _find_writer(steps: Sequence[Step], reader_counts: Sequence[int], value: int) -> int | None:
    """Return the index of the step that writes a value, if the value has one reader and no activation yet."""
    for index, step in enumerate(steps):
        if step.output == value and reader_counts[value] == 1 and not step.clamped:
            return index
    return None


def _fuse_relu(
    steps: list[Step], reader_counts: Sequence[int], value: int, output: int, op: Relu, shape: Shape
) -> None:
    """Fuse an activation into the step that writes its input if that step can clamp; else append a step for it."""
    high = math.inf if op.ceiling is None else op.ceiling
    writer = _find_writer(steps, reader_counts, value)
    if writer is not None and not isinstance(steps[writer].op, Flatten):
        steps[writer] = replace(steps[writer], output=output, low=0.0, high=high)
    else:
        steps.append(Step(_identity(shape), value, output, low=0.0, high=high))


def _fuse_sum(steps: list[Step], reader_counts: Sequence[int], terms: Sequence[int], output: int, shape: Shape) -> None:
    """Fuse a sum into the step that writes one of its terms, moved to the end, if it can add; else append a step."""
    for value, other in (terms, terms[::-1]):
        index = _find_writer(steps, reader_counts, value)
        step = None if index is None or value == other else steps[index]
        if step is not None and isinstance(step.op, Conv | Linear | Diagonal) and step.other is None:
            steps.remove(step)
            steps.append(replace(step, output=output, other=other))
            return
    steps.append(Step(_identity(shape), terms[0], output, other=terms[1]))


def _identity(shape: Shape) -> Affine | Diagonal:
    ones, zeros = np.ones(shape[0], np.float32), np.zeros(shape[0], np.float32)
    return Affine(ones, zeros) if len(shape) == 3 else Diagonal(ones, zeros)


def _split_strides(steps: list[Step], shapes: dict[int, Shape]) -> tuple[list[Step], dict[int, Shape]]:
    """Let strided convolutions read the phases of their input, on which their stride is 1.

    Returns:
        the steps, those that split a value into phases among them; and the shapes with those of the values split, whose
        height and width are those of the largest phase.
    """
    offsets: dict[tuple[int, Pair], set[Pair]] = {}
    for step in steps:
        if isinstance(step.op, Conv) and step.op.stride != (1, 1):
            read = {(int(y), int(x)) for y, x in phase_of_taps(step.op).reshape(-1, 2)}
            offsets.setdefault((step.source, step.op.stride), set()).update(read)
    shapes, split_values, result = dict(shapes), dict[tuple[int, Pair], int](), []
    for step in steps:
        if isinstance(step.op, Conv) and step.op.stride != (1, 1):
            key = step.source, step.op.stride
            if key not in split_values:
                split_values[key] = value = max(shapes) + 1
                polyphase = Polyphase(step.op.stride, tuple(sorted(offsets[key])))
                c, h, w = shapes[step.source]
                sides = -(-h // polyphase.stride[0]), -(-w // polyphase.stride[1])
                shapes[value] = (c * len(polyphase.offsets), *sides)
                result.append(Step(polyphase, step.source, value))
            step = replace(step, source=split_values[key])
        result.append(step)
    return result, shapes


def _lay_out(steps: Sequence[Step], shapes: dict[int, Shape], taps: dict[int, Taps]) -> dict[int, StreamLayout]:
    """Return one layout for all values that are shifts of each other, wide enough for every shift."""
    parent = {value: value for value, shape in shapes.items() if len(shape) == 3}

    def root(value: int) -> int:
        while parent[value] != value:
            value = parent[value]
        return value

    for step in steps:
        if isinstance(step.op, Conv | Affine):
            parent[root(step.source)] = root(step.output)
            if step.other is not None:
                parent[root(step.other)] = root(step.output)
    layouts: dict[int, StreamLayout] = {}
    for value in parent:
        layout = layouts.setdefault(root(value), StreamLayout())
        layout.rows, layout.row = max(layout.rows, shapes[value][1]), max(layout.row, shapes[value][2])
    ranges: dict[int, list[tuple[Pair, Pair]]] = {}
    for step in steps:
        if isinstance(step.op, Conv):
            down, across = shift_range(taps[step.output].down), shift_range(taps[step.output].across)
            (_, hi, wi), (_, ho, wo) = shapes[step.source], shapes[step.output]
            layout = layouts[root(step.source)]
            layout.rows = max(layout.rows, ho + down[1], hi - down[0])
            layout.row = max(layout.row, wo + across[1], wi - across[0])
            ranges.setdefault(root(step.source), []).append((down, across))
    for value, pairs in ranges.items():
        row = layouts[value].row
        layouts[value].lead = max(-down[0] * row - across[0] for down, across in pairs)
        layouts[value].tail = max(down[1] * row + across[1] for down, across in pairs)
    return {value: layouts[root(value)] for value in parent}
