"""Figures and sentences from the measurements of `atmc bench`: medians, comparisons, which engine is fastest."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atmc.commands.bench.worker import OURS
from atmc.deploy.engine.engine import format_threads
from atmc.deploy.graph.graph import FloatArray


def summarize_times(seconds: Sequence[float], batch: int) -> dict[str, Any]:
    """Return median and quartiles of the times of calls in milliseconds, and images per second."""
    low, median, high = (float(q) for q in np.percentile(seconds, (25, 50, 75)))
    times = {"median_ms": 1e3 * median, "q1_ms": 1e3 * low, "q3_ms": 1e3 * high}
    return times | {"images_per_second": batch / median, "calls": len(seconds)}


def compare_logits(logits: FloatArray, expected: FloatArray | None, labels: NDArray[np.int64] | None) -> dict[str, Any]:
    """Return the accuracy of logits (n, classes) if there are labels, and how they differ from those expected.

    Returns:
        accuracy, None without labels; same_top1, the number of images with the same top-1 class; and difference, the
        largest of a logit over the largest |logit|.
    """
    figures: dict[str, Any] = {"accuracy": None if labels is None else float((logits.argmax(1) == labels).mean())}
    if expected is not None:
        figures["same_top1"] = int((logits.argmax(1) == expected.argmax(1)).sum())
        figures["difference"] = float(np.abs(logits - expected).max() / max(float(np.abs(expected).max()), 1e-30))
    return figures


def processor_name() -> str:
    """Return the name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def find_times(
    figures: Mapping[str, Any], threads: int, batch: int
) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """Yield every engine that ran on that number of threads and batch size, with its times."""
    for row in figures["engines"]:
        for times in row["times"]:
            if (times["threads"], times["batch"]) == (threads, batch):
                yield row, times


def describe_fastest(figures: Mapping[str, Any]) -> list[str]:
    """Return which engine is fastest: one sentence per number of threads and batch size."""
    return [_describe_case(figures, threads, batch) for threads in figures["threads"] for batch in figures["batches"]]


def _describe_case(figures: Mapping[str, Any], threads: int, batch: int) -> str:
    rows = list(find_times(figures, threads, batch))
    ours = next((times for row, times in rows if row["engine"] == OURS), None)
    if ours is None:
        row, times = min(rows, key=_median)
        fastest = f"{engine_label(row)}, {format_milliseconds(times['median_ms'])} ms"
        return f"{format_threads(threads)}, batch {batch}: {OURS} cannot run the model; the fastest is {fastest}."
    baselines = [(row, times) for row, times in rows if row["engine"] != OURS]
    start = f"{format_threads(threads)}, batch {batch}: {OURS} takes {format_milliseconds(ours['median_ms'])} ms"
    if not baselines:
        return f"{start}; there is nothing to compare it with."
    float32 = [pair for pair in baselines if pair[0]["precision"] == "float32"]
    best, best_float32 = (min(pairs, key=_median, default=None) for pairs in (baselines, float32))
    assert best is not None
    parts = [_compare_times(ours, *best, "the fastest of the others")]
    if best_float32 is not None and best_float32 is not best:
        parts.append(_compare_times(ours, *best_float32, "the fastest of the others in float32"))
    return f"{start}, {' and '.join(parts)}."


def _median(pair: tuple[Mapping[str, Any], Mapping[str, Any]]) -> float:
    return float(pair[1]["median_ms"])


def _compare_times(ours: Mapping[str, Any], row: Mapping[str, Any], baseline: Mapping[str, Any], rank: str) -> str:
    """Compare the times with those of one engine in words; neither is called faster if the quartiles overlap."""
    factor = baseline["median_ms"] / ours["median_ms"]
    accuracy = "" if row["accuracy"] is None or row["precision"] == "float32" else f", {row['accuracy']:.1%} right"
    other = f"{rank} ({engine_label(row)}, {format_milliseconds(baseline['median_ms'])} ms{accuracy})"
    if ours["q3_ms"] >= baseline["q1_ms"] and baseline["q3_ms"] >= ours["q1_ms"]:
        return f"about as long as {other}"
    if factor > 1:
        return f"{format_factor(factor)} times as fast as {other}"
    return f"{format_factor(1 / factor)} times as slow as {other}"


def engine_label(row: Mapping[str, Any]) -> str:
    """Return the name of an engine, with its precision unless that is float32 or part of the name."""
    implied = row["precision"] == "float32" or row["precision"] in row["engine"]
    return row["engine"] if implied else f"{row['engine']} {row['precision']}"


def format_milliseconds(value: float) -> str:
    """Format milliseconds with three digits: 0.0123, 1.23, 123."""
    digits = max(0, 2 - int(np.floor(np.log10(value)))) if value > 0 else 0
    return f"{value:,.{digits}f}"


def format_factor(factor: float) -> str:
    """Format a factor with three digits: 1.23, 12.3, 123."""
    return f"{factor:.2f}" if factor < 10 else f"{factor:.1f}" if factor < 100 else f"{factor:.0f}"
