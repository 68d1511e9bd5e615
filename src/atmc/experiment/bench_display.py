"""The tables of `atmc bench`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from atmc.experiment.bench_figures import milliseconds, thread_count


def bench_tables(figures: Mapping[str, Any]) -> list[RenderableType]:
    """Times for each number of threads; sizes and accuracy; what was left out; who wins."""
    tables: list[RenderableType] = [_times(figures, threads) for threads in figures["threads"]]
    tables.append(_sizes(figures))
    tables += [Text(f"left out: {name}: {reason}", "dim") for name, reason in figures["left_out"].items()]
    return [*tables, *map(Text, figures["verdict"])]


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=Text(title), title_justify="left")
    table.add_column("engine")
    table.add_column("precision")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _times(figures: Mapping[str, Any], threads: int) -> Table:
    batches = figures["batches"]
    title = f"{figures['model']}, {thread_count(threads)}: milliseconds a call, median [quartiles]"
    table = _table(title, (*(f"batch {batch}" for batch in batches), f"images/s at {batches[-1]}"))
    for row in figures["engines"]:
        found = {times["batch"]: times for times in row["times"] if times["threads"] == threads}
        cells = [_spread(found[batch]) for batch in batches]
        table.add_row(row["engine"], row["precision"], *cells, f"{found[batches[-1]]['images_per_second']:,.0f}")
    return table


def _spread(times: Mapping[str, Any]) -> str:
    median, low, high = (milliseconds(times[key]) for key in ("median_ms", "q1_ms", "q3_ms"))
    return f"{median} [{low}, {high}]"


def _sizes(figures: Mapping[str, Any]) -> Table:
    batches = [str(batch) for batch in figures["batches"]]
    macs, images = figures["macs"], figures["images"]
    title = (
        f"multiply-adds an image: {macs['dense']:,} dense, {macs['left']:,} left "
        f"({macs['left'] / max(macs['dense'], 1):.2%})"
    )
    memory = ("MB to load", *(f"MB, batch {batch}" for batch in batches))
    accuracy = ("accuracy",) if figures["data"] else ()
    table = _table(title, ("file, bytes", *memory, *accuracy, "same top-1", "difference"))
    for row in figures["engines"]:
        peaks = [row["load_bytes"], *(row["run_bytes"].get(batch) for batch in batches)]
        cells = [f"{row['file_bytes']:,}", *("" if peak is None else f"{peak / 1e6:,.1f}" for peak in peaks)]
        cells += [f"{row['accuracy']:.2%}"] if figures["data"] else []
        compared = [f"{row['same_top1']:,}", f"{row['difference']:.1g}"] if "difference" in row else ["", ""]
        table.add_row(row["engine"], row["precision"], *cells, *compared)
    kind = f"the first {images:,} test images of {figures['data']}" if figures["data"] else f"{images:,} random images"
    about = (
        f"memory: peak of a process of its own above what its packages take, {thread_count(figures['threads'][0])}; "
        f"same top-1 as PyTorch, and the largest difference of a logit over the largest |logit|: of {kind}"
    )
    if not figures["data"]:
        about += ", on which int8 was calibrated too: add --data for accuracies"
    ours = next(row for row in figures["engines"] if "runs" in row)
    table.caption = f"{about}. {ours['engine']} runs {ours['runs']}"
    return table
