"""Check what a Python user passes: numbers, devices, modules. An error is one sentence."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


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


def parse_real(name: str, value: Any, bounds: Bounds) -> float:
    """Return a number as a float, whatever its type: of Python, numpy, or a tensor of one element.

    >>> parse_real("eps", np.float32(0.5), POSITIVE)
    0.5

    Raises:
        ValueError: it is no number, or not within the bounds.
    """
    number = _as_number(value)
    if number is None or not bounds.contain(number):
        raise ValueError(f"expected {name} {bounds}, got {_describe(value)}")
    return float(number)


def parse_whole(name: str, value: Any, bounds: Bounds) -> int:
    """Return a whole number as an int, whatever its type: 4, 4.0, ``np.int64(4)`` or ``torch.tensor(4)``.

    >>> parse_whole("bits", 4.0, AT_LEAST_ONE)
    4

    Raises:
        ValueError: it is no whole number, or not within the bounds.
    """
    number = _as_number(value)
    if number is None or not bounds.contain(number) or number != int(number):
        raise ValueError(f"expected {name} {bounds}, a whole number, got {_describe(value)}")
    return int(number)


def _as_number(value: Any) -> int | float | None:
    """Return a scalar as a number of Python; None if it is none, as True is not."""
    if isinstance(value, np.ndarray | np.generic | Tensor) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _describe(value: Any) -> str:
    """Show a value that was refused, and its type unless it is a plain number."""
    return f"{value:g}" if type(value) is float else f"{value!r:.60}"


POSITIVE = Bounds(low=0, open_low=True)
NOT_NEGATIVE = Bounds(low=0)
AT_LEAST_ONE = Bounds(low=1)
PIXEL_SLACK = 1e-5  # by which pixels may lie outside [0, 1], as after a resize in float32; they are clipped


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
