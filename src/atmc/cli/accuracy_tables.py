"""Tables of accuracies, as `atmc compress` and `atmc evaluate` print them when they are done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

VERDICTS = {True: "passed", False: "FAILED", None: "not run"}


def format_accuracy(accuracy: Mapping[str, Any]) -> str:
    """Return the text of an accuracy with its interval: '97.50% [95.33%, 98.67%] of 360'."""
    low, high = accuracy["ci95"]
    return f"{accuracy['accuracy']:.2%} [{low:.2%}, {high:.2%}] of {accuracy['n']:,}"


def accuracy_table(figures: Mapping[str, Any], title: str, heading: str) -> Table:
    """Return the table of clean accuracy and of accuracy under each attack, with 95 % intervals.

    Args:
        figures: as in metrics.json, with the keys clean, attacks, checks, worst_case if several attacks were run, and
            certified with attacked if images were verified.
        heading: of the first column.
    """
    table = new_table(title, [heading], ["accuracy [95 % interval]"])
    table.add_row("clean", format_accuracy(figures["clean"]))
    rows = dict(figures["attacks"])
    if "worst_case" in figures:
        rows["worst case of these"] = figures["worst_case"]
    for name, accuracy in rows.items():
        doubt = "  (!) NOT TO BE TRUSTED" if failed_checks(figures) else ""
        table.add_row(name, format_accuracy(accuracy) + doubt)
    if "certified" in figures:
        table.add_row("certified: at least, under every attack", format_accuracy(figures["certified"]))
        table.add_row(Text("[certified, attacked]"), Text(format_bracket(figures)))
    return table


def format_bracket(figures: Mapping[str, Any]) -> str:
    """Return the bounds of the accuracy under every attack, what is proved and what is not broken, as text.

    >>> format_bracket({"certified": {"accuracy": 0.625, "n": 360}, "attacked": {"accuracy": 0.65, "n": 360}})
    '[62.50%, 65.00%] of 360'
    """
    certified, attacked = figures["certified"], figures["attacked"]
    return f"[{certified['accuracy']:.2%}, {attacked['accuracy']:.2%}] of {certified['n']:,}"


def new_table(title: str, texts: Sequence[str], numbers: Sequence[str] = (), **options: Any) -> Table:
    """Return an empty table whose first columns hold text and whose last hold numbers, aligned at the right."""
    table = Table(title=Text(title), title_justify="left", **options)
    for heading in texts:
        table.add_column(heading)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def failed_checks(figures: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the checks of an evaluation that failed."""
    return [check for check in figures.get("checks", ()) if check["ok"] is False]


def verdict_tables(figures: Mapping[str, Any]) -> list[RenderableType]:
    """Return the table of the evaluation's checks, as a list that is empty if none were run."""
    if not figures.get("checks"):
        return []
    table = new_table("checks of the evaluation", ["check", "verdict", "figures"])
    for check in figures["checks"]:
        style = "bold red" if check["ok"] is False else ""
        table.add_row(check["name"], Text(VERDICTS[check["ok"]], style=style), Text(check["detail"]))
    return [table]


def warning_boxes(figures: Mapping[str, Any]) -> list[RenderableType]:
    """Return a box that warns of the checks that failed, in words, as a list that is empty if none did."""
    failed = failed_checks(figures)
    if not failed:
        return []
    lines = [f"  {check['name']}: {check['detail']}" for check in failed]
    text = "The accuracies under attack above may be far too high. Of the evaluation's checks, these failed:"
    title = f"WARNING: {len(failed)} CHECK{'S' if len(failed) > 1 else ''} FAILED, DO NOT TRUST THESE FIGURES"
    return [Panel(Text("\n".join([text, *lines])), title=Text(title, style="bold red"), border_style="bold red")]
