"""Axes of charts: the round numbers that are marked, and the heights of values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MINUS = "−"
Scale = Literal["percent", "linear", "log"]


def short(value: float) -> str:
    """Return a number as text of about five characters at most.

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
    """Return about `count` round numbers from at most low to at least high, which are the axis's ticks.

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
    """Return round numbers between low and high, both > 0: decades, or finer ones if fewer than 3 decades fit.

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


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A vertical axis between two heights on the page.

    Args:
        low, high: its ends, as logarithms on a log scale.
        ticks: the values that are marked.
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
        """Return the axis for these values (at least one, all `usable`): from 0 if linear, 0 to 100 % if percent."""
        if scale == "percent":
            low, high, ticks = 0.0, 1.0, [i / 5 for i in range(6)]
        elif scale == "linear":
            ticks = linear_ticks(min(0.0, *values), max(values))
            low, high = ticks[0], ticks[-1]
        else:
            low, high = min(values), max(values)
            low, high = (low / 1.3, high * 1.3) if high / low > 4 else (low / 3, high * 3)
            ticks = log_ticks(low, high)
            low, high = math.log10(low), math.log10(high)
        return cls(low=low, high=high, ticks=ticks, scale=scale, top=top, bottom=bottom)

    def height(self, value: float) -> float:
        """Return the height of a value."""
        position = math.log10(value) if self.scale == "log" else value
        return self.top + (self.high - position) / (self.high - self.low) * (self.bottom - self.top)

    def label(self, value: float) -> str:
        """Return the label of a tick."""
        return f"{value * 100:.0f} %" if self.scale == "percent" else short(value)


def usable(value: float | None, scale: Scale) -> float | None:
    """Return the value, or None if it is missing, not a number, beyond 1e100, or below 1e-100 on a log scale."""
    if value is None or not abs(value) < 1e100 or (scale == "log" and value < 1e-100):
        return None
    return value
