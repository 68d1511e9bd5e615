"""Small static charts as inline SVG: a line chart over the epochs of phases, stacked bars, an interval.

Each chart is a `<figure>` for an HTML page that has `STYLE` in its head. It needs no script, font or other file; its
colors follow the reader's light or dark preference, and hovering over a mark shows its value. Charts are `WIDTH` units
wide, which a phone shows at about 5/6 size, so that text stays readable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from atmc.report.axes import Axis, Scale, usable
from atmc.report.markup import cut, element, escape

WIDTH, LINE_HEIGHT = 430, 235
LEFT, RIGHT, TOP, BOTTOM = 50, 8, 24, 40  # margins of a line chart
NAMES, TOTALS, ROW = 140, 56, 22  # bar chart: name column, total column, height of a bar with its gap
BESIDE, ABOVE = 18, 58  # letters of a name that fit beside a bar, and above it
DOTTED = 40  # most epochs of a phase for which each epoch has a dot
NARROWEST = 0.1  # least fraction of the width that a phase gets

# Okabe and Ito (2008), "Color universal design", lightened for dark pages; lines also differ in dashes
STYLE = """
:root { --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #b4568f; --s4: #e69f00; --s5: #7a7a7a }
@media (prefers-color-scheme: dark) { :root { --s0: #56b4e9; --s1: #f08a4b; --s2: #2bc49a; --s3: #dd93bd;
  --s4: #f0c04c; --s5: #a0a0a0 } }
figure { margin: 0; min-width: 0 }
figcaption { font-weight: 600; margin-bottom: .15rem }
figure > svg { display: block; width: 100%; height: auto; overflow: visible }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft) }
svg text.name { fill: var(--ink) }
.grid { stroke: var(--line); stroke-width: 1 }
.band { fill: var(--ink); fill-opacity: .055 }
.band.even { fill-opacity: 0 }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
.dash { stroke-dasharray: 5 5 }
.hit { fill-opacity: 0 }
.key { font-size: .8rem; color: var(--soft); display: flex; flex-wrap: wrap; gap: .1rem .9rem; margin-bottom: .2rem }
.key svg { width: 24px; height: 10px; margin-right: .3rem }
.interval { width: 130px; height: 16px; vertical-align: middle }
""" + "".join(f".c{i} {{ stroke: var(--s{i}) }} .f{i} {{ fill: var(--s{i}) }}\n" for i in range(6))


@dataclass(frozen=True)
class Band:
    """A phase on the horizontal axis: its name, and the epoch numbers of its records in order."""

    name: str
    epochs: Sequence[int]


@dataclass(frozen=True)
class Bar:
    """A stacked bar: its name, and part -> length >= 0."""

    name: str
    parts: Mapping[str, float]


def line_chart(
    title: str, bands: Sequence[Band], lines: Mapping[str, Sequence[float | None]], *, scale: Scale = "linear"
) -> str:
    """Draw lines over the epochs of consecutive phases; each phase is a band with its own epoch numbers.

    Lines are interrupted between phases, since each phase starts from the best epoch of the one before, and at values
    that are missing, not finite, or not positive on a log scale. Without any value the result is "".

    Args:
        lines: name -> one value per epoch of all bands in order; at most 6 lines.
        scale: `percent` takes fractions and shows 0 to 100 %.
    """
    slots = sum(len(band.epochs) for band in bands)
    assert all(len(values) == slots for values in lines.values())
    shown = {name: [usable(value, scale) for value in values] for name, values in lines.items()}
    present = [value for values in shown.values() for value in values if value is not None]
    if not present:
        return ""
    axis = Axis.of(present, scale, TOP, LINE_HEIGHT - BOTTOM)
    parts = [*_grid(axis), *_bands(bands)]
    for number, (name, values) in enumerate(shown.items()):
        start = 0
        for band, places in zip(bands, _places(bands), strict=True):
            run = values[start : start + len(places)]
            parts += _line(f"{name}, {band.name}", band.epochs, places, run, axis, number)
            start += len(places)
    starts = " (0: the model it starts from)" if any(0 in band.epochs for band in bands) else ""
    foot = f"epoch within the phase{starts}"
    parts.append(element("text", foot, x=(LEFT + WIDTH - RIGHT) / 2, y=LINE_HEIGHT - 5, text_anchor="middle"))
    return _figure(title, list(shown), parts, LINE_HEIGHT, dashes=True)


def _grid(axis: Axis) -> list[str]:
    """Return a horizontal line and a label for each tick."""
    parts = []
    for tick in axis.ticks:
        y = axis.height(tick)
        parts.append(element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        parts.append(element("text", axis.label(tick), x=LEFT - 6, y=y + 4, text_anchor="end"))
    return parts


def _edges(bands: Sequence[Band]) -> list[tuple[float, float]]:
    """Return the left and right end of each band: widths by number of epochs, none too narrow to read."""
    weights = [float(len(band.epochs)) for band in bands]
    weights = [max(weight, NARROWEST * sum(weights)) for weight in weights]
    unit, at, edges = (WIDTH - LEFT - RIGHT) / sum(weights), float(LEFT), []
    for weight in weights:
        edges.append((at, at + weight * unit))
        at += weight * unit
    return edges


def _places(bands: Sequence[Band]) -> list[list[float]]:
    """Return the horizontal position of every epoch of every band."""
    return [
        [left + (i + 0.5) / len(band.epochs) * (right - left) for i in range(len(band.epochs))]
        for band, (left, right) in zip(bands, _edges(bands), strict=True)
    ]


def _bands(bands: Sequence[Band]) -> list[str]:
    """Return the background, name and epoch numbers of each band."""
    parts, right_end = [], 0.0  # of the last epoch number, so that the next one does not overlap it
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
            half = 3.6 * len(str(band.epochs[i]))
            if places[i] - half > right_end + 5:
                parts.append(element("text", str(band.epochs[i]), x=places[i], y=floor + 15, text_anchor="middle"))
                right_end = places[i] + half
    return parts


def _line(
    name: str, epochs: Sequence[int], places: list[float], values: Sequence[float | None], axis: Axis, number: int
) -> list[str]:
    """Return the line of one band's values, and a mark with its value for each epoch."""
    path, marks, few = "", [], len(values) <= DOTTED
    points = list(zip(epochs, places, values, strict=True))
    for present, run in groupby(points, key=lambda point: point[2] is not None):
        spots = [(epoch, x, axis.height(value), value) for epoch, x, value in run if value is not None]
        if present:  # h0 makes a single point visible
            path += "M" + "L".join(f"{x:.1f} {y:.1f}" for _, x, y, _ in spots) + "h0"
        for epoch, x, y, value in spots:
            exact = f"{value * 100:.2f} %" if axis.scale == "percent" else f"{value:,.6g}"
            tip = element("title", escape(f"{name} epoch {epoch}: {exact}"))
            kind = f"f{number}" if few else "hit"
            marks.append(element("circle", tip, class_=kind, cx=x, cy=y, r=3.0 if few else 5.0))
    dash = " dash" if number % 2 else ""
    return [element("path", class_=f"line c{number}{dash}", d=path), *marks] if path else []


def bar_chart(title: str, bars: Sequence[Bar], *, unit: str, most: int = 60) -> str:
    """Draw horizontal stacked bars with their totals, in the order given; only the `most` longest if there are more.

    Names stand beside the bars, or above them if one is too long for that.
    """
    every = dict.fromkeys(part for bar in bars for part in bar.parts)
    named = [part for part in every if any(bar.parts.get(part) for bar in bars)]
    totals = [sum(bar.parts.values()) for bar in bars]
    kept = sorted(sorted(range(len(bars)), key=lambda i: -totals[i])[:most])
    if len(kept) < len(bars):
        title = f"{title} (the {most} largest of {len(bars)})"
    longest = max([totals[i] for i in kept], default=0) or 1.0
    above = any(len(bars[i].name) > BESIDE for i in kept)
    left, row = (0, ROW + 14) if above else (NAMES, ROW)
    unit_length = (WIDTH - left - TOTALS) / longest
    markup: list[str] = []
    for number, i in enumerate(kept):
        name = element("title", escape(bars[i].name)) + escape(cut(bars[i].name, ABOVE if above else BESIDE))
        place = {"x": 0, "y": number * row + 13} if above else {"x": left - 8, "y": number * row + 15}
        markup.append(element("text", name, class_="name", text_anchor="start" if above else "end", **place))
        markup += _bar(bars[i], left, (number + 1) * row - ROW, unit_length, named, unit)
    return _figure(title, named, markup, max(len(kept), 1) * row, dashes=False)


def _bar(bar: Bar, left: int, top: int, unit_length: float, named: list[str], unit: str) -> list[str]:
    """Return the parts of one bar and its total."""
    markup, x = [], float(left)
    for part, value in bar.parts.items():
        if value > 0:
            tip = element("title", escape(f"{bar.name}, {part}: {value:,.0f} {unit}"))
            length, color = value * unit_length, named.index(part) % 6
            markup.append(element("rect", tip, class_=f"f{color}", x=x, y=top + 3, width=length, height=ROW - 6))
            x += length
    return [*markup, element("text", f"{sum(bar.parts.values()):,.0f}", x=x + 5, y=top + 15)]


def interval(accuracy: float, low: float, high: float) -> str:
    """Draw an accuracy and its interval on a line from 0 to 1."""
    tip = element("title", f"{accuracy * 100:.2f} %, 95 % interval {low * 100:.2f} to {high * 100:.2f} %")
    x = [5 + 120 * value for value in (low, high, accuracy)]
    return element(
        "svg",
        tip,
        element("line", class_="grid", x1=5, x2=125, y1=8, y2=8),
        *(element("line", class_="grid", x1=end, x2=end, y1=4, y2=12) for end in (5, 125)),
        element("line", class_="line c0", x1=x[0], x2=x[1], y1=8, y2=8),
        element("circle", class_="f0", cx=x[2], cy=8, r=4),
        class_="interval",
        viewBox="0 0 130 16",
        role="img",
    )


def _figure(title: str, key: Sequence[str], parts: Sequence[str], height: int, *, dashes: bool) -> str:
    """Return a figure with its caption and legend."""
    drawing = element("svg", *parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=title)
    return element("figure", element("figcaption", escape(title)), _key(key, dashes), drawing)


def _key(names: Sequence[str], dashes: bool) -> str:
    """Return the legend: one swatch per name, with dashes for a line chart."""
    entries = []
    for number, name in enumerate(names):
        dash = " dash" if number % 2 else ""
        swatch = (
            element("line", class_=f"line c{number}{dash}", x1=0, x2=24, y1=5, y2=5)
            if dashes
            else element("rect", class_=f"f{number % 6}", x=12, y=0, width=12, height=10)
        )
        entries.append(element("span", element("svg", swatch, viewBox="0 0 24 10", aria_hidden="true"), escape(name)))
    return element("div", *entries, class_="key") if entries else ""
