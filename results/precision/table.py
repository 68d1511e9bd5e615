"""Write README.md from the runs beside this file. Run: python results/precision/table.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def rounding(metrics: dict[str, Any]) -> str:
    """'+0.00, -0.70': what float16 changed of the validation accuracies, in points; or that it was not taken."""
    after = metrics["validation"]
    before = after["before_rounding"]
    changes = (100 * (after[name]["accuracy"] - before[name]["accuracy"]) for name in ("clean", "pgd"))
    return ", ".join(f"{change:+.2f}" for change in changes) + ("" if after["fp16"] else " (float32)")


def main() -> None:
    """One row a pair of runs that differ in precision alone."""
    lines = [
        "| run | clean, bf16 | clean, fp32 | pgd, bf16 | pgd, fp32 | bf16 inside fp32's interval: clean, pgd | "
        "rounding, bf16: clean, pgd | rounding, fp32 | seconds an epoch, bf16 / fp32 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(HERE.glob("*bf16*/metrics.json")):
        cells, inside, seconds = [], [], []
        other = Path(str(path).replace("bf16", "fp32"))
        if not other.exists():
            continue
        both = [json.loads(file.read_text()) for file in (path, other)]
        for name in ("clean", "pgd"):
            figures = [metrics["clean"] if name == "clean" else metrics["attacks"]["pgd"] for metrics in both]
            low, high = figures[1]["ci95"]
            inside.append("yes" if low <= figures[0]["accuracy"] <= high else "**no**")
            for figure in figures:
                low, high = figure["ci95"]
                cells.append(f"{100 * figure['accuracy']:.2f} [{100 * low:.2f}, {100 * high:.2f}] of {figure['n']:,}")
        for file in (path, other):
            log = [json.loads(line) for line in (file.parent / "log.jsonl").read_text().splitlines()]
            times = sorted(line["seconds"] for line in log if line["phase"] == "dense")
            seconds.append(times[len(times) // 2])
        name = path.parent.name.replace("-bf16", "")
        cells += [", ".join(inside), *map(rounding, both)]
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds[0]:.1f} / {seconds[1]:.1f} |")
    (HERE / "README.md").write_text((HERE / "about.md").read_text() + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
