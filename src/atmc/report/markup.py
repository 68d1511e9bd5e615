"""Functions that build HTML: elements, tables, and a page that needs no other file, with light and dark colors."""

from __future__ import annotations

import html
from collections.abc import Sequence

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # forbids scripts, and parts from elsewhere

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d8dee4; --page: #fff; --card: #f6f8fa;
  --good: #00694c; --bad: #a84300 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa5b1; --line: #30363d; --page: #0f1318;
  --card: #171c23; --good: #4fd1a5; --bad: #ff9d66 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere }
main { max-width: 1040px; margin: 0 auto; padding: 1.2rem 1.2rem 3rem }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .4rem 0 }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .7rem; padding-top: .9rem; border-top: 1px solid var(--line) }
p { margin: .5rem 0 }
.soft { color: var(--soft); font-size: .9rem }
.lead { font-size: 1.08rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .7rem; margin: 1.1rem 0 }
.tile, .card, pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .9rem;
  min-width: 0 }
.tile b { display: block; font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums }
.tile span { color: var(--soft); font-size: .85rem }
.wide { overflow-x: auto; margin: .6rem 0 }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 600; overflow-wrap: normal; vertical-align: bottom }
td.name { min-width: 7rem; max-width: 20rem }
td.label { white-space: nowrap; width: 1% }
td.path { min-width: 15rem; max-width: 24rem }
td.text { min-width: 10.5rem }
.text, .drawn { padding-left: .6rem }
@media (max-width: 560px) { main { padding: .8rem .9rem 2rem } td.name { min-width: 4.5rem } .drawn { display: none } }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
tfoot td { font-weight: 600 }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1.6rem 2rem;
  align-items: start }
.card h3 { font-size: .92rem; margin: 0 0 .4rem; display: flex; justify-content: space-between; gap: .8rem }
.card h3 > :last-child { white-space: nowrap }
.three { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .6rem; font-size: .82rem;
  line-height: 1.35 }
.three img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: pixelated;
  margin-bottom: .25rem }
.good { color: var(--good) }
.bad { color: var(--bad) }
.swatch { display: inline-block; width: .8em; height: .8em; border: 1px solid var(--soft); vertical-align: -.05em }
pre, code { font: .85rem/1.45 ui-monospace, monospace }
pre { white-space: pre-wrap }
ul { padding-left: 1.2rem; margin: .5rem 0 }
summary { cursor: pointer }
"""


def escape(text: str) -> str:
    """Escape text for an element's content or a quoted attribute."""
    return html.escape(text, quote=True)


def element(name: str, *content: str, **attributes: object) -> str:
    """Return the markup of one element.

    Args:
        content: markup.
        attributes: their names are written without a trailing "_" and with "-" for "_"; their values are escaped.

    >>> element("p", escape("1 < 2"), class_="a")
    '<p class="a">1 &lt; 2</p>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(f"{value:.1f}" if isinstance(value, float) else str(value))}"'
        for key, value in attributes.items()
    )
    return f"<{name}{given}>{''.join(content)}</{name}>"


def cut(text: str, length: int) -> str:
    """Shorten a text to a length by leaving out its middle.

    >>> cut("layer1.0.conv1.very_long_name", 12)
    'layer1…_name'
    """
    if len(text) <= length:
        return text
    return f"{text[: length // 2]}…{text[len(text) - (length - 1) // 2 :]}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], kinds: Sequence[str], *, foot: int = 0) -> str:
    """Return a table, which scrolls sideways if it is too wide.

    Args:
        header: texts; all empty for a table without a header.
        rows: cells as markup.
        kinds: each column's class: "name", "path" (a long name), "label" (a short one), "num", "text", "drawn" (hidden
            on a phone), or "".
        foot: number of rows at the end that are sums.
    """
    lines = [
        element("tr", *(element("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)))
        for row in rows
    ]
    cells = [element("th", escape(cell), class_=kind) for cell, kind in zip(header, kinds, strict=True)]
    split = len(lines) - foot
    parts = [element("thead", element("tr", *cells))] if any(header) else []
    parts += [element("tbody", *lines[:split])] + ([element("tfoot", *lines[split:])] if foot else [])
    return element("div", element("table", *parts), class_="wide")


def section(title: str, *content: str) -> str:
    """Return a part of a page with its heading."""
    return element("section", element("h2", escape(title)), *content)


def page(title: str, *content: str, style: str = "") -> str:
    """Return a whole page, which needs no other file."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    )
    head += element("title", escape(title)) + element("style", STYLE, style)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>{element("body", element("main", *content))}</html>\n'
