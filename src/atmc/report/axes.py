"""Axes of charts: round numbers to mark, and where values stand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MINUS = "−"
Scale = Literal["percent", "linear", "log"]


def short(value: float) -> str:
    """A number in at most about five characters.

    >>> short(430_500), short(2000), short(0.25), short(-0.00025), short(0.0)
    ('430k', '2k', '0.25', '−2.5e−4', '0')
    """
    size = abs(value)
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit * 0.9995:
            return f"{value / unit:.3g}{letter}".replace("-", MINUS)
    if 0 < size < 0.001:
        digits, _, exponent = f"{value:.1e}".partition("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}".replace("-", MINUS)
    return f"{value:.3g}".replace("-", MINUS)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from at most low to at least high; they are the axis.

    >>> linear_ticks(0.1, 2.3)
    [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    """
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-100):
        high = low + (abs(low) if abs(low) > 1e-90 else 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between low and high, both > 0: whole decades, or finer where there are fewer than 3 of them.

    >>> log_ticks(900, 430_500)
    [1000.0, 10000.0, 100000.0]
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1,), (1, 2, 5), tuple(range(1, 10))):
        ticks = [step * 10.0**d for d in decades for step in steps if low <= step * 10.0**d <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: math.ceil(len(ticks) / 7)] if ticks else [low]


@dataclass(frozen=True)
class Axis:
    """A vertical axis between two heights on the page: where a value stands, and the values marked.

    Args:
        low, high: its ends, as logarithms on a log scale.
        top, bottom: the heights of high and low; heights grow downwards.
    """

    low: float
    high: float
    ticks: list[float]
    scale: Scale
    top: float
    bottom: float

    @classmethod
    def of(cls, values: Sequence[float], scale: Scale, top: float, bottom: float) -> Axis:
        """The axis that shows these values (at least one, all `usable`): from 0 if linear, 0 to 100 % if percent."""
        if scale == "percent":
            return cls(0.0, 1.0, [i / 5 for i in range(6)], scale, top, bottom)
        if scale == "linear":
            ticks = linear_ticks(min(0.0, *values), max(values))
            return cls(ticks[0], ticks[-1], ticks, scale, top, bottom)
        low, high = min(values), max(values)
        low, high = (low / 1.3, high * 1.3) if high / low > 4 else (low / 3, high * 3)
        return cls(math.log10(low), math.log10(high), log_ticks(low, high), scale, top, bottom)

    def height(self, value: float) -> float:
        """Where a value stands."""
        at = math.log10(value) if self.scale == "log" else value
        return self.top + (self.high - at) / (self.high - self.low) * (self.bottom - self.top)

    def say(self, value: float) -> str:
        """A mark's label."""
        return f"{value * 100:.0f} %" if self.scale == "percent" else short(value)


def usable(value: float | None, scale: Scale) -> float | None:
    """The value, or None where it is missing, beyond 1e100 or no number, or below 1e-100 on a log scale."""
    if value is None or not abs(value) < 1e100 or (scale == "log" and value < 1e-100):
        return None
    return value
