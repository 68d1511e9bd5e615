"""What is said of the measurements of `atmc bench`: medians, comparisons, who wins."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atmc.commands.bench.worker import OURS
from atmc.deploy.graph.graph import FloatArray


def summary(seconds: Sequence[float], batch: int) -> dict[str, Any]:
    """Median and quartiles of calls, in milliseconds."""
    low, median, high = (float(q) for q in np.percentile(seconds, (25, 50, 75)))
    times = {"median_ms": 1e3 * median, "q1_ms": 1e3 * low, "q3_ms": 1e3 * high}
    return times | {"images_per_second": batch / median, "calls": len(seconds)}


def comparison(logits: FloatArray, expected: FloatArray | None, labels: NDArray[np.int64] | None) -> dict[str, Any]:
    """Accuracy of logits (n, classes) where there are labels; how they differ from those expected.

    same_top1: images with the same largest logit. difference: the largest of a logit, over the largest |logit|.
    """
    found: dict[str, Any] = {"accuracy": None if labels is None else float((logits.argmax(1) == labels).mean())}
    if expected is not None:
        found["same_top1"] = int((logits.argmax(1) == expected.argmax(1)).sum())
        found["difference"] = float(np.abs(logits - expected).max() / max(float(np.abs(expected).max()), 1e-30))
    return found


def processor() -> str:
    """Its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def thread_count(count: int) -> str:
    """'2 threads'."""
    return f"{count} thread{'s' * (count > 1)}"


def timed(figures: Mapping[str, Any], threads: int, batch: int) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """Every engine that ran so, and its times."""
    for row in figures["engines"]:
        for times in row["times"]:
            if (times["threads"], times["batch"]) == (threads, batch):
                yield row, times


def verdict(figures: Mapping[str, Any]) -> list[str]:
    """Who wins: a sentence for each number of threads and each batch."""
    return [_sentence(figures, threads, batch) for threads in figures["threads"] for batch in figures["batches"]]


def _sentence(figures: Mapping[str, Any], threads: int, batch: int) -> str:
    rows = list(timed(figures, threads, batch))
    ours = next(times for row, times in rows if row["engine"] == OURS)
    rivals = [(row, times) for row, times in rows if row["engine"] != OURS]
    start = f"{thread_count(threads)}, batch {batch}: {OURS} takes {milliseconds(ours['median_ms'])} ms"
    if not rivals:
        return f"{start}; there is nothing to compare it with."
    exact = [pair for pair in rivals if pair[0]["precision"] == "float32"]
    best, best_exact = (min(some, key=_median, default=None) for some in (rivals, exact))
    assert best is not None
    parts = [_against(ours, *best, "the fastest of the others")]
    if best_exact is not None and best_exact is not best:
        parts.append(_against(ours, *best_exact, "the fastest of the others in float32"))
    return f"{start}, {' and '.join(parts)}."


def _median(pair: tuple[Mapping[str, Any], Mapping[str, Any]]) -> float:
    return float(pair[1]["median_ms"])


def _against(ours: Mapping[str, Any], row: Mapping[str, Any], theirs: Mapping[str, Any], place: str) -> str:
    """A comparison with one engine; none is called faster where the quartiles overlap."""
    factor = theirs["median_ms"] / ours["median_ms"]
    accuracy = "" if row["accuracy"] is None or row["precision"] == "float32" else f", {row['accuracy']:.1%} right"
    other = f"{place} ({named(row)}, {milliseconds(theirs['median_ms'])} ms{accuracy})"
    if ours["q3_ms"] >= theirs["q1_ms"] and theirs["q3_ms"] >= ours["q1_ms"]:
        return f"about as long as {other}"
    if factor > 1:
        return f"{times_as(factor)} times as fast as {other}"
    return f"{times_as(1 / factor)} times as slow as {other}"


def named(row: Mapping[str, Any]) -> str:
    """The engine, with its precision where the name does not say it."""
    shown = row["precision"] == "float32" or row["precision"] in row["engine"]
    return row["engine"] if shown else f"{row['engine']} {row['precision']}"


def milliseconds(value: float) -> str:
    """Three digits: 0.0123, 1.23, 123."""
    digits = max(0, 2 - int(np.floor(np.log10(value)))) if value > 0 else 0
    return f"{value:,.{digits}f}"


def times_as(factor: float) -> str:
    """A factor: 1.23, 12.3, 123."""
    return f"{factor:.2f}" if factor < 10 else f"{factor:.1f}" if factor < 100 else f"{factor:.0f}"
