"""What a run looks like in a terminal: a live line while it trains, a table when it is done."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text

from atmc.cli.evaluation_display import attack_line, evaluation_tables
from atmc.commands.run import Stage
from atmc.evaluation.accuracy import Attacked
from atmc.evaluation.suspect import Check
from atmc.training.loop import Progress
from atmc.training.runner import EpochEnd, Record

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
        elif isinstance(event, Attacked):
            self._bar.update(self._task, description="evaluating", note=attack_line(event))
        elif isinstance(event, Check):
            self._bar.update(self._task, description="checking", note=event.name)
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


def result_tables(metrics: Mapping[str, Any]) -> list[RenderableType]:
    """Accuracies and sizes of a finished run, the checks, and a warning where one failed."""
    table, *doubts = evaluation_tables(metrics)
    assert isinstance(table, Table)
    table.columns[0].header, table.columns[1].header = "test split, decoded file", "accuracy [95 % interval]"
    dense = metrics["dense_file_bytes"]
    size = metrics["file_bytes"]
    table.add_section()
    most = f" of at most {metrics['max_bytes']:,}" if metrics.get("max_bytes") else ""
    table.add_row("file", f"{size:,} bytes{most}")
    table.add_row("dense float32", f"{dense:,} bytes ({dense / size:.1f} times the file)")
    table.add_row("nonzeros", f"{metrics['nonzeros']:,} of {metrics['dense_weights']:,} weights")
    table.add_row("nominal ratio", f"{metrics['nominal_ratio']:.5f}")
    return [table, *doubts]


def inspection_table(found: Mapping[str, Any], *, narrow: bool = False) -> Table:
    """The parts of a model file; a narrow table has each tensor's bytes in one sum."""
    meta, totals = found["metadata"], found["totals"]
    name, threat = meta["model"].get("name") or "own class", meta.get("threat") or "unknown"
    title = f"{found['file']}: {found['file_bytes']:,} bytes; {name}, {meta['classes']} classes, threat {threat}"
    table = Table(title=Text(title), title_justify="left")
    for column in ("tensor", "shape") if narrow else ("tensor", "shape", "stored"):
        table.add_column(column)
    parts = ("total", "excess") if narrow else ("positions", "codebook", "codes", "total", "floor", "excess")
    for column in ("nonzeros", "bits", *parts) if narrow else ("nonzeros", "levels", "bits", "rank", *parts):
        table.add_column("bytes" if narrow and column == "total" else column, justify="right")
    for row in found["tensors"]:
        sizes = [f"{row['bytes'][part]:,.1f}" if part in row["bytes"] else "" for part in parts]
        owner, _, factor = row["name"].rpartition(".")
        rank = str(found["factorized"][owner]["components"]) if factor == "U" and owner in found["factorized"] else ""
        cells = [Text(row["name"]), "×".join(map(str, row["shape"])), row["stored"], f"{row['nonzeros']:,}"]
        cells += [str(row["levels"]), str(row["bits"]), rank, *sizes]
        table.add_row(*(cell for i, cell in enumerate(cells) if not (narrow and i in (2, 4, 6))))
    outside = totals["metadata and checksums"]
    sums = {part: totals[part] for part in ("positions", "codebook", "codes", "floor", "excess")}
    sums["total"] = found["file_bytes"] - outside
    blank = [""] * (len(table.columns) - 2 - len(parts))
    table.add_section()
    nonzeros = f"{totals['nonzeros']:,}"
    before = [*blank[:1], nonzeros, *blank[1:]] if narrow else [*blank[:2], nonzeros, *blank[2:]]
    table.add_row("all tensors", *before, *(f"{sums[part]:,.1f}" for part in parts))
    around = [f"{outside:,.1f}" if part == "total" else "" for part in parts]
    table.add_row("metadata, CRCs", "", *blank, *around)
    dead = f"{totals['dead_outputs']:,} outputs and {totals['dead_inputs']:,} inputs of weights are dead"
    table.caption = f"bytes; rank of W - C; floor: log2 C(N, k) + k H(codes); {dead}"
    return table
