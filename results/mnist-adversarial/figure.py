"""Draw figure.svg, accuracy against nominal size, from summary.csv and the paper's curves in paper.json.

python results/mnist-adversarial/figure.py (needs the extra `plots`), after `atmc table` has made that page's tables.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
COLORS = {"32": "#0072b2", "8": "#d55e00", "4": "#009e73"}  # by bits


def main() -> None:
    """Draw one panel for clean images and one for images under attack."""
    with open(HERE / "summary.csv", newline="", encoding="utf-8") as file:
        runs = [row for row in csv.DictReader(file) if row["method"] == "atmc" and not row["max_bytes"]]
    paper = json.loads((HERE / "paper.json").read_text())
    plt.rcParams.update({"svg.hashsalt": "atmc", "font.size": 9, "svg.fonttype": "none"})
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True, sharey=True, layout="constrained")
    for axis, name, title in zip(axes, ("clean", "pgd"), ("clean", "under the paper's PGD, 76/255"), strict=True):
        for curve, style in (("ATMC-32bit", "--s"), ("ATMC-8bit", "--o"), ("AL0", ":^")):
            points = [point for point in paper[name][curve] if point[0] < 0.06]
            axis.plot(*zip(*points, strict=True), style, color="#7a7a7a", ms=4, lw=1, label=f"paper, {curve}")
        for bits, color in COLORS.items():
            rows = [row for row in runs if row["bits"] == bits]
            ratios, accuracies = ([float(row[key]) for row in rows] for key in ("nominal_ratio", name))
            bars = [[abs(float(row[name]) - float(row[f"{name}_{end}"])) for row in rows] for end in ("low", "high")]
            axis.errorbar(ratios, accuracies, bars, fmt="-o", color=color, ms=4, label=f"atmc, {bits} bits")
        axis.set(xscale="log", title=title, xlabel="nominal bits / (32 x dense weights)")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on 10,000 test images")
    axes[0].legend(loc="lower right", fontsize=8)
    figure.savefig(HERE / "figure.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
