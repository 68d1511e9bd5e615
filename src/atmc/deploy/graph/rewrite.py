"""What the rewritings of graphs share: unread nodes taken out, vectors laid along the weights of grouped layers."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np

from atmc.deploy.graph.graph import Affine, Conv, Floats, Graph, Linear, Node

Layer = Conv | Linear


def remove_dead_nodes(graph: Graph, output: int | None = None) -> Graph:
    """Return the graph of those nodes that the value `output` is computed from; it becomes the last value.

    Args:
        graph: any graph.
        output: the number of a value; by default the last one.
    """
    output = len(graph.nodes) if output is None else output
    needed = {output}
    for index in range(output - 1, -1, -1):
        if index + 1 in needed:
            needed.update(graph.nodes[index].inputs)
    number = {0: 0}  # of a value, before and after
    kept: list[Node] = []
    for index, node in enumerate(graph.nodes):
        if index + 1 in needed:
            kept.append(Node(node.op, tuple(number[value] for value in node.inputs), node.name))
            number[index + 1] = len(kept)
    return Graph(graph.input_shape, tuple(kept))


def groups(layer: Layer) -> int:
    """In how many groups a layer's inputs fall."""
    return layer.groups if isinstance(layer, Conv) else 1


def inputs(layer: Layer) -> int:
    """How many channels or features a layer reads."""
    return int(layer.weight.shape[1]) * groups(layer)


def is_padded(layer: Layer) -> bool:
    """Whether zeros come in beside what a layer is given."""
    return isinstance(layer, Conv) and layer.padding != (0, 0)


def spread(vector: Floats, layer: Layer) -> Floats:
    """(inputs,) to (outputs, inputs / groups, 1...), which stands beside a layer's weight."""
    parts = vector.reshape(groups(layer), -1)
    rows = np.repeat(parts, len(layer.weight) // len(parts), axis=0)
    return cast(Floats, rows.reshape(rows.shape + (1,) * (layer.weight.ndim - 2)))


def kernel_sum(weight: Floats) -> Floats:
    """(outputs, inputs / groups): a weight's sum over its kernel, or itself."""
    return cast(Floats, weight.sum(axis=tuple(range(2, weight.ndim))))


def times(matrix: Floats, vector: Floats, layer: Layer) -> Floats:
    """(outputs,): a matrix (outputs, inputs / groups) times (inputs,), group by group."""
    parts = matrix.reshape(groups(layer), -1, matrix.shape[1])
    return cast(Floats, (parts @ vector.reshape(len(parts), -1, 1)).reshape(-1))


def scaled_outputs(layer: Layer, scale: Floats, shift: Floats) -> Layer:
    """The layer whose values are scale * y + shift, (outputs,) each."""
    rows = scale.reshape((-1,) + (1,) * (layer.weight.ndim - 1))
    return replace(layer, weight=layer.weight * rows, bias=layer.bias * scale + shift)


def scaled_inputs(layer: Layer, scale: Floats, shift: Floats) -> Layer:
    """The layer that does to x what this one does to scale * x + shift, (inputs,) each; shift 0 where it pads."""
    bias = layer.bias + times(kernel_sum(layer.weight), shift, layer)
    return replace(layer, weight=layer.weight * spread(scale, layer), bias=bias)


def after(first: Affine, second: Affine) -> Affine:
    """The second of the first."""
    return Affine(first.scale * second.scale, first.shift * second.scale + second.shift)
