"""What a run looks like in a terminal: a live line while it trains, a table when it is done."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text

from atmc.experiment.run import Stage
from atmc.phases import EpochEnd, Record
from atmc.train import Progress

NARROW = 110  # columns below which a terminal gets the short forms, which fit 80
HEADING = "phase epoch    loss    clean   robust    nonzeros  primal / dual         time"


class Display:
    """Prints events of `run.run` as they come: one live line, and one line an epoch that stays; both fit 80 columns."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=4 if console.width < NARROW else 20),
            TimeRemainingColumn(table_column=Column(min_width=len("0:00:00"))),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=1.0, note="")
        self._record: Record | None = None
        self._last = 0.0

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the live line away."""
        self._bar.stop()

    def show(self, event: object) -> None:
        """One event."""
        if isinstance(event, Stage):
            self._console.print(event.text, style="dim", highlight=False, markup=False)
            self._bar.update(self._task, description="", total=None, note="")  # a bar that only moves
        elif isinstance(event, Progress):
            self._step(event)
        elif isinstance(event, EpochEnd):
            if self._record is None or self._record.phase != event.record.phase:
                self._console.print(HEADING, style="dim", highlight=False, soft_wrap=True)
            self._record = event.record
            self._console.print(_line(event.record), highlight=False, soft_wrap=True)

    def _step(self, event: Progress) -> None:
        now = time.monotonic()
        if now - self._last < 0.2 and not event.epoch_done:
            return
        self._last = now
        narrow = self._console.width < NARROW
        notes = [f"loss {event.loss:.{3 if narrow else 4}f}"]
        if self._record is not None:
            notes += [f"clean {self._record.clean:.1%}", f"robust {self._record.robust:.1%}"]
        if event.admm is not None:
            residuals = f"{event.admm.primal:.2g}/{event.admm.dual:.2g}"
            notes.append(f"res {residuals}" if narrow else f"residuals {residuals}")
        note = (" " if narrow else "  ").join(notes)
        description = f"{event.phase} {event.epoch}/{event.epochs}"
        self._bar.update(self._task, description=description, total=1.0, completed=event.share, note=note)


def _line(record: Record) -> str:
    """A row below `HEADING`."""
    loss = f"{record.loss:.4f}" if record.loss is not None else "-"
    residuals = "-"
    if record.primal is not None and record.dual is not None:
        residuals = f"{record.primal:.2g} / {record.dual:.2g}"
    return (
        f"{record.phase:>5} {record.epoch:>5}  {loss:>6}  {record.clean:>7.2%}  {record.robust:>7.2%}"
        f"  {record.nonzeros:>10,}  {residuals:<17} {record.seconds:>6,.1f} s"
    )


def percent(accuracy: Mapping[str, Any]) -> str:
    """'97.50 % [95.33, 98.67] of 360'."""
    low, high = accuracy["ci95"]
    return f"{accuracy['accuracy']:.2%} [{low:.2%}, {high:.2%}] of {accuracy['n']:,}"


def evaluation_table(figures: Mapping[str, Any]) -> Table:
    """Accuracies with 95 % intervals."""
    title = Text(f"{figures['model']} on {figures['data']}, {figures['threat']}")
    table = Table(title=title, title_justify="left")
    table.add_column("images")
    table.add_column("accuracy [95 % interval]", justify="right")
    table.add_row("clean", percent(figures["clean"]))
    for name, accuracy in figures["attacks"].items():
        table.add_row(name, percent(accuracy))
    return table


def result_table(metrics: Mapping[str, Any]) -> Table:
    """Accuracies and sizes of a finished run."""
    table = evaluation_table(metrics)
    table.columns[0].header, table.columns[1].header = "test split, decoded file", "accuracy [95 % interval]"
    dense = metrics["dense_file_bytes"]
    size = metrics["file_bytes"]
    table.add_section()
    table.add_row("file", f"{size:,} bytes")
    table.add_row("dense float32", f"{dense:,} bytes ({dense / size:.1f} times the file)")
    table.add_row("nonzeros", f"{metrics['nonzeros']:,} of {metrics['dense_weights']:,} weights")
    table.add_row("nominal ratio", f"{metrics['nominal_ratio']:.5f}")
    return table


def inspection_table(found: Mapping[str, Any], *, narrow: bool = False) -> Table:
    """The parts of a model file; a narrow table has each tensor's bytes in one sum."""
    table = Table(title=Text(f"{found['file']}: {found['file_bytes']:,} bytes"), title_justify="left")
    for name in ("tensor", "shape", "encoding"):
        table.add_column(name)
    parts = ("total",) if narrow else ("header", "positions", "codebook", "codes", "values", "total")
    for name in ("nonzeros", "levels", *parts):
        table.add_column("bytes" if narrow and name == "total" else name, justify="right")
    for row in found["tensors"]:
        sizes = [str(row["bytes"][part]) for part in parts]
        shape = "×".join(map(str, row["shape"]))
        table.add_row(Text(row["name"]), shape, row["encoding"], f"{row['nonzeros']:,}", str(row["levels"]), *sizes)
    totals = found["totals"]
    table.add_section()
    sums = [str(totals[part]) for part in parts[:-1]]
    tensors = found["file_bytes"] - totals["metadata and checksum"]
    table.add_row("all tensors", "", "", f"{totals['nonzeros']:,}", "", *sums, str(tensors))
    rest = [""] * (len(table.columns) - 2)
    table.add_row("metadata, checksum", *rest, str(totals["metadata and checksum"]))
    return table
