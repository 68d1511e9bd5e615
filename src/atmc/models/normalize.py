"""Normalize images in the model's first layer, so that attacks and radii refer to pixels in [0, 1]."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor, nn

_FLOAT32 = torch.finfo(torch.float32)


class Normalize(nn.Module):
    """The layer ``(x - mean) / std``, per channel of images x, (n, C, H, W) in [0, 1].

    ``mean`` and ``std`` become float32 buffers of shape (C, 1, 1) and are part of the state dict.

    Args:
        mean: C finite numbers, in pixel units.
        std: C positive finite numbers, in pixel units.

    Raises:
        ValueError: the arguments are empty or not equally long, or float32 cannot hold a value; in the forward pass,
            the images have another number of channels (which would otherwise be broadcast).

    >>> Normalize([0.5], [0.25])(torch.ones(1, 1, 1, 1)).item()
    2.0
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        means, stds = check_statistics(mean, std)
        self.register_buffer("mean", torch.tensor(means, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(stds, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        channels = self.mean.shape[0]
        if x.dim() < 3 or x.shape[-3] != channels:
            raise ValueError(f"expected images of {channels} channels, (n, {channels}, H, W), got {tuple(x.shape)}")
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"channels={self.mean.shape[0]}"


def check_statistics(mean: object, std: object, channels: int | None = None) -> tuple[list[float], list[float]]:
    """Return the per-channel means and standard deviations as plain floats.

    Args:
        mean, std: lists or tuples of numbers; anything else is refused, since these may come from a file.
        channels: the number of values that each must have; None for any equal number.

    Raises:
        ValueError: one is not a list of numbers, a length is wrong, a value is not finite in float32, or a standard
            deviation is not positive in float32.
    """
    means, stds = _check_floats("mean", mean), _check_floats("std", std)
    expected = len(means) if channels is None else channels
    for name, values in (("mean", means), ("std", stds)):
        if not values or len(values) != expected:
            raise ValueError(f"expected one value of {name} for each channel ({max(expected, 1)}), got {len(values)}")
    for value in stds:
        if not value >= _FLOAT32.tiny:
            raise ValueError(f"expected std > 0, got {value}")
    return means, stds


def _check_floats(name: str, values: object) -> list[float]:
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"expected {name} to be a list of numbers, got {type(values).__name__}")
    return [_check_float(name, value) for value in values]


def _check_float(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"expected {name} to hold numbers only, got {reprlib.repr(value)}")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond float64
        number = math.inf
    if not abs(number) <= _FLOAT32.max:  # also if it is nan
        raise ValueError(f"expected {name} to be finite in float32, got {number}")
    return number
