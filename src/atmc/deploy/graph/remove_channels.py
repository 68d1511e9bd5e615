"""Channels that carry nothing, taken out of a graph.

Bounds of every channel's values, whatever the images, follow the graph forward: where both are equal the channel is
constant (its weights are zero, or its ReLU never lets anything through). Constants go into the biases behind them. What
is read follows the graph backward: rows whose output nobody reads become zero. Channels of which no weight reads
anything any more then leave all values that share them: those that an addition, a pooling or a depthwise convolution
ties. A constant other than 0 stays where zero padding comes in beside it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from atmc.deploy.graph.bounds import Bounds, bounds
from atmc.deploy.graph.graph import Add, Affine, Conv, Flatten, Floats, Graph, Linear, Node, Op, Relu
from atmc.deploy.graph.operators import wide
from atmc.deploy.graph.rewrite import Layer, groups, inputs, is_padded, remove_dead_nodes, scaled_inputs

Mask = NDArray[np.bool_]


def simplify_channels(graph: Graph) -> Graph:
    """The same network without its dead channels."""
    return _without_unread(_without_unneeded(_with_constants(graph)))


def _with_constants(graph: Graph) -> Graph:
    """Constants in the biases of what reads them; additions of a constant and ReLUs that do nothing gone."""
    found = bounds(graph)
    nodes: list[Node] = []
    place = [0]
    for node, (low, high) in zip(graph.nodes, found[1:], strict=True):
        op: Op = node.op
        given = [found[value] for value in node.inputs]
        read = [place[value] for value in node.inputs]
        if isinstance(op, Conv | Linear):
            op = _with_constant_outputs(_without_constant_inputs(op, *given[0]), low, high)
        elif isinstance(op, Relu) and _does_nothing(op, given[0]):
            place.append(read[0])
            continue
        elif isinstance(op, Add):
            for side, other in ((0, 1), (1, 0)):
                least, most = given[side]
                if (least == most).all():
                    op, read = Affine(wide(np.ones(len(least))), least), [read[other]]
                    break
        nodes.append(Node(op, tuple(read), node.name))
        place.append(len(nodes))
    return remove_dead_nodes(Graph(graph.input_shape, tuple(nodes)), place[-1])


def _does_nothing(relu: Relu, given: Bounds) -> bool:
    low, high = given
    return bool((low >= 0).all() and (relu.ceiling is None or (high <= relu.ceiling).all()))


def _without_constant_inputs(layer: Layer, low: Floats, high: Floats) -> Layer:
    constant = (low == high) & ~(is_padded(layer) & (low != 0))
    if not (constant & _reads(layer, None)).any():
        return layer
    return scaled_inputs(layer, wide(~constant), wide(np.where(constant, low, 0)))


def _with_constant_outputs(layer: Layer, low: Floats, high: Floats) -> Layer:
    return _with_rows_set(layer, low == high, low)


def _with_rows_set(layer: Layer, rows: Mask, values: Floats) -> Layer:
    """The layer with the outputs of `rows` always at `values`."""
    if not (rows & layer.weight.any(axis=tuple(range(1, layer.weight.ndim)))).any():
        return layer
    kept = (~rows).reshape((-1,) + (1,) * (layer.weight.ndim - 1))
    return replace(layer, weight=layer.weight * kept, bias=wide(np.where(rows, values, layer.bias)))


def _reads(layer: Layer, outputs: Mask | None) -> Mask:
    """(inputs,): which of them some weight of these outputs, or of all, reads."""
    used = layer.weight.any(axis=tuple(range(2, layer.weight.ndim)))
    if outputs is not None:
        used = used & outputs[:, None]
    parts = used.reshape(groups(layer), -1, layer.weight.shape[1])
    return cast(Mask, parts.any(axis=1).reshape(-1))


def _without_unneeded(graph: Graph) -> Graph:
    """Zero rows where nothing reads the output, which is then some value within its bounds."""
    found = bounds(graph)
    needed: list[Mask] = [np.zeros(len(low), dtype=bool) for low, _ in found]
    needed[-1][:] = True
    for index in range(len(graph.nodes) - 1, -1, -1):
        node, (low, high) = graph.nodes[index], found[index + 1]
        wanted = needed[index + 1] & (low != high)
        for value in node.inputs:
            if isinstance(node.op, Conv | Linear):
                needed[value] |= _reads(node.op, wanted)
            elif isinstance(node.op, Flatten):
                needed[value] |= wanted.reshape(len(needed[value]), -1).any(axis=1)
            else:
                needed[value] |= wanted
    nodes = []
    for index, node in enumerate(graph.nodes):
        op: Op = node.op
        if isinstance(op, Conv | Linear):
            low, high = found[index + 1]
            op = _with_rows_set(op, ~needed[index + 1], cast(Floats, np.clip(0.0, low, high)))
        nodes.append(Node(op, node.inputs, node.name))
    return Graph(graph.input_shape, tuple(nodes))


def _without_unread(graph: Graph) -> Graph:
    """Channels that no weight reads leave every value of their family."""
    channels = [shape[0] for shape in graph.shapes()]
    families, units, fixed = _families(graph, channels)
    read = {family: np.zeros(units[family], dtype=bool) for family in set(families) - fixed}
    for node in graph.nodes:
        family = families[node.inputs[0]]
        if isinstance(node.op, Conv | Linear) and not _is_depthwise(node.op) and family in read:
            read[family] |= _reads(node.op, None).reshape(units[family], -1).any(axis=1)
    for mask in read.values():
        mask[0] |= not mask.any()  # a value keeps one channel at least
    kept = [
        np.repeat(read[family], count // units[family]) if family in read else np.ones(count, dtype=bool)
        for family, count in zip(families, channels, strict=True)
    ]
    nodes = [
        Node(_cut(node.op, kept[node.inputs[0]], kept[index + 1]), node.inputs, node.name)
        for index, node in enumerate(graph.nodes)
    ]
    return Graph(graph.input_shape, tuple(nodes))


def _is_depthwise(layer: Layer) -> bool:
    return groups(layer) > 1 and groups(layer) == inputs(layer) == len(layer.weight)


def _families(graph: Graph, channels: list[int]) -> tuple[list[int], list[int], set[int]]:
    """Values that have their channels in common, as the number of one of them, for each value.

    Also for each value how many channels can leave its family one by one (of a flattened value those before it was
    flattened), and the families that none may leave: the images, the logits, and both sides of a grouped convolution.
    """
    parents, units = [0], [channels[0]]
    fixed = {0, len(graph.nodes)}

    def root(value: int) -> int:
        while parents[value] != value:
            value = parents[value]
        return value

    for value, node in enumerate(graph.nodes, 1):
        parents.append(value)
        if isinstance(node.op, Conv | Linear) and not _is_depthwise(node.op):
            units.append(channels[value])
            if groups(node.op) > 1:
                fixed.update((node.inputs[0], value))
            continue
        units.append(units[node.inputs[0]])
        for other in node.inputs:
            if units[other] != units[value]:
                fixed.add(value)
            parents[root(other)] = root(value)
    return [root(value) for value in range(len(parents))], units, {root(value) for value in fixed}


def _cut(op: Op, before: Mask, behind: Mask) -> Op:
    """The operation on the channels that are kept of its input and of its value."""
    if before.all() and behind.all():
        return op
    match op:
        case Conv() if _is_depthwise(op):
            return replace(op, weight=op.weight[behind], bias=op.bias[behind], groups=int(behind.sum()))
        case Conv() | Linear():
            columns = op.weight if groups(op) > 1 else op.weight[:, before]
            return replace(op, weight=columns[behind], bias=op.bias[behind])
        case Affine():
            return Affine(op.scale[behind], op.shift[behind])
    return op
