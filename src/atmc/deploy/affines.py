"""Affines of a graph multiplied into the layers before or behind them: batch norms and normalizations vanish.

An affine goes back into the convolution or linear layer whose value it alone reads, also through pooling and through a
sum of two such layers. Else it goes on, through flattening and averages, if every operation that reads it can take it:
linear layers and affines always, a convolution with zero padding only a scale, since the padding is not shifted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from atmc.deploy.graph import (
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
from atmc.deploy.operators import wide
from atmc.deploy.rewrite import after, is_padded, reachable, scaled_inputs, scaled_outputs


def fold_affines(graph: Graph) -> Graph:
    """The same network with as few affines as the rules above leave."""
    shapes, consumers = graph.shapes(), graph.consumers()
    consumers[-1].append(len(graph.nodes))  # whoever wants the logits
    nodes: list[Node] = []
    place = [0]  # of each value of the old graph: its number in the new one,
    pending: dict[int, Affine] = {}  # where it is yet to be scaled and shifted, if it is here
    readers = {0: len(consumers[0])}  # of each new value

    def settle(value: int, number: int, owed: Affine | None) -> None:
        """Value `value` is `owed` of the new value `number`."""
        readers[number] = readers[number] - 1 + len(consumers[value]) if number in readers else len(consumers[value])
        if owed is not None and not _is_identity(owed):
            if all(_takes(graph.nodes[index].op, owed) for index in consumers[value] if index < len(graph.nodes)) and (
                value < len(graph.nodes)
            ):
                pending[value] = owed
            else:
                readers[number] -= len(consumers[value]) - 1
                nodes.append(Node(owed, (number,), graph.nodes[value - 1].name))
                number = len(nodes)
                readers[number] = len(consumers[value])
        place.append(number)

    for index, node in enumerate(graph.nodes):
        value, source = index + 1, node.inputs[0]
        owed = pending.get(source)
        if isinstance(node.op, Affine):
            changed = None if owed else _absorbed(nodes, readers, place[source], node.op)
            for number, op in (changed or {}).items():
                nodes[number - 1] = Node(op, nodes[number - 1].inputs, nodes[number - 1].name)
            settle(value, place[source], None if changed else after(owed, node.op) if owed else node.op)
            continue
        done: Op = node.op
        if owed and isinstance(done, Conv | Linear):
            done, owed = scaled_inputs(done, owed.scale, owed.shift), None
        elif owed:
            owed = _behind(owed, done, shapes[source])
        nodes.append(Node(done, tuple(place[read] for read in node.inputs), node.name))
        settle(value, len(nodes), owed)
    return reachable(graph.input_shape, nodes, place[-1])


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
