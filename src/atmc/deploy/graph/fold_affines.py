"""Fold the affines of a graph into the layers before or after them, so that batch norms and normalizations disappear.

An affine is folded back into the convolution or linear layer before it if nothing else reads that layer's value, also
through pooling and through a sum of two such layers. Otherwise it is pushed forward, through flattening and averages,
if every operation that reads it can take it: linear layers and affines always can, a convolution with zero padding
takes a scale only, since the padding is not shifted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from atmc.deploy.graph.graph import (
    Add,
    Affine,
    AvgPool,
    Conv,
    Flatten,
    GlobalAvgPool,
    Graph,
    Linear,
    MaxPool,
    Node,
    Op,
    Shape,
)
from atmc.deploy.graph.operators import to_float64
from atmc.deploy.graph.rewrite import compose, is_padded, remove_dead_nodes, scale_inputs, scale_outputs


@dataclass
class _Folding:
    """A graph that is being rewritten.

    Args:
        graph, consumers: the old graph, and for each of its values the operations that read it.
        nodes: of the new graph.
        number: of every old value so far, the new value that stands in its place.
        pending: of an old value, the affine that turns the new value into it and that its readers still have to take.
        reader_counts: how many operations read each new value.
    """

    graph: Graph
    consumers: list[list[int]]
    nodes: list[Node]
    number: list[int]
    pending: dict[int, Affine]
    reader_counts: dict[int, int]

    def settle(self, number: int, affine: Affine | None) -> None:
        """Let the next old value be affine(new value `number`); its readers take the affine if all of them can."""
        value = len(self.number)
        count = len(self.consumers[value])
        self.reader_counts[number] = self.reader_counts.get(number, 1) - 1 + count
        if affine is not None and not _is_identity(affine):
            if value < len(self.graph.nodes) and all(
                _can_take(self.graph.nodes[index].op, affine) for index in self.consumers[value]
            ):
                self.pending[value] = affine
            else:
                self.reader_counts[number] -= count - 1
                number = self.append(affine, (number,), self.graph.nodes[value - 1].name)
                self.reader_counts[number] = count
        self.number.append(number)

    def append(self, op: Op, inputs: tuple[int, ...], name: str) -> int:
        """Append a node and return the number of its value."""
        self.nodes.append(Node(op, inputs, name))
        return len(self.nodes)


def fold_affines(graph: Graph) -> Graph:
    """Return the same network with as few affines as the rules of this module leave."""
    shapes, consumers = graph.shapes(), graph.consumers()
    consumers[-1].append(len(graph.nodes))  # the caller reads the logits
    new = _Folding(
        graph=graph, consumers=consumers, nodes=[], number=[0], pending={}, reader_counts={0: len(consumers[0])}
    )
    for node in graph.nodes:
        source, op = node.inputs[0], node.op
        pending = new.pending.get(source)
        if isinstance(op, Affine):
            changed = None if pending else _fold_back(new.nodes, new.reader_counts, new.number[source], op)
            for number, folded in (changed or {}).items():
                new.nodes[number - 1] = replace(new.nodes[number - 1], op=folded)
            new.settle(new.number[source], None if changed else compose(pending, op) if pending else op)
            continue
        if pending and isinstance(op, Conv | Linear):
            op, pending = scale_inputs(op, pending.scale, pending.shift), None
        elif pending:
            pending = _push_through(pending, op, shapes[source])
        new.settle(new.append(op, tuple(new.number[value] for value in node.inputs), node.name), pending)
    return remove_dead_nodes(Graph(graph.input_shape, tuple(new.nodes)), new.number[-1])


def _is_identity(affine: Affine) -> bool:
    return bool((affine.scale == 1).all() and not affine.shift.any())


def _counts_zeros(pool: AvgPool) -> bool:
    return pool.count_padding and pool.padding != (0, 0)


def _can_take(op: Op, affine: Affine) -> bool:
    """Return whether an affine of an operation's input can be folded into it or applied after it instead."""
    match op:
        case Conv() | Linear():
            return not (is_padded(op) and affine.shift.any())
        case AvgPool():
            return not (_counts_zeros(op) and affine.shift.any())
        case Affine() | GlobalAvgPool() | Flatten():
            return True
    return False


def _push_through(affine: Affine, op: Op, shape: Shape) -> Affine:
    """Return the affine that, applied after an operation, does what this one does to its input of that shape."""
    if not isinstance(op, Flatten) or len(shape) == 1:
        return affine
    area = int(np.prod(shape[1:]))
    return Affine(np.repeat(affine.scale, area), np.repeat(affine.shift, area))


def _fold_back(
    nodes: Sequence[Node], reader_counts: Mapping[int, int], value: int, affine: Affine
) -> dict[int, Op] | None:
    """Return the operations, by value, with which `value` becomes affine(value); None if it cannot be folded."""
    if value == 0 or reader_counts[value] != 1:
        return None
    node = nodes[value - 1]
    match node.op:
        case Conv() | Linear():
            return {value: scale_outputs(node.op, affine.scale, affine.shift)}
        case Affine():
            return {value: compose(node.op, affine)}
        case GlobalAvgPool():
            return _fold_back(nodes, reader_counts, node.inputs[0], affine)
        case AvgPool() if not (_counts_zeros(node.op) and affine.shift.any()):
            return _fold_back(nodes, reader_counts, node.inputs[0], affine)
        case MaxPool() if (affine.scale >= 0).all():
            return _fold_back(nodes, reader_counts, node.inputs[0], affine)
        case Add():
            scale_only = Affine(affine.scale, to_float64(0 * affine.shift))
            first = _fold_back(nodes, reader_counts, node.inputs[0], affine)
            second = _fold_back(nodes, reader_counts, node.inputs[1], scale_only)
            return None if first is None or second is None else first | second
    return None
