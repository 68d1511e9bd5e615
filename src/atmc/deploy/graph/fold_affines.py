"""Affines of a graph multiplied into the layers before or behind them: batch norms and normalizations vanish.

An affine goes back into the convolution or linear layer whose value it alone reads, also through pooling and through a
sum of two such layers. Else it goes on, through flattening and averages, if every operation that reads it can take it:
linear layers and affines always, a convolution with zero padding only a scale, since the padding is not shifted.
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
from atmc.deploy.graph.operators import wide
from atmc.deploy.graph.rewrite import after, is_padded, remove_dead_nodes, scaled_inputs, scaled_outputs


@dataclass
class _Folding:
    """A graph on its way. Values of the old graph are the new ones at `place`, scaled and shifted by what is `owed`."""

    graph: Graph
    consumers: list[list[int]]
    nodes: list[Node]
    place: list[int]
    owed: dict[int, Affine]
    readers: dict[int, int]  # how many operations read each new value

    def settle(self, number: int, owed: Affine | None) -> None:
        """The next old value is new value `number`, and what is owed: left to those that read it, or done now."""
        value = len(self.place)
        count = len(self.consumers[value])
        self.readers[number] = self.readers.get(number, 1) - 1 + count
        if owed is not None and not _is_identity(owed):
            if value < len(self.graph.nodes) and all(
                _takes(self.graph.nodes[index].op, owed) for index in self.consumers[value]
            ):
                self.owed[value] = owed
            else:
                self.readers[number] -= count - 1
                number = self.append(owed, (number,), self.graph.nodes[value - 1].name)
                self.readers[number] = count
        self.place.append(number)

    def append(self, op: Op, inputs: tuple[int, ...], name: str) -> int:
        self.nodes.append(Node(op, inputs, name))
        return len(self.nodes)


def fold_affines(graph: Graph) -> Graph:
    """The same network with as few affines as the rules above leave."""
    shapes, consumers = graph.shapes(), graph.consumers()
    consumers[-1].append(len(graph.nodes))  # whoever wants the logits
    new = _Folding(graph, consumers, [], [0], {}, {0: len(consumers[0])})
    for node in graph.nodes:
        source, op = node.inputs[0], node.op
        owed = new.owed.get(source)
        if isinstance(op, Affine):
            changed = None if owed else _absorbed(new.nodes, new.readers, new.place[source], op)
            for number, better in (changed or {}).items():
                new.nodes[number - 1] = replace(new.nodes[number - 1], op=better)
            new.settle(new.place[source], None if changed else after(owed, op) if owed else op)
            continue
        if owed and isinstance(op, Conv | Linear):
            op, owed = scaled_inputs(op, owed.scale, owed.shift), None
        elif owed:
            owed = _behind(owed, op, shapes[source])
        new.settle(new.append(op, tuple(new.place[value] for value in node.inputs), node.name), owed)
    return remove_dead_nodes(Graph(graph.input_shape, tuple(new.nodes)), new.place[-1])


def _is_identity(affine: Affine) -> bool:
    return bool((affine.scale == 1).all() and not affine.shift.any())


def _counts_zeros(pool: AvgPool) -> bool:
    return pool.count_padding and pool.padding != (0, 0)


def _takes(op: Op, affine: Affine) -> bool:
    """Whether an operation can have its input scaled and shifted by itself, or after it."""
    match op:
        case Conv() | Linear():
            return not (is_padded(op) and affine.shift.any())
        case AvgPool():
            return not (_counts_zeros(op) and affine.shift.any())
        case Affine() | GlobalAvgPool() | Flatten():
            return True
    return False


def _behind(affine: Affine, op: Op, shape: Shape) -> Affine:
    """What is left to do after an operation, of (c, h, w) or (features,), that was given its input as it is."""
    if not isinstance(op, Flatten) or len(shape) == 1:
        return affine
    area = int(np.prod(shape[1:]))
    return Affine(np.repeat(affine.scale, area), np.repeat(affine.shift, area))


def _absorbed(nodes: Sequence[Node], readers: Mapping[int, int], value: int, affine: Affine) -> dict[int, Op] | None:
    """Value -> its new operation, so that `value` becomes affine of itself; None where that cannot be."""
    if value == 0 or readers[value] != 1:
        return None
    node = nodes[value - 1]
    match node.op:
        case Conv() | Linear():
            return {value: scaled_outputs(node.op, affine.scale, affine.shift)}
        case Affine():
            return {value: after(node.op, affine)}
        case GlobalAvgPool():
            return _absorbed(nodes, readers, node.inputs[0], affine)
        case AvgPool() if not (_counts_zeros(node.op) and affine.shift.any()):
            return _absorbed(nodes, readers, node.inputs[0], affine)
        case MaxPool() if (affine.scale >= 0).all():
            return _absorbed(nodes, readers, node.inputs[0], affine)
        case Add():
            first = _absorbed(nodes, readers, node.inputs[0], affine)
            second = _absorbed(nodes, readers, node.inputs[1], Affine(affine.scale, wide(0 * affine.shift)))
            return None if first is None or second is None else first | second
    return None
