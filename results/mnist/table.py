"""Write README.md, summary.csv and figure.svg from the runs beside this file (needs the extra `plots`).

python results/mnist/table.py
"""

from __future__ import annotations

import csv
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from atmc.pack.inspect import inspection

HERE = Path(__file__).parent


def paper_value(curve: list[list[float]], ratio: float) -> float | None:
    """The paper's accuracy at a nominal ratio, interpolated linearly between its points; None outside them."""
    for (left, low), (right, high) in pairwise(curve):
        if left * 0.98 <= ratio <= right * 1.02:
            share = min(1.0, max(0.0, (ratio - left) / (right - left)))
            return low + share * (high - low)
    return None


def rows() -> list[dict[str, Any]]:
    """One row a finished run, with the paper's value at the same nominal ratio."""
    paper = json.loads((HERE / "paper.json").read_text())
    found = []
    for path in sorted(HERE.glob("*/metrics.json")):
        metrics = json.loads(path.read_text())
        curve = "DA" if metrics["method"] == "da" else "ATMC-8bit" if metrics["bits"] else "ATMC-32bit"
        row: dict[str, Any] = {"run": path.parent.name, "method": metrics["method"], "bits": metrics["bits"] or 32}
        row |= {"nonzeros": metrics["nonzeros"], "k_ratio": round(metrics["nonzeros"] / metrics["dense_weights"], 5)}
        row["max_bytes"] = re.fullmatch(r"bytes-(\d+)|.*", path.parent.name)[1]
        row |= {"nominal_ratio": round(metrics["nominal_ratio"], 5), "file_bytes": metrics["file_bytes"]}
        for name, ours in (("clean", metrics["clean"]), ("pgd", metrics["attacks"]["pgd"])):
            theirs = paper[name][curve]
            value = theirs if isinstance(theirs, float) else paper_value(theirs, metrics["nominal_ratio"])
            row |= {name: ours["accuracy"], f"{name}_low": ours["ci95"][0], f"{name}_high": ours["ci95"][1]}
            row[f"{name}_paper"] = None if value is None else round(value, 4)
        strong = metrics["attacks"]["pgd-strong"]
        row |= {
            "pgd_strong": strong["accuracy"],
            "pgd_strong_low": strong["ci95"][0],
            "pgd_strong_high": strong["ci95"][1],
        }
        row |= {"n": strong["n"], "seed": metrics["seed"], "minutes": round(metrics["seconds"] / 60, 1)}
        before, after = metrics["validation"]["before_rounding"], metrics["validation"]
        for name in ("clean", "pgd"):
            row[f"{name}_rounding"] = round(after[name]["accuracy"] - before[name]["accuracy"], 6)
        stored = HERE.parent / "evaluation" / "mnist" / f"{path.parent.name}.json"
        attacks = json.loads(stored.read_text())["attacks"] if stored.exists() else {}
        if auto := attacks.get("autoattack"):
            low, high = auto["ci95"]
            row |= {"autoattack": auto["accuracy"], "autoattack_low": low, "autoattack_high": high}
        else:
            row |= dict.fromkeys(("autoattack", "autoattack_low", "autoattack_high"))
        held = inspection(path.with_name("model.atmc"))
        terms = [held["factorized"].get(name, {"components": 0})["components"] for name in held["dead_channels"]]
        row["live_terms"] = "–" if metrics["method"] == "da" else " ".join(map(str, terms))
        found.append(row)
    return sorted(found, key=lambda row: (row["method"] != "da", row["nonzeros"], -row["bits"]))


def percent(row: dict[str, Any], name: str) -> str:
    """'89.40 [88.78, 89.99]'."""
    if row[name] is None:
        return "not yet"
    return f"{row[name]:.2%} [{row[name + '_low']:.2%}, {row[name + '_high']:.2%}]".replace("%", "")


def draw(table: list[dict[str, Any]]) -> None:
    """figure.svg: accuracy against nominal size, ours and the paper's."""
    import matplotlib.pyplot as plt

    paper = json.loads((HERE / "paper.json").read_text())
    plt.rcParams.update({"svg.hashsalt": "atmc", "font.size": 9, "svg.fonttype": "none"})
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True, sharey=True, layout="constrained")
    for axis, name, title in zip(axes, ("clean", "pgd"), ("clean", "under the paper's PGD, 76/255"), strict=True):
        for curve, style in (("ATMC-32bit", "--s"), ("ATMC-8bit", "--o"), ("AL0", ":^")):
            points = [point for point in paper[name][curve] if point[0] < 0.06]
            axis.plot(*zip(*points, strict=True), style, color="#7a7a7a", ms=4, lw=1, label=f"paper, {curve}")
        for bits, color in ((32, "#0072b2"), (8, "#d55e00"), (4, "#009e73")):
            ours = [row for row in table if row["bits"] == bits and row["method"] == "atmc" and not row["max_bytes"]]
            bars = [[abs(row[name] - row[f"{name}_{end}"]) for row in ours] for end in ("low", "high")]
            at = [row["nominal_ratio"] for row in ours]
            axis.errorbar(
                at, [row[name] for row in ours], bars, fmt="-o", color=color, ms=4, label=f"atmc, {bits} bits"
            )
        axis.set(xscale="log", title=title, xlabel="nominal bits / (32 x dense weights)")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on 10,000 test images")
    axes[0].legend(loc="lower right", fontsize=8)
    figure.savefig(HERE / "figure.svg", metadata={"Date": None})


def main() -> None:
    """All three files."""
    table = rows()
    draw(table)
    with open(HERE / "summary.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)

    def theirs(row: dict[str, Any], name: str) -> str:
        return "–" if row[f"{name}_paper"] is None else f"{100 * row[f'{name}_paper']:.2f}"

    head = (HERE / "about.md").read_text()
    lines = [
        "| run | k / N | bits | nominal ratio | file, bytes | clean | paper | pgd | paper | pgd-strong | AutoAttack "
        "| rounding: clean, pgd | terms of U V |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for row in table:
        lines.append(
            f"| `{row['run']}` | {row['k_ratio']} | {row['bits']} | {row['nominal_ratio']} | {row['file_bytes']:,} "
            f"| {percent(row, 'clean')} | {theirs(row, 'clean')} "
            f"| {percent(row, 'pgd')} | {theirs(row, 'pgd')} | {percent(row, 'pgd_strong')} "
            f"| {percent(row, 'autoattack')} | {100 * row['clean_rounding']:+.2f}, {100 * row['pgd_rounding']:+.2f} "
            f"| {row['live_terms']} |"
        )
    (HERE / "README.md").write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
