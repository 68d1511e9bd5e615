"""Check what a Python user passes: numbers, devices, modules. An error is one sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The values that a number may take: from low to high; an open end is not among them."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def contain(self, value: float) -> bool:
        """Return whether a value is finite and within the bounds."""
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        """Describe the bounds.

        >>> str(Bounds(low=0, high=1, open_high=True))
        '>= 0 and < 1'
        """
        low = f"{'>' if self.open_low else '>='} {self.low:g}"
        high = f"{'<' if self.open_high else '<='} {self.high:g}"
        return low if self.high == math.inf else f"{low} and {high}"


POSITIVE = Bounds(low=0, open_low=True)
NOT_NEGATIVE = Bounds(low=0)
AT_LEAST_ONE = Bounds(low=1)


def parse_device(device: str | torch.device) -> torch.device:
    """Return the torch.device of a name.

    Raises:
        ValueError: no such kind of device, or torch sees no such CUDA device.

    >>> parse_device("cpu")
    device(type='cpu')
    """
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"expected a device such as 'cpu' or 'cuda', got {device!r}") from error
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {parsed} was asked for, but torch sees no such CUDA device here; use cpu")
    return parsed


def check_module(model: object) -> None:
    """Raise ValueError unless the model is a torch.nn.Module."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch.nn.Module, such as atmc.models.build makes, got {model!r:.80}")
