"""A network for inference as a list of operations: what every engine and export of this folder starts from.

Value 0 is the images, (n, c, h, w) float32; value i + 1 is what node i computes; the last value is the logits, (n,
classes). Weights are numpy arrays, float32, in PyTorch's layouts. There is no batch norm and no dropout: `simplify`
makes such a graph from a module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Floats = NDArray[np.float32]
Shape = tuple[int, ...]  # of one image's value: (c, h, w), or (features,)
Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Conv:
    """2d convolution. weight (out, in / groups, kh, kw), bias (out,); zero padding, the same on both sides."""

    weight: Floats
    bias: Floats
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1


@dataclass(frozen=True, eq=False)
class Linear:
    """x W^T + b on (features,). weight (out, in), bias (out,)."""

    weight: Floats
    bias: Floats


@dataclass(frozen=True, eq=False)
class Affine:
    """x * scale + shift per channel, scale and shift (c,): of (c, h, w) or (c,)."""

    scale: Floats
    shift: Floats


@dataclass(frozen=True)
class Relu:
    """max(x, 0), and min(x, ceiling) where there is one (6 of ReLU6)."""

    ceiling: float | None = None


@dataclass(frozen=True)
class MaxPool:
    """Padding never wins; windows that begin beyond the image and its padding are left out, as PyTorch does."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False


@dataclass(frozen=True)
class AvgPool:
    """Mean over windows, of the pixels in them and, where count_padding, the padding's zeros."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    ceil_mode: bool = False
    count_padding: bool = True


@dataclass(frozen=True)
class GlobalAvgPool:
    """(c, h, w) to (c, 1, 1)."""


@dataclass(frozen=True)
class Flatten:
    """(c, h, w) to (c h w,)."""


@dataclass(frozen=True)
class Add:
    """The sum of two values of the same shape."""


Op = Conv | Linear | Affine | Relu | MaxPool | AvgPool | GlobalAvgPool | Flatten | Add


@dataclass(frozen=True)
class Node:
    """One operation on earlier values. name: the module it came from, "layer1.0.conv1"."""

    op: Op
    inputs: tuple[int, ...]
    name: str = ""


@dataclass(frozen=True)
class Graph:
    """A network. input_shape: (c, h, w) of the images."""

    input_shape: tuple[int, int, int]
    nodes: tuple[Node, ...]

    def shapes(self) -> list[Shape]:
        """The shape of every value, without the batch; ValueError where an operation does not fit what it is given."""
        found: list[Shape] = [self.input_shape]
        for index, node in enumerate(self.nodes):
            if not all(0 <= value <= index for value in node.inputs):
                raise ValueError(f"{_label(node)} reads a value that comes later: {node.inputs}")
            found.append(_shape(node, [found[value] for value in node.inputs]))
        return found

    def consumers(self) -> list[list[int]]:
        """For every value, the nodes that read it."""
        found: list[list[int]] = [[] for _ in range(len(self.nodes) + 1)]
        for index, node in enumerate(self.nodes):
            for value in node.inputs:
                found[value].append(index)
        return found

    def macs(self, *, dense: bool = False) -> int:
        """Multiply-adds of convolutions and linear layers for one image, zeros left out unless dense."""
        total = 0
        for node, shape in zip(self.nodes, self.shapes()[1:], strict=True):
            if isinstance(node.op, Conv | Linear):
                positions = int(np.prod(shape[1:])) if len(shape) == 3 else 1
                weight = node.op.weight
                total += (weight.size if dense else int(np.count_nonzero(weight))) * positions
        return total


def evaluate(graph: Graph, images: Tensor) -> Tensor:
    """Logits (n, classes) by PyTorch, operation by operation: what engines and exports are checked against."""
    values = [images]
    for node in graph.nodes:
        values.append(_run(node.op, *(values[value] for value in node.inputs)))
    return values[-1]


def _run(op: Op, x: Tensor, other: Tensor | None = None) -> Tensor:
    match op:
        case Conv():
            weight, bias = torch.from_numpy(op.weight).to(x), torch.from_numpy(op.bias).to(x)
            return F.conv2d(x, weight, bias, op.stride, op.padding, op.dilation, op.groups)
        case Linear():
            return F.linear(x, torch.from_numpy(op.weight).to(x), torch.from_numpy(op.bias).to(x))
        case Affine():
            shape = (-1,) + (1,) * (x.dim() - 2)
            scale, shift = torch.from_numpy(op.scale).to(x), torch.from_numpy(op.shift).to(x)
            return x * scale.view(shape) + shift.view(shape)
        case Relu():
            return x.clamp(0, op.ceiling)
        case MaxPool():
            return F.max_pool2d(x, op.kernel, op.stride, op.padding, op.dilation, op.ceil_mode)
        case AvgPool():
            return F.avg_pool2d(x, op.kernel, op.stride, op.padding, op.ceil_mode, op.count_padding)
        case GlobalAvgPool():
            return x.mean((2, 3), keepdim=True)
        case Flatten():
            return x.flatten(1)
        case Add():
            assert other is not None
            return x + other


def _shape(node: Node, inputs: Sequence[Shape]) -> Shape:
    op, first = node.op, inputs[0]
    if len(inputs) != (2 if isinstance(op, Add) else 1):
        raise ValueError(f"{_label(node)} has {len(inputs)} inputs")
    match op:
        case Conv():
            outputs, per_group = op.weight.shape[:2]
            if len(first) != 3 or first[0] != per_group * op.groups or outputs % op.groups:
                raise ValueError(f"{_label(node)} does not fit an input of shape {first}")
            kernel: Pair = op.weight.shape[2:]
            return outputs, *_windows(node, first[1:], kernel, op.stride, op.padding, op.dilation, False)
        case Linear():
            if first != op.weight.shape[1:]:
                raise ValueError(f"{_label(node)} does not fit an input of shape {first}")
            return op.weight.shape[:1]
        case Affine():
            if first[:1] != op.scale.shape:
                raise ValueError(f"{_label(node)} does not fit an input of shape {first}")
            return first
        case Relu():
            return first
        case MaxPool():
            return first[0], *_windows(node, first[1:], op.kernel, op.stride, op.padding, op.dilation, op.ceil_mode)
        case AvgPool():
            return first[0], *_windows(node, first[1:], op.kernel, op.stride, op.padding, (1, 1), op.ceil_mode)
        case GlobalAvgPool():
            if len(first) != 3:
                raise ValueError(f"{_label(node)} needs an input of shape (c, h, w)")
            return first[0], 1, 1
        case Flatten():
            return (int(np.prod(first)),)
        case Add():
            if first != inputs[1]:
                raise ValueError(f"{_label(node)} adds shapes {first} and {inputs[1]}")
            return first


def _windows(
    node: Node, sides: Sequence[int], kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> Pair:
    """How many windows fit, down and across."""
    if len(sides) != 2:
        raise ValueError(f"{_label(node)} needs an input of shape (c, h, w)")
    found = []
    for side, k, s, p, d in zip(sides, kernel, stride, padding, dilation, strict=True):
        room = side + 2 * p - d * (k - 1) - 1
        if room < 0:
            raise ValueError(f"{_label(node)}: a window of {d * (k - 1) + 1} does not fit a side of {side}")
        count = (room + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (count - 1) * s >= side + p:
            count -= 1  # it would begin in the padding behind the image
        found.append(count)
    return found[0], found[1]


def _label(node: Node) -> str:
    return f"{type(node.op).__name__} {node.name}".strip()
