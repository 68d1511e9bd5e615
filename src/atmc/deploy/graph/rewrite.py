"""Helpers for rewriting graphs: remove dead nodes, scale layers, broadcast vectors to the shape of weights."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np

from atmc.deploy.graph.graph import Affine, Conv, FloatArray, Graph, Linear, Node

Layer = Conv | Linear


def remove_dead_nodes(graph: Graph, output: int | None = None) -> Graph:
    """Return the graph of those nodes that the value `output` is computed from; it becomes the last value.

    Args:
        output: the number of a value; by default the last one.
    """
    output = len(graph.nodes) if output is None else output
    needed = {output}
    for index in range(output - 1, -1, -1):
        if index + 1 in needed:
            needed.update(graph.nodes[index].inputs)
    number = {0: 0}  # old number of a value -> new number
    kept: list[Node] = []
    for index, node in enumerate(graph.nodes):
        if index + 1 in needed:
            kept.append(Node(node.op, tuple(number[value] for value in node.inputs), node.name))
            number[index + 1] = len(kept)
    return Graph(graph.input_shape, tuple(kept))


def group_count(layer: Layer) -> int:
    """Return the number of groups of a convolution, 1 for a linear layer."""
    return layer.groups if isinstance(layer, Conv) else 1


def input_count(layer: Layer) -> int:
    """Return the number of input channels or features of a layer."""
    return int(layer.weight.shape[1]) * group_count(layer)


def is_padded(layer: Layer) -> bool:
    """Return whether a layer has zero padding."""
    return isinstance(layer, Conv) and layer.padding != (0, 0)


def broadcast_inputs(vector: FloatArray, layer: Layer) -> FloatArray:
    """Reshape a value per input (inputs,) to (outputs, inputs / groups, 1...), so that it multiplies the weight."""
    parts = vector.reshape(group_count(layer), -1)
    rows = np.repeat(parts, len(layer.weight) // len(parts), axis=0)
    return cast(FloatArray, rows.reshape(rows.shape + (1,) * (layer.weight.ndim - 2)))


def sum_kernel(weight: FloatArray) -> FloatArray:
    """Sum a convolution's weight over kh and kw, to (outputs, inputs / groups); a linear layer's stays as it is."""
    return cast(FloatArray, weight.sum(axis=tuple(range(2, weight.ndim))))


def multiply_groups(matrix: FloatArray, vector: FloatArray, layer: Layer) -> FloatArray:
    """Multiply a matrix (outputs, inputs / groups) by a vector (inputs,), group by group, to (outputs,)."""
    parts = matrix.reshape(group_count(layer), -1, matrix.shape[1])
    return cast(FloatArray, (parts @ vector.reshape(len(parts), -1, 1)).reshape(-1))


def scale_outputs(layer: Layer, scale: FloatArray, shift: FloatArray) -> Layer:
    """Return the layer that computes scale * y + shift if this one computes y; scale and shift: (outputs,)."""
    rows = scale.reshape((-1,) + (1,) * (layer.weight.ndim - 1))
    return replace(layer, weight=layer.weight * rows, bias=layer.bias * scale + shift)


def scale_inputs(layer: Layer, scale: FloatArray, shift: FloatArray) -> Layer:
    """Return the layer that computes from x what this one computes from scale * x + shift.

    Args:
        scale, shift: (inputs,); the shift has to be 0 if the layer has zero padding.
    """
    bias = layer.bias + multiply_groups(sum_kernel(layer.weight), shift, layer)
    return replace(layer, weight=layer.weight * broadcast_inputs(scale, layer), bias=bias)


def compose(first: Affine, second: Affine) -> Affine:
    """Compose two affine maps: second(first(x))."""
    return Affine(first.scale * second.scale, first.shift * second.scale + second.shift)
