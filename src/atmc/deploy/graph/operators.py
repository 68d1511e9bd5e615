"""The operators of PyTorch that a graph can hold; each function appends the nodes of one of them.

A function gets `add`, which appends a node and returns the number of its value, and the operator's arguments by their
names in PyTorch's schema: activations as `Value`, weights and other constants as tensors. It returns the number of the
value that the operator computes. It raises ValueError, with a clause that does not name the operator, if no operation
of the graph computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from atmc.deploy.graph.graph import (
    Add,
    Affine,
    AvgPool,
    Conv,
    Flatten,
    FloatArray,
    GlobalAvgPool,
    Linear,
    MaxPool,
    Pair,
    Relu,
    Shape,
)

SUPPORTED = (
    "convolutions, linear layers, batch norm, ReLU, max and average pooling, flattening, sums, per-channel constants"
)


@dataclass(frozen=True)
class Value:
    """An activation: its number in the graph, and its shape without the batch."""

    number: int
    shape: Shape


Append = Callable[..., int]  # (op, *numbers of its inputs) -> number of its value
Arguments = SimpleNamespace  # the operator's own, and `out`: the shape of the result without the batch


def to_float64(values: Any) -> FloatArray:
    """Convert a constant to float64; `simplify` rounds to float32 once, after all sums and products of weights."""
    if isinstance(values, Tensor):
        values = values.detach().double().numpy()
    return cast(FloatArray, np.asarray(values, dtype=np.float64))


def _activation(value: object) -> Value:
    if not isinstance(value, Value):
        raise ValueError("its weights depend on the images, and its input does not")
    return value


def _constant(value: object) -> FloatArray:
    if not isinstance(value, Tensor):
        raise ValueError("its weights are computed from the images")
    return to_float64(value)


def _bias(value: object, outputs: int) -> FloatArray:
    return to_float64(np.zeros(outputs)) if value is None else _constant(value)


def _pair(values: int | Sequence[int]) -> Pair:
    numbers = [values] if isinstance(values, int) else list(values)
    return int(numbers[0]), int(numbers[-1])


def _conv2d(add: Append, a: Arguments) -> int:
    x, weight, dilation = _activation(a.input), _constant(a.weight), _pair(a.dilation)
    if not isinstance(a.padding, str):
        padding = _pair(a.padding)
    elif a.padding == "valid":
        padding = 0, 0
    else:
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(side % 2 for side in total):
            raise ValueError("its padding is not the same on both sides")
        padding = total[0] // 2, total[1] // 2
    bias = _bias(a.bias, len(weight))
    stride, groups = _pair(a.stride), int(a.groups)
    conv = Conv(weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return add(conv, x.number)


def _linear(add: Append, a: Arguments) -> int:
    return _append_linear(add, a.input, _constant(a.weight), a.bias)


def _addmm(add: Append, a: Arguments) -> int:
    if a.alpha != 1 or a.beta != 1:
        raise ValueError("it has factors alpha and beta")
    return _append_linear(add, a.mat1, _constant(a.mat2).T, a.self)


def _matmul(add: Append, a: Arguments) -> int:
    other = a.mat2 if hasattr(a, "mat2") else a.other
    return _append_linear(add, a.self, _constant(other).T, None)


def _append_linear(add: Append, x: object, weight: FloatArray, bias: object) -> int:
    value = _activation(x)
    if len(value.shape) != 1 or weight.ndim != 2:
        raise ValueError(f"it acts on one axis of a value of shape {value.shape}, not on (features,)")
    return add(Linear(weight, _bias(bias, len(weight))), value.number)


def _batch_norm(add: Append, a: Arguments) -> int:
    if getattr(a, "training", False) or a.running_mean is None or a.running_var is None:
        raise ValueError("it has no running statistics")
    mean, variance = _constant(a.running_mean), _constant(a.running_var)
    scale = to_float64(1 / np.sqrt(variance.astype(np.float64) + a.eps))
    scale = scale if a.weight is None else scale * _constant(a.weight)
    return add(Affine(scale, _bias(a.bias, len(mean)) - mean * scale), _activation(a.input).number)


def _relu(add: Append, a: Arguments) -> int:
    return add(Relu(), _activation(a.self).number)


def _relu6(add: Append, a: Arguments) -> int:
    return add(Relu(6.0), _activation(a.self).number)


def _hardtanh(add: Append, a: Arguments) -> int:
    return _append_clip(add, a.self, a.min_val, a.max_val)


def _clamp(add: Append, a: Arguments) -> int:
    return _append_clip(add, a.self, a.min, getattr(a, "max", None))


def _append_clip(add: Append, x: object, low: object, high: object) -> int:
    if isinstance(low, Tensor) or isinstance(high, Tensor) or low is None or low != 0:
        raise ValueError("it clips to other bounds than [0, c]")
    ceiling = None if high is None or high == float("inf") else float(cast(float, high))
    if ceiling is not None and ceiling < 0:
        raise ValueError("it clips to other bounds than [0, c]")
    return add(Relu(ceiling), _activation(x).number)


def _max_pool2d(add: Append, a: Arguments) -> int:
    kernel = _pair(a.kernel_size)
    stride = _pair(a.stride) if a.stride else kernel
    pool = MaxPool(kernel, stride, _pair(a.padding), _pair(a.dilation), bool(a.ceil_mode))
    return add(pool, _activation(a.self).number)


def _avg_pool2d(add: Append, a: Arguments) -> int:
    if a.divisor_override is not None:
        raise ValueError("it has a divisor_override")
    kernel = _pair(a.kernel_size)
    stride = _pair(a.stride) if a.stride else kernel
    pool = AvgPool(kernel, stride, _pair(a.padding), bool(a.ceil_mode), bool(a.count_include_pad))
    return add(pool, _activation(a.self).number)


def _adaptive_avg_pool2d(add: Append, a: Arguments) -> int:
    x, sides = _activation(a.self), _pair(a.out[1:])
    if sides == x.shape[1:]:
        return x.number
    if sides == (1, 1):
        return add(GlobalAvgPool(), x.number)
    if x.shape[1] % sides[0] or x.shape[2] % sides[1]:
        raise ValueError(f"its windows differ in size: from {x.shape[1:]} to {sides} pixels")
    kernel = x.shape[1] // sides[0], x.shape[2] // sides[1]
    return add(AvgPool(kernel, kernel), x.number)


def _mean(add: Append, a: Arguments) -> int:
    x = _activation(a.self)
    if len(x.shape) != 3 or not getattr(a, "dim", None) or {axis % 4 for axis in a.dim} != {2, 3}:
        raise ValueError("it averages over other axes than height and width")
    pooled = add(GlobalAvgPool(), x.number)
    return pooled if a.keepdim else add(Flatten(), pooled)


def _add(add: Append, a: Arguments) -> int:
    return _append_sum(add, a.self, a.other, 1, a.alpha)


def _sub(add: Append, a: Arguments) -> int:
    return _append_sum(add, a.self, a.other, 1, -a.alpha)


def _rsub(add: Append, a: Arguments) -> int:
    return _append_sum(add, a.self, a.other, -a.alpha, 1)


def _append_sum(add: Append, one: object, two: object, first: float, second: float) -> int:
    """Append first * one + second * two."""
    if isinstance(one, Value) and isinstance(two, Value):
        if one.shape != two.shape:
            raise ValueError(f"it combines shapes {one.shape} and {two.shape}")
        return add(Add(), _append_scale(add, one, first), _append_scale(add, two, second))
    if not isinstance(one, Value):
        one, two, first, second = two, one, second, first
    x = _activation(one)
    return add(Affine(_per_channel(x, first), second * _per_channel(x, two)), x.number)


def _append_scale(add: Append, x: Value, factor: float) -> int:
    return x.number if factor == 1 else add(Affine(_per_channel(x, factor), _per_channel(x, 0.0)), x.number)


def _mul(add: Append, a: Arguments) -> int:
    one, two = (a.self, a.other) if isinstance(a.self, Value) else (a.other, a.self)
    if isinstance(two, Value):
        raise ValueError("it multiplies two values that are computed from the images")
    x = _activation(one)
    return add(Affine(_per_channel(x, two), _per_channel(x, 0.0)), x.number)


def _div(add: Append, a: Arguments) -> int:
    if isinstance(a.other, Value):
        raise ValueError("it divides by a value that is computed from the images")
    if getattr(a, "rounding_mode", None) is not None:
        raise ValueError("it rounds")
    x = _activation(a.self)
    return add(Affine(to_float64(1 / _per_channel(x, a.other)), _per_channel(x, 0.0)), x.number)


def _neg(add: Append, a: Arguments) -> int:
    return _append_scale(add, _activation(a.self), -1.0)


def _per_channel(x: Value, constant: object) -> FloatArray:
    """Return a constant as one number per channel: a number, or a tensor that is broadcast over height and width."""
    values = torch.as_tensor(constant, dtype=torch.float64)
    axes = 1 + len(x.shape)
    shape = (1,) * (axes - values.dim()) + tuple(values.shape)
    if len(shape) != axes or any(side != 1 for axis, side in enumerate(shape) if axis != 1):
        raise ValueError("its constant is not one number per channel")
    if shape[1] not in (1, x.shape[0]):
        raise ValueError(f"its constant has {shape[1]} channels, the value {x.shape[0]}")
    return to_float64(values.reshape(-1).expand(x.shape[0]).clone())


def _pass_through(add: Append, a: Arguments) -> int:
    x = _activation(a.self if hasattr(a, "self") else a.input)
    if getattr(a, "dtype", None) not in (None, torch.float32) or getattr(a, "train", False):
        raise ValueError("it changes its input")
    return x.number


OPERATORS: dict[str, Callable[[Append, Arguments], int]] = {
    "_adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "_to_copy": _pass_through,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "add": _add,
    "addmm": _addmm,
    "alias": _pass_through,
    "alpha_dropout": _pass_through,
    "avg_pool2d": _avg_pool2d,
    "batch_norm": _batch_norm,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clone": _pass_through,
    "contiguous": _pass_through,
    "conv2d": _conv2d,
    "detach": _pass_through,
    "div": _div,
    "dropout": _pass_through,
    "feature_dropout": _pass_through,
    "hardtanh": _hardtanh,
    "linear": _linear,
    "matmul": _matmul,
    "max_pool2d": _max_pool2d,
    "mean": _mean,
    "mm": _matmul,
    "mul": _mul,
    "neg": _neg,
    "relu": _relu,
    "relu6": _relu6,
    "rsub": _rsub,
    "sub": _sub,
    "to": _pass_through,
}
RESHAPES = ("flatten", "view", "_unsafe_view", "reshape", "squeeze", "unsqueeze")  # the order of the numbers stays
