"""A network for inference as a list of operations, which the engine and all exports start from.

Value 0 is the images, (n, c, h, w) float32; value i + 1 is the result of node i; the last value is the logits, (n,
classes). Weights are numpy arrays in PyTorch's layouts. There is no batch norm and no dropout: `simplify` makes such a
graph from a module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

FloatArray = NDArray[np.float32]  # float64 in graphs that are still being simplified
LogitsFunction = Callable[[FloatArray], FloatArray]  # images (n, c, h, w) -> logits (n, classes)
Shape = tuple[int, ...]  # of a value for one image: (c, h, w), or (features,)
Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Conv:
    """2d convolution: weight (out, in / groups, kh, kw), bias (out,), the same zero padding on opposite sides."""

    weight: FloatArray
    bias: FloatArray
    _: KW_ONLY
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1


@dataclass(frozen=True, eq=False)
class Linear:
    """x W^T + b of (features,): weight (out, in), bias (out,)."""

    weight: FloatArray
    bias: FloatArray


@dataclass(frozen=True, eq=False)
class Affine:
    """x * scale + shift per channel, scale and shift (c,), of (c, h, w) or (c,)."""

    scale: FloatArray
    shift: FloatArray


@dataclass(frozen=True)
class Relu:
    """max(x, 0), or min(max(x, 0), ceiling) if there is a ceiling (6 for ReLU6)."""

    ceiling: float | None = None


@dataclass(frozen=True)
class MaxPool:
    """Maximum over windows; padding never wins; as in PyTorch no window begins beyond the image and its padding."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False


@dataclass(frozen=True)
class AvgPool:
    """Mean over windows: of the pixels in them and, if count_padding, of the zeros of the padding."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    ceil_mode: bool = False
    count_padding: bool = True


@dataclass(frozen=True)
class GlobalAvgPool:
    """Mean over height and width: (c, h, w) to (c, 1, 1)."""


@dataclass(frozen=True)
class Flatten:
    """(c, h, w) to (c h w,)."""


@dataclass(frozen=True)
class Add:
    """Sum of two values of the same shape."""


Op = Conv | Linear | Affine | Relu | MaxPool | AvgPool | GlobalAvgPool | Flatten | Add


@dataclass(frozen=True)
class Node:
    """One operation on earlier values; name: the module that it came from, such as "layer1.0.conv1"."""

    op: Op
    inputs: tuple[int, ...]
    name: str = ""


@dataclass(frozen=True)
class Graph:
    """A network; input_shape: (c, h, w) of the images."""

    input_shape: tuple[int, int, int]
    nodes: tuple[Node, ...]

    def shapes(self) -> list[Shape]:
        """Return the shape of every value, without the batch.

        Raises:
            ValueError: an operation does not fit its inputs.
        """
        shapes: list[Shape] = [self.input_shape]
        for index, node in enumerate(self.nodes):
            if not all(0 <= value <= index for value in node.inputs):
                raise ValueError(f"{_describe(node)} reads a value that comes later: {node.inputs}")
            shapes.append(_infer_shape(node, [shapes[value] for value in node.inputs]))
        return shapes

    def consumers(self) -> list[list[int]]:
        """Return for every value the nodes that read it."""
        consumers: list[list[int]] = [[] for _ in range(len(self.nodes) + 1)]
        for index, node in enumerate(self.nodes):
            for value in node.inputs:
                consumers[value].append(index)
        return consumers

    def macs(self, *, dense: bool = False) -> int:
        """Return the multiply-adds of convolutions and linear layers per image, without those of zero weights.

        Args:
            dense: count those of zero weights too.
        """
        total = 0
        for node, shape in zip(self.nodes, self.shapes()[1:], strict=True):
            if isinstance(node.op, Conv | Linear):
                positions = int(np.prod(shape[1:])) if len(shape) == 3 else 1
                weight = node.op.weight
                total += (weight.size if dense else int(np.count_nonzero(weight))) * positions
        return total


def run_graph(graph: Graph, images: Tensor) -> Tensor:
    """Return the logits (n, classes) of images (n, c, h, w), computed by PyTorch operation by operation.

    The engine and the exports are checked against it.
    """
    values = [images]
    for node in graph.nodes:
        values.append(_run_operation(node.op, *(values[value] for value in node.inputs)))
    return values[-1]


def _run_operation(op: Op, x: Tensor, other: Tensor | None = None) -> Tensor:
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


def _infer_shape(node: Node, inputs: Sequence[Shape]) -> Shape:
    op, first = node.op, inputs[0]
    if len(inputs) != (2 if isinstance(op, Add) else 1):
        raise ValueError(f"{_describe(node)} has {len(inputs)} inputs")
    match op:
        case Conv():
            outputs, per_group = op.weight.shape[:2]
            if len(first) != 3 or first[0] != per_group * op.groups or outputs % op.groups:
                raise ValueError(f"{_describe(node)} does not fit an input of shape {first}")
            kernel: Pair = op.weight.shape[2:]
            return outputs, *_count_windows(node, first[1:], kernel, op.stride, op.padding, op.dilation, False)
        case Linear():
            if first != op.weight.shape[1:]:
                raise ValueError(f"{_describe(node)} does not fit an input of shape {first}")
            return op.weight.shape[:1]
        case Affine():
            if first[:1] != op.scale.shape:
                raise ValueError(f"{_describe(node)} does not fit an input of shape {first}")
            return first
        case Relu():
            return first
        case MaxPool():
            windows = _count_windows(node, first[1:], op.kernel, op.stride, op.padding, op.dilation, op.ceil_mode)
            return first[0], *windows
        case AvgPool():
            windows = _count_windows(node, first[1:], op.kernel, op.stride, op.padding, (1, 1), op.ceil_mode)
            return first[0], *windows
        case GlobalAvgPool():
            if len(first) != 3:
                raise ValueError(f"{_describe(node)} needs an input of shape (c, h, w)")
            return first[0], 1, 1
        case Flatten():
            return (int(np.prod(first)),)
        case Add():
            if first != inputs[1]:
                raise ValueError(f"{_describe(node)} adds shapes {first} and {inputs[1]}")
            return first


def _count_windows(
    node: Node, sides: Sequence[int], kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> Pair:
    """Return how many windows fit into (h, w), down and across."""
    if len(sides) != 2:
        raise ValueError(f"{_describe(node)} needs an input of shape (c, h, w)")
    counts = []
    for side, k, s, p, d in zip(sides, kernel, stride, padding, dilation, strict=True):
        room = side + 2 * p - d * (k - 1) - 1
        if room < 0:
            raise ValueError(f"{_describe(node)}: a window of {d * (k - 1) + 1} does not fit a side of {side}")
        count = (room + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (count - 1) * s >= side + p:
            count -= 1  # it would begin in the padding behind the image
        counts.append(count)
    return counts[0], counts[1]


def _describe(node: Node) -> str:
    return f"{type(node.op).__name__} {node.name}".strip()
