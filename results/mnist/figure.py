"""Draw figure.svg: accuracy against bytes, proved and attacked, of these files and of those trained against attacks.

python results/mnist/figure.py (needs the extra `plots`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
ADVERSARIAL, EVALUATION = HERE.parent / "mnist-adversarial", HERE.parent / "evaluation" / "mnist"
RUNS = ("bytes-1500-ranked", "bytes-4500-ranked", "bytes-9400", "bytes-40000", "dense")  # seed 0
DENSE_BYTES = 4 * 430_500  # of the weights in float32
BLUE, ORANGE, GRAY = "#0072b2", "#d55e00", "#7a7a7a"


def read(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


def main() -> None:
    """Draw a bracket from proved to attacked per file with proofs, and points for the others."""
    plt.rcParams.update({"svg.hashsalt": "atmc", "font.size": 9, "svg.fonttype": "none"})
    figure, axis = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
    brackets = []
    for run in RUNS:
        verdicts = read(HERE / run / "verify-autoattack.json")
        size = read(HERE / run / "metrics.json")["file_bytes"]
        brackets.append((size, verdicts["certified"]["accuracy"], verdicts["attacked"]["accuracy"]))
    brackets.sort()
    sizes, proved, attacked = zip(*brackets, strict=True)
    axis.vlines(sizes, proved, attacked, color=BLUE, lw=2)
    axis.plot(sizes, proved, "-^", color=BLUE, ms=5, lw=1, label="trained for bounds: proved, every attack")
    axis.plot(sizes, attacked, ":v", color=BLUE, ms=5, lw=1, label="trained for bounds: left by AutoAttack")
    others = []
    for path in sorted(ADVERSARIAL.glob("*/metrics.json")):
        evaluation = read(EVALUATION / f"{path.parent.name}.json")
        others.append((read(path)["file_bytes"], evaluation["attacks"]["autoattack"]["accuracy"]))
    others.sort()
    axis.plot(*zip(*others, strict=True), "x", color=ORANGE, label="trained against attacks: left by AutoAttack")
    paper = read(ADVERSARIAL / "paper.json")["pgd"]
    for curve, style in (("ATMC-32bit", "--s"), ("ATMC-8bit", ":o")):
        points = [(ratio * DENSE_BYTES, accuracy) for ratio, accuracy in paper[curve]]
        axis.plot(*zip(*points, strict=True), style, color=GRAY, ms=3, lw=1, label=f"paper, {curve}: left by its PGD")
    axis.set(xscale="log", xlabel="bytes (of the paper's networks: nonzeros x bits / 8)", ylim=(0.5, 1.0))
    axis.set_ylabel("accuracy within 76/255, first 1,000 test images")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=8)
    figure.savefig(HERE / "figure.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
