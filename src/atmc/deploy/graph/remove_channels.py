"""Remove dead channels from a graph.

Bounds of every channel's values follow the graph forward; if both are equal, the channel is constant (its weights are
zero, or its ReLU never lets anything through). Constants are added to the biases of the layers that read them. Which
outputs are needed follows the graph backward; rows whose output is not needed become zero. Channels that no weight
reads are then removed from all values that share them: those that an addition, a pooling or a depthwise convolution
ties together. A constant other than 0 stays if a layer with zero padding reads it, since the padding is 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from atmc.deploy.graph.bounds import Bounds, compute_bounds
from atmc.deploy.graph.graph import Add, Affine, Conv, Flatten, FloatArray, Graph, Linear, Node, Op, Relu
from atmc.deploy.graph.operators import to_float64
from atmc.deploy.graph.rewrite import Layer, group_count, input_count, is_padded, remove_dead_nodes, scale_inputs

Mask = NDArray[np.bool_]


def remove_dead_channels(graph: Graph) -> Graph:
    """Return the same network without its dead channels."""
    return _remove_unread_channels(_zero_unneeded_rows(_fold_constants(graph)))


def _fold_constants(graph: Graph) -> Graph:
    """Fold constant channels into the biases of their readers, and remove ReLUs and additions without effect."""
    bounds = compute_bounds(graph)
    nodes: list[Node] = []
    number = [0]  # of every old value, the new value
    for node, (low, high) in zip(graph.nodes, bounds[1:], strict=True):
        op: Op = node.op
        input_bounds = [bounds[value] for value in node.inputs]
        inputs = [number[value] for value in node.inputs]
        if isinstance(op, Conv | Linear):
            op = _set_rows(_fold_constant_inputs(op, *input_bounds[0]), low == high, low)
        elif isinstance(op, Relu) and _has_no_effect(op, input_bounds[0]):
            number.append(inputs[0])
            continue
        elif isinstance(op, Add):
            for side, other in ((0, 1), (1, 0)):
                least, most = input_bounds[side]
                if (least == most).all():
                    op, inputs = Affine(to_float64(np.ones(len(least))), least), [inputs[other]]
                    break
        nodes.append(Node(op, tuple(inputs), node.name))
        number.append(len(nodes))
    return remove_dead_nodes(Graph(graph.input_shape, tuple(nodes)), number[-1])


def _has_no_effect(relu: Relu, bounds: Bounds) -> bool:
    low, high = bounds
    return bool((low >= 0).all() and (relu.ceiling is None or (high <= relu.ceiling).all()))


def _fold_constant_inputs(layer: Layer, low: FloatArray, high: FloatArray) -> Layer:
    constant = (low == high) & ~(is_padded(layer) & (low != 0))
    if not (constant & _reads(layer)).any():
        return layer
    return scale_inputs(layer, to_float64(~constant), to_float64(np.where(constant, low, 0)))


def _set_rows(layer: Layer, rows: Mask, values: FloatArray) -> Layer:
    """Make those outputs of a layer constant: zero weights, and the values as bias."""
    if not (rows & layer.weight.any(axis=tuple(range(1, layer.weight.ndim)))).any():
        return layer
    kept = (~rows).reshape((-1,) + (1,) * (layer.weight.ndim - 1))
    return replace(layer, weight=layer.weight * kept, bias=to_float64(np.where(rows, values, layer.bias)))


def _reads(layer: Layer, outputs: Mask | None = None) -> Mask:
    """Return (inputs,): which inputs have a nonzero weight to any of these outputs (by default of all)."""
    used = layer.weight.any(axis=tuple(range(2, layer.weight.ndim)))
    if outputs is not None:
        used = used & outputs[:, None]
    parts = used.reshape(group_count(layer), -1, layer.weight.shape[1])
    return cast(Mask, parts.any(axis=1).reshape(-1))


def _zero_unneeded_rows(graph: Graph) -> Graph:
    """Zero the weights of outputs that nothing reads; such an output becomes a constant within its bounds."""
    bounds = compute_bounds(graph)
    needed: list[Mask] = [np.zeros(len(low), dtype=bool) for low, _ in bounds]
    needed[-1][:] = True
    for index in range(len(graph.nodes) - 1, -1, -1):
        node, (low, high) = graph.nodes[index], bounds[index + 1]
        needed_outputs = needed[index + 1] & (low != high)
        for value in node.inputs:
            if isinstance(node.op, Conv | Linear):
                needed[value] |= _reads(node.op, needed_outputs)
            elif isinstance(node.op, Flatten):
                needed[value] |= needed_outputs.reshape(len(needed[value]), -1).any(axis=1)
            else:
                needed[value] |= needed_outputs
    nodes = []
    for index, node in enumerate(graph.nodes):
        op: Op = node.op
        if isinstance(op, Conv | Linear):
            low, high = bounds[index + 1]
            op = _set_rows(op, ~needed[index + 1], cast(FloatArray, np.clip(0.0, low, high)))
        nodes.append(Node(op, node.inputs, node.name))
    return Graph(graph.input_shape, tuple(nodes))


def _remove_unread_channels(graph: Graph) -> Graph:
    """Remove channels that no weight reads from every value of their family."""
    channels = [shape[0] for shape in graph.shapes()]
    families, units, fixed = _find_families(graph, channels)
    read = {family: np.zeros(units[family], dtype=bool) for family in set(families) - fixed}
    for node in graph.nodes:
        family = families[node.inputs[0]]
        if isinstance(node.op, Conv | Linear) and not _is_depthwise(node.op) and family in read:
            read[family] |= _reads(node.op).reshape(units[family], -1).any(axis=1)
    for mask in read.values():
        mask[0] |= not mask.any()  # a value keeps at least one channel
    kept = [
        np.repeat(read[family], count // units[family]) if family in read else np.ones(count, dtype=bool)
        for family, count in zip(families, channels, strict=True)
    ]
    nodes = [
        Node(_select_channels(node.op, kept[node.inputs[0]], kept[index + 1]), node.inputs, node.name)
        for index, node in enumerate(graph.nodes)
    ]
    return Graph(graph.input_shape, tuple(nodes))


def _is_depthwise(layer: Layer) -> bool:
    return group_count(layer) > 1 and group_count(layer) == input_count(layer) == len(layer.weight)


def _find_families(graph: Graph, channels: list[int]) -> tuple[list[int], list[int], set[int]]:
    """Group the values that have to keep the same channels.

    Returns:
        for each value the number of one value that names its family; for each value how many channels can be removed
        from its family one by one (for a flattened value those before it was flattened); and the families that have to
        keep all channels: the images, the logits, and both sides of a grouped convolution.
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
            if group_count(node.op) > 1:
                fixed.update((node.inputs[0], value))
            continue
        units.append(units[node.inputs[0]])
        for other in node.inputs:
            if units[other] != units[value]:
                fixed.add(value)
            parents[root(other)] = root(value)
    return [root(value) for value in range(len(parents))], units, {root(value) for value in fixed}


def _select_channels(op: Op, inputs: Mask, outputs: Mask) -> Op:
    """Return the operation on the channels that are kept of its input and of its output."""
    if inputs.all() and outputs.all():
        return op
    match op:
        case Conv() if _is_depthwise(op):
            return replace(op, weight=op.weight[outputs], bias=op.bias[outputs], groups=int(outputs.sum()))
        case Conv() | Linear():
            columns = op.weight if group_count(op) > 1 else op.weight[:, inputs]
            return replace(op, weight=columns[outputs], bias=op.bias[outputs])
        case Affine():
            return Affine(op.scale[outputs], op.shift[outputs])
    return op
