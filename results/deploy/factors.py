"""Compute how many times as fast as the best dense engine the engine of atmc is; write factors.json from engines.json.

python results/deploy/factors.py; then `atmc table --page results/deploy/README.md` draws the tables.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OURS = "atmc"
TARGETS = {90: {1: 2, 64: 2}, 95: {1: 4, 64: 3.5}, 99: {1: 12, 64: 10}, 99.5: {1: 20, 64: 15}}  # ResNets, float32
INT8_TARGETS = {99: 4}
LENET_TARGET = 3


def collect_times(measurement: dict[str, Any], batch: int) -> dict[str, dict[str, Any]]:
    """Return each engine's figures with one thread and this batch size, by its name."""
    return {
        row["engine"]: row | times
        for row in measurement["engines"]
        for times in row["times"]
        if (times["threads"], times["batch"]) == (1, batch)
    }


def compute_factor(measurement: dict[str, Any], batch: int, baseline: str) -> float:
    """Return how many times as fast the engine of atmc is as the best engine of a baseline."""
    rows = collect_times(measurement, batch)
    best = min(row["median_ms"] for name, row in rows.items() if name != OURS and is_of(row, baseline))
    return float(best / rows[OURS]["median_ms"])


def is_of(row: dict[str, Any], baseline: str) -> bool:
    """Return whether an engine belongs to a baseline: a precision, or "as it is", the network without simplification.

    PyTorch always runs the network as it is.
    """
    if baseline != "as it is":
        return bool(row["precision"] == baseline)
    as_it_is = row["engine"].startswith("PyTorch") or row["engine"].endswith("unsimplified")
    return bool(as_it_is and row["precision"] == "float32")


def find_target(case: dict[str, Any], batch: int, baseline: str) -> float | None:
    """Return the target of a case, or None if it has none."""
    if baseline in ("as it is", "bfloat16"):
        return None
    if baseline == "int8":
        return INT8_TARGETS.get(case["zeros"]) if case["network"].startswith("resnet") else None
    if case["network"] == "lenet":
        return LENET_TARGET
    return TARGETS[case["zeros"]][batch] if case["network"].startswith("resnet") else None


def describe_factor(case: dict[str, Any], batch: int, baseline: str) -> dict[str, Any]:
    """Return a case's factor: the median over the measurements, the range, the target, and all of it as text."""
    values = [compute_factor(measurement, batch, baseline) for measurement in case["sessions"]]
    median, wanted = statistics.median(values), find_target(case, batch, baseline)
    text = f"{median:.3g}"
    if len(values) > 1:
        text += f" ({min(values):.3g}–{max(values):.3g})"
    if wanted is not None:
        text += f" of {wanted}"
    missed = wanted is not None and median < wanted
    return {"median": median, "values": values, "target": wanted, "missed": missed, "text": text}


def describe_times(case: dict[str, Any], batch: int) -> dict[str, str]:
    """Return each engine's median and half quartile distance in ms, of the measurement with the median factor."""
    ordered = sorted(case["sessions"], key=lambda measurement: compute_factor(measurement, batch, "float32"))
    rows = collect_times(ordered[(len(ordered) - 1) // 2], batch)
    return {
        name: f"{format_digits(row['median_ms'], 3)} ±{format_digits((row['q3_ms'] - row['q1_ms']) / 2, 1)}"
        for name, row in rows.items()
    }


def format_digits(value: float, count: int) -> str:
    """Return a number with this number of significant digits, without a power of ten."""
    decimals = max(0, count - 1 - math.floor(math.log10(value))) if value else 0
    return f"{float(f'{value:.{count}g}'):,.{decimals}f}"


def describe_batch(case: dict[str, Any], batch: int) -> dict[str, Any]:
    """Return the factors and times of a batch size."""
    factors = {name: describe_factor(case, batch, name) for name in ("float32", "as it is", "int8", "bfloat16")}
    return {"factors": factors, "ms": describe_times(case, batch)}


def main() -> None:
    """Write one row per case."""
    cases = json.loads((HERE / "engines.json").read_text())
    rows = []
    for case in cases.values():
        macs = case["sessions"][0]["macs"]
        row = {name: case[name] for name in ("network", "pattern", "zeros")}
        row |= {"macs_left": macs["left"] / macs["dense"]}
        rows.append(row | {f"batch_{batch}": describe_batch(case, batch) for batch in (1, 64)})
    measurements = [measurement for case in cases.values() for measurement in case["sessions"]]
    made_on = {
        **measurements[-1]["machine"],
        "versions": measurements[-1]["versions"],
        "dates": sorted({measurement["date"] for measurement in measurements}),
        "runs": sorted(
            {row["runs"] for measurement in measurements for row in measurement["engines"] if "runs" in row}
        ),
    }
    (HERE / "factors.json").write_text(json.dumps({"made_on": made_on, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
