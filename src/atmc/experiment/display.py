"""What a run looks like in a terminal: a live line while it trains, a table when it is done."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from atmc.experiment.evaluation_display import attack_line, evaluation_tables
from atmc.experiment.run import Stage
from atmc.phases import EpochEnd, Record
from atmc.robust.evaluate import Attacked
from atmc.robust.suspect import Check
from atmc.train import Progress


class Display:
    """Prints events of `run.run` as they come: one live line, and one line an epoch that stays."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
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
        elif isinstance(event, Progress):
            self._step(event)
        elif isinstance(event, Attacked):
            self._bar.update(self._task, description="evaluating", note=attack_line(event))
        elif isinstance(event, Check):
            self._bar.update(self._task, description="checking", note=event.name)
        elif isinstance(event, EpochEnd):
            self._record = event.record
            self._console.print(_line(event.record), highlight=False, soft_wrap=True)

    def _step(self, event: Progress) -> None:
        now = time.monotonic()
        if now - self._last < 0.2 and not event.epoch_done:
            return
        self._last = now
        note = f"loss {event.loss:.4f}"
        if self._record is not None:
            note += f"  clean {self._record.clean:.1%}  robust {self._record.robust:.1%}"
        if event.admm is not None:
            note += f"  residuals {event.admm.primal:.3g} / {event.admm.dual:.3g}"
        description = f"{event.phase} {event.epoch}/{event.epochs}"
        self._bar.update(self._task, description=description, completed=event.share, note=note)


def _line(record: Record) -> str:
    loss = f"{record.loss:7.4f}" if record.loss is not None else "      -"
    text = (
        f"{record.phase:>5} {record.epoch:>3}  loss {loss}  clean {record.clean:6.2%}  robust {record.robust:6.2%}"
        f"  nonzeros {record.nonzeros:,}"
    )
    if record.primal is not None and record.dual is not None:
        text += f"  residuals {record.primal:.3g} / {record.dual:.3g}"
    return f"{text}  {record.seconds:.1f} s"


def result_tables(metrics: Mapping[str, Any]) -> list[RenderableType]:
    """Accuracies and sizes of a finished run, the checks, and a warning where one failed."""
    table, *doubts = evaluation_tables(metrics)
    assert isinstance(table, Table)
    table.columns[0].header, table.columns[1].header = "test split, decoded file", "accuracy [95 % interval]"
    dense = metrics["dense_file_bytes"]
    size = metrics["file_bytes"]
    table.add_section()
    table.add_row("file", f"{size:,} bytes")
    table.add_row("dense float32", f"{dense:,} bytes ({dense / size:.1f} times the file)")
    table.add_row("nonzeros", f"{metrics['nonzeros']:,} of {metrics['dense_weights']:,} weights")
    table.add_row("nominal ratio", f"{metrics['nominal_ratio']:.5f}")
    return [table, *doubts]


def inspection_table(found: Mapping[str, Any]) -> Table:
    """The parts of a model file."""
    table = Table(title=Text(f"{found['file']}: {found['file_bytes']:,} bytes"), title_justify="left")
    for name in ("tensor", "shape", "encoding"):
        table.add_column(name)
    parts = ("header", "positions", "codebook", "codes", "values", "total")
    for name in ("nonzeros", "levels", *parts):
        table.add_column(name, justify="right")
    for row in found["tensors"]:
        sizes = [str(row["bytes"][part]) for part in parts]
        shape = "×".join(map(str, row["shape"]))
        table.add_row(Text(row["name"]), shape, row["encoding"], f"{row['nonzeros']:,}", str(row["levels"]), *sizes)
    totals = found["totals"]
    table.add_section()
    sums = [str(totals[part]) for part in parts[:-1]]
    tensors = found["file_bytes"] - totals["metadata and checksum"]
    table.add_row("all tensors", "", "", f"{totals['nonzeros']:,}", "", *sums, str(tensors))
    table.add_row("metadata, checksum", "", "", "", "", "", "", "", "", "", str(totals["metadata and checksum"]))
    return table
