"""What a run looks like in a terminal: a live line while it trains, a table when it is done."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from atmc.experiment.run import Stage
from atmc.phases import EpochEnd, Record
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


def inspection_table(found: Mapping[str, Any]) -> Table:
    """The parts of a model file."""
    meta = found["metadata"]
    about = (
        f"{meta['model'].get('name') or 'own class'}, {meta['classes']} classes, threat {meta['threat'] or 'unknown'}"
    )
    table = Table(title=Text(f"{found['file']}: {found['file_bytes']:,} bytes; {about}"), title_justify="left")
    for name in ("tensor", "shape", "stored"):
        table.add_column(name)
    parts = ("positions", "codebook", "codes", "total", "floor", "excess")
    for name in ("nonzeros", "levels", "bits", "rank", *parts):
        table.add_column(name, justify="right")
    for row in found["tensors"]:
        sizes = [f"{row['bytes'][part]:,.1f}" if part in row["bytes"] else "" for part in parts]
        owner, _, factor = row["name"].rpartition(".")
        rank = str(found["factorized"][owner]["components"]) if factor == "U" and owner in found["factorized"] else ""
        shape = "×".join(map(str, row["shape"]))
        held = (f"{row['nonzeros']:,}", str(row["levels"]), str(row["bits"]), rank)
        table.add_row(Text(row["name"]), shape, row["stored"], *held, *sizes)
    totals, outside = found["totals"], found["totals"]["metadata and checksums"]
    sums = [f"{totals[part]:,.1f}" for part in ("positions", "codebook", "codes")]
    excess = [f"{totals[part]:,.1f}" for part in ("floor", "excess")]
    table.add_section()
    inside = f"{found['file_bytes'] - outside:,.1f}"
    table.add_row("all tensors", "", "", f"{totals['nonzeros']:,}", "", "", "", *sums, inside, *excess)
    table.add_row("metadata, checksums", *[""] * 9, f"{outside:,.1f}", "", "")
    dead = f"{totals['dead_outputs']:,} outputs and {totals['dead_inputs']:,} inputs of weights are dead"
    table.caption = f"bytes; rank of W - C; floor: log2 C(N, k) + k H(codes); {dead}"
    return table
