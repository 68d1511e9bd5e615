"""Bounds of every channel's values, whatever the images are: a channel whose bounds are equal is constant."""

from __future__ import annotations

from typing import cast

import numpy as np

from atmc.deploy.graph.graph import (
    Add,
    Affine,
    AvgPool,
    Conv,
    Flatten,
    Floats,
    GlobalAvgPool,
    Graph,
    Linear,
    MaxPool,
    Relu,
)
from atmc.deploy.graph.operators import wide
from atmc.deploy.graph.rewrite import Layer, is_padded, kernel_sum, times

Bounds = tuple[Floats, Floats]  # the least and the largest value of each channel or feature


def bounds(graph: Graph) -> list[Bounds]:
    """Of every value. The images may be anything."""
    channels = graph.input_shape[0]
    shapes = graph.shapes()
    found: list[Bounds] = [(wide(np.full(channels, -np.inf)), wide(np.full(channels, np.inf)))]
    for node in graph.nodes:
        low, high = found[node.inputs[0]]
        match node.op:
            case Conv() | Linear():
                found.append(_layer_bounds(node.op, low, high))
            case Affine():
                found.append(_affine_bounds(node.op, low, high))
            case Relu():
                found.append((cast(Floats, low.clip(0, node.op.ceiling)), cast(Floats, high.clip(0, node.op.ceiling))))
            case AvgPool() if node.op.count_padding and node.op.padding != (0, 0):
                found.append((cast(Floats, low.clip(max=0)), cast(Floats, high.clip(min=0))))
            case Flatten():
                area = int(np.prod(shapes[node.inputs[0]][1:]))
                found.append((np.repeat(low, area), np.repeat(high, area)))
            case Add():
                others = found[node.inputs[1]]
                found.append((low + others[0], high + others[1]))
            case MaxPool() | AvgPool() | GlobalAvgPool():
                found.append((low, high))
    return found


def _layer_bounds(layer: Layer, low: Floats, high: Floats) -> Bounds:
    """Equal inputs are summed alike for both bounds, so that a constant is found as one."""
    if is_padded(layer):
        low, high = cast(Floats, low.clip(max=0)), cast(Floats, high.clip(min=0))
    rises = kernel_sum(cast(Floats, layer.weight.clip(min=0)))
    falls = kernel_sum(cast(Floats, layer.weight.clip(max=0)))
    least = _extreme(layer, rises, low) + _extreme(layer, falls, high) + layer.bias
    most = _extreme(layer, rises, high) + _extreme(layer, falls, low) + layer.bias
    return least, most


def _extreme(layer: Layer, weight: Floats, bound: Floats) -> Floats:
    """weight times bound, in which one number may be infinite, and 0 times infinity is 0."""
    endless = np.isinf(bound)
    total = times(weight, wide(np.where(endless, 0, bound)), layer)
    if not endless.any():
        return total
    signs = times(wide(np.sign(weight)), wide(np.where(endless, np.sign(bound), 0)), layer)
    return cast(Floats, np.where(signs == 0, total, np.copysign(np.inf, signs)))


def _affine_bounds(op: Affine, low: Floats, high: Floats) -> Bounds:
    flat = op.scale == 0
    with np.errstate(invalid="ignore"):
        one, other = (np.where(flat, 0, op.scale * bound) + op.shift for bound in (low, high))
    return cast(Floats, np.minimum(one, other)), cast(Floats, np.maximum(one, other))
