"""Bounds of every channel's values that hold for all images; a channel whose bounds are equal is constant."""

from __future__ import annotations

from typing import cast

import numpy as np

from atmc.deploy.graph.graph import (
    Add,
    Affine,
    AvgPool,
    Conv,
    Flatten,
    FloatArray,
    GlobalAvgPool,
    Graph,
    Linear,
    MaxPool,
    Relu,
)
from atmc.deploy.graph.operators import to_float64
from atmc.deploy.graph.rewrite import Layer, is_padded, multiply_groups, sum_kernel

Bounds = tuple[FloatArray, FloatArray]  # the least and the largest value of each channel or feature


def compute_bounds(graph: Graph) -> list[Bounds]:
    """Return bounds (channels,) of every value by interval arithmetic; the pixels of the images may be any numbers."""
    channels = graph.input_shape[0]
    shapes = graph.shapes()
    bounds: list[Bounds] = [(to_float64(np.full(channels, -np.inf)), to_float64(np.full(channels, np.inf)))]
    for node in graph.nodes:
        low, high = bounds[node.inputs[0]]
        match node.op:
            case Conv() | Linear():
                bounds.append(_layer_bounds(node.op, low, high))
            case Affine():
                bounds.append(_affine_bounds(node.op, low, high))
            case Relu(ceiling):
                bounds.append((cast(FloatArray, low.clip(0, ceiling)), cast(FloatArray, high.clip(0, ceiling))))
            case AvgPool() if node.op.count_padding and node.op.padding != (0, 0):
                bounds.append(_include_zero(low, high))
            case Flatten():
                area = int(np.prod(shapes[node.inputs[0]][1:]))
                bounds.append((np.repeat(low, area), np.repeat(high, area)))
            case Add():
                other_low, other_high = bounds[node.inputs[1]]
                bounds.append((low + other_low, high + other_high))
            case MaxPool() | AvgPool() | GlobalAvgPool():
                bounds.append((low, high))
    return bounds


def _include_zero(low: FloatArray, high: FloatArray) -> Bounds:
    return cast(FloatArray, low.clip(max=0)), cast(FloatArray, high.clip(min=0))


def _layer_bounds(layer: Layer, low: FloatArray, high: FloatArray) -> Bounds:
    """Return the bounds of a layer's outputs.

    Both bounds take their sums in the same order, so that those of a constant output are equal to the last bit.
    """
    if is_padded(layer):
        low, high = _include_zero(low, high)
    positive = sum_kernel(cast(FloatArray, layer.weight.clip(min=0)))
    negative = sum_kernel(cast(FloatArray, layer.weight.clip(max=0)))
    least = _multiply(layer, positive, low) + _multiply(layer, negative, high) + layer.bias
    most = _multiply(layer, positive, high) + _multiply(layer, negative, low) + layer.bias
    return least, most


def _multiply(layer: Layer, weight: FloatArray, bound: FloatArray) -> FloatArray:
    """Multiply a weight by bounds, some of which may be one infinity; 0 times infinity is 0."""
    infinite = np.isinf(bound)
    total = multiply_groups(weight, to_float64(np.where(infinite, 0, bound)), layer)
    if not infinite.any():
        return total
    signs = multiply_groups(to_float64(np.sign(weight)), to_float64(np.where(infinite, np.sign(bound), 0)), layer)
    return cast(FloatArray, np.where(signs == 0, total, np.copysign(np.inf, signs)))


def _affine_bounds(op: Affine, low: FloatArray, high: FloatArray) -> Bounds:
    zero = op.scale == 0
    with np.errstate(invalid="ignore"):
        one, other = (np.where(zero, 0, op.scale * bound) + op.shift for bound in (low, high))
    return cast(FloatArray, np.minimum(one, other)), cast(FloatArray, np.maximum(one, other))
