"""What an evaluation looks like in a terminal: a live line while it attacks, tables when it is done."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from atmc.commands.partial_results import Measured
from atmc.evaluation.accuracy import Attacked
from atmc.evaluation.suspect import Check

WORDS = {True: "passed", False: "FAILED", None: "not told"}


class EvaluationDisplay:
    """Shows events of `assess`: one live line in a terminal, else a line for each stage of an attack."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn())
        note = TextColumn("{task.fields[note]}")
        self._bar = Bar(*columns, note, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("starting", total=1.0, note="")
        self._stage: tuple[str, str] | None = None
        self._last = 0.0

    def __enter__(self) -> EvaluationDisplay:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the live line away."""
        self._bar.stop()

    def show(self, event: object) -> None:
        """One event."""
        if isinstance(event, Attacked):
            now, stage = time.monotonic(), (event.attack, event.stage)
            if stage != self._stage and not self._console.is_terminal:
                self._console.print(attack_line(event), highlight=False, markup=False, soft_wrap=True)
            if stage != self._stage or now - self._last > 0.2:
                done, queued = event.verdicts.done, max(1, len(event.verdicts.queue))
                self._bar.update(self._task, description="attacking", completed=done / queued, note=attack_line(event))
                self._last = now
            self._stage = stage
        elif isinstance(event, Measured):
            line = f"{event.what}: {event.done:,} of {event.total:,}; {event.found}"
            self._bar.update(self._task, description="measuring", completed=event.done / event.total, note=line)
            if not self._console.is_terminal and (
                event.what != "certificate" or not event.done % 100 or event.done == event.total
            ):
                self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        elif isinstance(event, Check):
            self._bar.update(self._task, description="checking", completed=1.0, note=event.name)


def attack_line(event: Attacked) -> str:
    """'autoattack, fab-t: 250 of 683; 680 of 1,000 still right (68.0%)'."""
    done, queued = event.verdicts.done, len(event.verdicts.queue)
    name = event.attack if event.attack == event.stage else f"{event.attack}, {event.stage}"
    share = f"{event.right:,} of {event.judged:,} still right ({event.right / event.judged:.1%})"
    return f"{name}: {done:,} of {queued:,}; {share}"


def percent(accuracy: Mapping[str, Any]) -> str:
    """'97.50 % [95.33, 98.67] of 360'."""
    low, high = accuracy["ci95"]
    return f"{accuracy['accuracy']:.2%} [{low:.2%}, {high:.2%}] of {accuracy['n']:,}"


def evaluation_tables(figures: Mapping[str, Any], *, per_class: bool = False) -> list[RenderableType]:
    """Accuracies with 95 % intervals; the checks; whatever else was measured; and a warning where a check failed."""
    failed = [check for check in figures.get("checks", ()) if check["ok"] is False]
    title = Text(f"{figures['model']} on {figures['data']}, {figures['threat']}")
    table = Table(title=title, title_justify="left")
    table.add_column("images")
    table.add_column("accuracy [95 % interval]", justify="right")
    table.add_row("clean", percent(figures["clean"]))
    rows = dict(figures["attacks"])
    if "worst_case" in figures:
        rows["worst case of these"] = figures["worst_case"]
    for name, accuracy in rows.items():
        table.add_row(name, percent(accuracy) + ("  (!) NOT TO BE TRUSTED" if failed else ""))
    parts: list[RenderableType] = [table]
    parts += [_checks(figures["checks"])] if figures.get("checks") else []
    parts += [_against(figures["against"])] if "against" in figures else []
    parts += [_curve(f"accuracy against {key}", key, found) for key, found in figures.get("curves", {}).items()]
    parts += [_curve("certified accuracy", "radius", figures["certified"]["curve"])] if "certified" in figures else []
    parts += [_replay(figures["replay"])] if "replay" in figures else []
    parts += [_classes(figures["per_class"])] if per_class and "per_class" in figures else []
    parts += [warning(failed)] if failed else []
    return parts


def warning(failed: list[Mapping[str, Any]]) -> Panel:
    """In a box, in words, and not by color alone."""
    lines = [f"  {check['name']}: {check['detail']}" for check in failed]
    text = "The accuracies under attack above may be far too high. Of the evaluation's checks, these failed:"
    title = f"WARNING: {len(failed)} CHECK{'S' if len(failed) > 1 else ''} FAILED, DO NOT TRUST THESE FIGURES"
    return Panel(Text("\n".join([text, *lines])), title=Text(title, style="bold red"), border_style="bold red")


def _checks(checks: list[Mapping[str, Any]]) -> Table:
    table = Table(title="does the evaluation hold?", title_justify="left")
    for head in ("check", "verdict", "figures"):
        table.add_column(head)
    for check in checks:
        style = "bold red" if check["ok"] is False else ""
        table.add_row(check["name"], Text(WORDS[check["ok"]], style=style), Text(check["detail"]))
    return table


def _against(found: Mapping[str, Any]) -> Table:
    table = Table(
        title=Text(f"A against B = {found['model']}, same images, McNemar's exact test"), title_justify="left"
    )
    table.add_column("images")
    for head in ("B", "only A right", "only B right", "p", "verdict"):
        table.add_column(head, justify="right")
    for name, test in found["comparison"].items():
        figures = found["clean"] if name == "clean" else found["attacks"][name]
        counts = (f"{test['only_a']:,}", f"{test['only_b']:,}", f"{test['p']:.3g}", test["verdict"])
        table.add_row(name, percent(figures), *counts)
    return table


def _curve(title: str, key: str, points: list[Mapping[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(key, justify="right")
    table.add_column("accuracy [95 % interval]", justify="right")
    for point in points:
        table.add_row(f"{point[key]:.4g}", percent(point))
    return table


def _replay(found: Mapping[str, Any]) -> Table:
    table = Table(title=Text(f"replayed: {found['file']}"), title_justify="left")
    table.add_column("images")
    table.add_column("share [95 % interval]", justify="right")
    table.add_row("same prediction as the model attacked", percent(found["agreement"]))
    table.add_row("right", percent(found["accuracy"]))
    table.add_row("right, by the model attacked", f"{found['accuracy_of_the_attacked_model']:.2%}")
    return table


def _classes(found: Mapping[str, list[Mapping[str, Any]]]) -> Table:
    table = Table(title="by class", title_justify="left")
    table.add_column("class", justify="right")
    for name in found:
        table.add_column(name, justify="right")
    by_name = {name: {row["class"]: row for row in rows} for name, rows in found.items()}
    for label in sorted(by_name["clean"]):
        cells = [percent(rows[label]) if label in rows else "" for rows in by_name.values()]
        table.add_row(str(label), *cells)
    return table
