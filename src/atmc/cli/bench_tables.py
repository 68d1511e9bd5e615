"""The tables of `atmc bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from atmc.commands.bench.figures import format_milliseconds
from atmc.deploy.engine.engine import format_threads


def bench_tables(figures: Mapping[str, Any], *, narrow: bool = False) -> list[RenderableType]:
    """Return the tables of a measurement: times per number of threads, sizes, engines left out, and verdicts.

    Args:
        figures: as in the JSON of `atmc bench`.
        narrow: leave columns out, so that the tables fit 80 columns.
    """
    tables: list[RenderableType] = [_times(figures, threads, narrow) for threads in figures["threads"]]
    tables.append(_sizes(figures, narrow))
    tables += [Text(f"left out: {name}: {reason}", "dim") for name, reason in figures["left_out"].items()]
    return [*tables, *map(Text, figures["verdict"])]


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=Text(title), title_justify="left", caption_justify="left")
    table.add_column("engine", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _times(figures: Mapping[str, Any], threads: int, narrow: bool) -> Table:
    batches = figures["batches"]
    kind = "median" if narrow else "median [quartiles]"
    title = f"{figures['model']}, {format_threads(threads)}: milliseconds per call, {kind}"
    table = _table(title, ("precision", *(f"batch {batch}" for batch in batches), f"images/s at {batches[-1]}"))
    for row in figures["engines"]:
        by_batch = {times["batch"]: times for times in row["times"] if times["threads"] == threads}
        cells = [_quartiles(by_batch[batch], narrow) for batch in batches]
        table.add_row(row["engine"], row["precision"], *cells, f"{by_batch[batches[-1]]['images_per_second']:,.0f}")
    return table


def _quartiles(times: Mapping[str, Any], narrow: bool) -> str:
    median, low, high = (format_milliseconds(times[key]) for key in ("median_ms", "q1_ms", "q3_ms"))
    return median if narrow else f"{median} [{low}, {high}]"


def _sizes(figures: Mapping[str, Any], narrow: bool) -> Table:
    batches = [str(batch) for batch in figures["batches"][: 1 if narrow else None]]
    macs, labeled = figures["macs"], figures["data"] is not None
    title = "sizes"
    if macs is not None:
        left = f"{macs['left']:,} left ({macs['left'] / max(macs['dense'], 1):.2%})"
        title = f"multiply-adds per image: {macs['dense']:,} dense, {left}"
    peaks = [*([] if narrow else ["load"]), *batches]
    names = ["to load" if name == "load" else f"batch {name}" for name in peaks]
    columns = ["file, bytes", *(f"MB {name}" for name in names), *["accuracy"] * labeled]
    table = _table(title, [*columns, *["same top-1"] * (not narrow), "difference"])
    for row in figures["engines"]:
        memory = (row["run_bytes"].get(name) if name != "load" else row["load_bytes"] for name in peaks)
        cells = [f"{row['file_bytes']:,}", *("" if peak is None else f"{peak / 1e6:,.1f}" for peak in memory)]
        cells += [f"{row['accuracy']:.2%}"] if labeled else []
        compared = [f"{row['same_top1']:,}", f"{row['difference']:.1g}"] if "difference" in row else ["", ""]
        table.add_row(row["engine"], *cells, *compared[narrow:])
    table.caption = Text(_caption(figures))
    return table


def _caption(figures: Mapping[str, Any]) -> str:
    images, data = figures["images"], figures["data"]
    kind = f"{images:,} random images" if data is None else f"the first {images:,} test images of {data}"
    threads = format_threads(figures["threads"][0])
    caption = (
        f"memory: peak of the engine's own process beyond its imported packages, {threads}; "
        f"same top-1 as PyTorch, and the largest difference of a logit over the largest |logit|: on {kind}"
    )
    if data is None:
        caption += ", which calibrated int8 too: add --data for accuracies"
    ours = next((row for row in figures["engines"] if "runs" in row), None)
    return f"{caption}. {ours['engine']} runs {ours['runs']}" if ours else caption
