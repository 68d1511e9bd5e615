"""Small static charts as inline SVG: a line chart over the epochs of phases, stacked bars, an interval.

Each chart is a `<figure>` that stands alone in an HTML page with `STYLE` in its head: no script, no fonts, no
external parts; colours follow the reader's light or dark preference, and hovering a mark tells its figures. Charts
are `WIDTH` units wide, which a phone shows at about 3/4 size: text stays readable.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

WIDTH, LINE_HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 8, 24, 40  # margins of a line chart
NAMES, TOTALS, ROW = 148, 62, 22  # bar chart: name column, total column, height of a bar with its gap
NARROWEST = 0.1  # least share of the width that a phase is given
MINUS = "\u2212"

Scale = Literal["percent", "linear", "log"]

# Okabe and Ito (2008), "Color universal design", lightened for dark pages; lines differ in dashes as well
STYLE = """
:root{--s0:#0072b2;--s1:#d55e00;--s2:#009e73;--s3:#b4568f;--s4:#e69f00;--s5:#7a7a7a}
@media (prefers-color-scheme:dark){:root{--s0:#56b4e9;--s1:#f08a4b;--s2:#2bc49a;--s3:#dd93bd;--s4:#f0c04c;--s5:#a0a0a0}}
figure{margin:0;min-width:0}figcaption{font-weight:600;margin-bottom:.15rem}
figure svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font:12px system-ui,sans-serif;fill:var(--soft)}svg .name{fill:var(--ink)}
svg .grid{stroke:var(--line);stroke-width:1}svg .band{fill:var(--ink);fill-opacity:.055}svg .band.even{fill-opacity:0}
svg .line{fill:none;stroke-width:2;stroke-linejoin:round}svg .dash{stroke-dasharray:6 4}
.key{font-size:.8rem;color:var(--soft);display:flex;flex-wrap:wrap;gap:.1rem .9rem;margin-bottom:.2rem}
.key svg{display:inline-block;width:24px;height:10px;vertical-align:middle;margin-right:.3rem}
svg.interval{width:130px;height:16px;vertical-align:middle}
""" + "".join(f".c{i}{{stroke:var(--s{i})}}.f{i}{{fill:var(--s{i})}}" for i in range(6))


@dataclass(frozen=True)
class Band:
    """A phase on the horizontal axis: its name and the epochs of its records, in order."""

    name: str
    epochs: Sequence[int]


@dataclass(frozen=True)
class Bar:
    """A stacked bar: part -> length >= 0."""

    name: str
    parts: Mapping[str, float]


def element(name: str, *content: str, **attributes: object) -> str:
    """Markup of one element; content is markup, attributes are escaped here (class_ is class, a_b is a-b).

    >>> element("p", escape("1 < 2"), class_="a")
    '<p class="a">1 &lt; 2</p>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(f"{value:.1f}" if isinstance(value, float) else str(value))}"'
        for key, value in attributes.items()
    )
    return f"<{name}{given}>{''.join(content)}</{name}>"


def escape(text: str) -> str:
    """Text for an element's content or a quoted attribute."""
    return html.escape(text, quote=True)


def short(value: float) -> str:
    """A number in at most about five characters.

    >>> short(430_500), short(2000), short(0.25), short(0.00002), short(0.0)
    ('430k', '2k', '0.25', '2e-5', '0')
    """
    size = abs(value)
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit * 0.9995:
            return f"{value / unit:.3g}{letter}".replace("-", MINUS)
    if 0 < size < 0.001:
        digits, _, exponent = f"{value:.0e}".partition("e")
        return f"{digits}e{int(exponent)}"
    return f"{value:.3g}".replace("-", MINUS)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from at most low to at least high; they are the axis.

    >>> linear_ticks(0.1, 2.3)
    [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [round(i * step, 12) for i in range(first, last + 1)]


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
class _Axis:
    """The vertical axis: a value's height, and the values marked."""

    low: float
    high: float
    ticks: list[float]
    scale: Scale

    @classmethod
    def of(cls, values: Sequence[float], scale: Scale) -> _Axis:
        if scale == "percent":
            return cls(0.0, 1.0, [i / 5 for i in range(6)], scale)
        if scale == "linear":
            ticks = linear_ticks(min(0.0, *values), max(values))
            return cls(ticks[0], ticks[-1], ticks, scale)
        low, high = min(values), max(values)
        low, high = (low / 1.3, high * 1.3) if high / low > 4 else (low / 3, high * 3)
        return cls(math.log10(low), math.log10(high), log_ticks(low, high), scale)

    def height(self, value: float) -> float:
        at = math.log10(value) if self.scale == "log" else value
        return TOP + (self.high - at) / (self.high - self.low) * (LINE_HEIGHT - TOP - BOTTOM)

    def say(self, value: float) -> str:
        return f"{value * 100:.0f} %" if self.scale == "percent" else short(value)


def line_chart(
    title: str, bands: Sequence[Band], lines: Mapping[str, Sequence[float | None]], *, scale: Scale = "linear"
) -> str:
    """Lines over the epochs of consecutive phases, each phase a band with its own epoch numbers.

    Lines are interrupted between phases, since each starts from another's best epoch, and at values that are missing,
    not finite, or not positive on a log scale. A chart without any value is an empty text.

    Args:
        lines: name -> one value for each epoch of all bands in order; at most 6.
        scale: `percent` takes fractions and shows 0 to 100 %.
    """
    slots = sum(len(band.epochs) for band in bands)
    assert all(len(values) == slots for values in lines.values()) and len(lines) <= 6
    shown = {name: [_usable(value, scale) for value in values] for name, values in lines.items()}
    present = [value for values in shown.values() for value in values if value is not None]
    if not present:
        return ""
    axis = _Axis.of(present, scale)
    parts = [*_grid(axis), *_bands(bands)]
    for number, (name, values) in enumerate(shown.items()):
        start = 0
        for band, places in zip(bands, _places(bands), strict=True):
            run = values[start : start + len(places)]
            parts += _line(f"{name}, {band.name}", band.epochs, places, run, axis, number)
            start += len(places)
    foot = "epoch within the phase (0: the model it starts from)" if any(0 in b.epochs for b in bands) else "epoch within the phase"
    parts.append(element("text", foot, x=(LEFT + WIDTH - RIGHT) / 2, y=LINE_HEIGHT - 5, text_anchor="middle"))
    return _figure(title, list(shown) if len(shown) > 1 else [], parts, LINE_HEIGHT, dashes=True)


def _usable(value: float | None, scale: Scale) -> float | None:
    if value is None or not math.isfinite(value) or (scale == "log" and value <= 0):
        return None
    return value


def _grid(axis: _Axis) -> list[str]:
    parts = []
    for tick in axis.ticks:
        y = axis.height(tick)
        parts.append(element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        parts.append(element("text", axis.say(tick), x=LEFT - 6, y=y + 4, text_anchor="end"))
    return parts


def _edges(bands: Sequence[Band]) -> list[tuple[float, float]]:
    """Left and right end of each band: widths by number of epochs, none too narrow to be read."""
    weights = [float(len(band.epochs)) for band in bands]
    weights = [max(weight, NARROWEST * sum(weights)) for weight in weights]
    unit, at, edges = (WIDTH - LEFT - RIGHT) / sum(weights), float(LEFT), []
    for weight in weights:
        edges.append((at, at + weight * unit))
        at += weight * unit
    return edges


def _places(bands: Sequence[Band]) -> list[list[float]]:
    """Horizontal position of every epoch of every band."""
    return [
        [left + (i + 0.5) / len(band.epochs) * (right - left) for i in range(len(band.epochs))]
        for band, (left, right) in zip(bands, _edges(bands), strict=True)
    ]


def _bands(bands: Sequence[Band]) -> list[str]:
    parts = []
    floor = LINE_HEIGHT - BOTTOM
    for number, (band, (left, right), places) in enumerate(zip(bands, _edges(bands), _places(bands), strict=True)):
        count = len(band.epochs)
        tip = element("title", escape(f"{band.name}: {count} epoch{'s' if count > 1 else ''}"))
        shade = "band" if number % 2 == 0 else "band even"
        parts.append(element("rect", tip, class_=shade, x=left, y=0, width=right - left, height=floor))
        room = int((right - left) / 6.5)
        label = escape(cut(band.name, max(room, 3)))
        parts.append(element("text", label, class_="name", x=(left + right) / 2, y=15, text_anchor="middle"))
        least = 27 / max((right - left) / count, 1e-9)
        step = next(s * 10**p for p in range(9) for s in (1, 2, 5) if s * 10**p >= least)
        marked = [i for i, epoch in enumerate(band.epochs) if epoch % step == 0] or [count - 1]
        for i in marked:
            parts.append(element("text", str(band.epochs[i]), x=places[i], y=floor + 15, text_anchor="middle"))
    return parts


def _line(
    name: str, epochs: Sequence[int], places: list[float], values: Sequence[float | None], axis: _Axis, number: int
) -> list[str]:
    path, marks, pen = "", [], "M"
    for epoch, x, value in zip(epochs, places, values, strict=True):
        if value is None:
            pen = "M"
            continue
        y = axis.height(value)
        path, pen = f"{path}{pen}{x:.1f} {y:.1f}", "L"
        exact = f"{value:.2%}".replace("%", " %") if axis.scale == "percent" else f"{value:,.6g}"
        tip = element("title", escape(f"{name} epoch {epoch}: {exact}"))
        marks.append(element("circle", tip, class_=f"f{number}", cx=x, cy=y, r=3.0 if len(values) <= 40 else 1.8))
    dash = " dash" if number % 2 else ""
    return [element("path", class_=f"line c{number}{dash}", d=path), *marks] if path else []


def bar_chart(title: str, bars: Sequence[Bar], *, unit: str, most: int = 60) -> str:
    """Horizontal stacked bars with their totals, in the order given; beyond `most`, the longest of them."""
    parts_named = list(dict.fromkeys(part for bar in bars for part in bar.parts))
    totals = [sum(bar.parts.values()) for bar in bars]
    kept = sorted(sorted(range(len(bars)), key=lambda i: -totals[i])[:most])
    if len(kept) < len(bars):
        title = f"{title} (the {most} largest of {len(bars)})"
    longest = max([totals[i] for i in kept], default=0) or 1.0
    markup: list[str] = []
    for row, i in enumerate(kept):
        markup += _bar(bars[i], row * ROW, (WIDTH - NAMES - TOTALS) / longest, parts_named, unit)
    return _figure(title, parts_named if len(parts_named) > 1 else [], markup, max(len(kept), 1) * ROW, dashes=False)


def _bar(bar: Bar, top: int, unit_length: float, named: list[str], unit: str) -> list[str]:
    label = element("title", escape(bar.name)) + escape(cut(bar.name, 22))
    markup = [element("text", label, class_="name", x=NAMES - 8, y=top + 15, text_anchor="end")]
    x = float(NAMES)
    for part, value in bar.parts.items():
        tip = element("title", escape(f"{bar.name}, {part}: {value:,.0f} {unit}"))
        color = named.index(part) % 6
        if value > 0:
            length = value * unit_length
            markup.append(element("rect", tip, class_=f"f{color}", x=x, y=top + 3, width=length, height=ROW - 6))
            x += length
    return [*markup, element("text", f"{sum(bar.parts.values()):,.0f}", x=x + 5, y=top + 15)]


def interval(accuracy: float, low: float, high: float) -> str:
    """A point and its interval on a line from 0 to 1."""
    tip = element("title", f"{accuracy:.2%}, 95 % interval {low:.2%} to {high:.2%}".replace("%", " %").replace("  ", " "))
    x = [5 + 120 * value for value in (low, high, accuracy)]
    return element(
        "svg",
        tip,
        element("line", class_="grid", x1=5, x2=125, y1=8, y2=8),
        *(element("line", class_="grid", x1=end, x2=end, y1=4, y2=12) for end in (5, 125)),
        element("line", class_="line c0", x1=x[0], x2=x[1], y1=8, y2=8, stroke_linecap="round"),
        element("circle", class_="f0", cx=x[2], cy=8, r=4),
        class_="interval",
        viewBox="0 0 130 16",
        role="img",
    )


def cut(text: str, length: int) -> str:
    """Text with its middle left out where it is longer.

    >>> cut("layer1.0.conv1.very_long_name", 12)
    'layer1…_name'
    """
    if len(text) <= length:
        return text
    return f"{text[: length // 2]}…{text[len(text) - (length - 1) // 2 :]}"


def _figure(title: str, key: Sequence[str], parts: Sequence[str], height: int, *, dashes: bool) -> str:
    drawing = element("svg", *parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=title)
    return element("figure", element("figcaption", escape(title)), _key(key, dashes), drawing)


def _key(names: Sequence[str], dashes: bool) -> str:
    """What the colours mean."""
    entries = []
    for number, name in enumerate(names):
        dash = " dash" if number % 2 else ""
        swatch = (
            element("line", class_=f"line c{number}{dash}", x1=0, x2=24, y1=5, y2=5)
            if dashes
            else element("rect", class_=f"f{number % 6}", x=6, y=0, width=12, height=10)
        )
        entries.append(element("span", element("svg", swatch, viewBox="0 0 24 10", aria_hidden="true"), escape(name)))
    return element("div", *entries, class_="key") if entries else ""
