"""Write README.md from about.md and the runs beside this file. Run: python results/cifar10/table.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BRIEF = ("brief-10", "brief-1", "brief-05")
PROOFS = ("proof-resnet18", "proof-resnet34")


def read(name: str) -> dict[str, Any] | None:
    """A run's metrics, if it is finished."""
    path = HERE / name / "metrics.json"
    return json.loads(path.read_text()) if path.exists() else None


def percent(figure: dict[str, Any] | None) -> str:
    """'89.40 [88.78, 89.99] of 10,000'."""
    if figure is None:
        return "–"
    low, high = figure["ci95"]
    return f"{100 * figure['accuracy']:.2f} [{100 * low:.2f}, {100 * high:.2f}] of {figure['n']:,}"


def rounding(run: dict[str, Any]) -> str:
    """'-0.02, +0.00': what rounding changed of the validation accuracies, clean and pgd, in points."""
    after = run["validation"]
    before = after["before_rounding"]
    changes = (100 * (after[name]["accuracy"] - before[name]["accuracy"]) for name in ("clean", "pgd"))
    return ", ".join(f"{change:+.2f}" for change in changes) + ("" if after["fp16"] else " (float32)")


def sizes(names: tuple[str, ...]) -> list[str]:
    """One row a run: what the file holds; accuracies last, for the record."""
    lines = [
        "| run | nonzeros | of weights | bits | nominal bits | file, bytes | dense float32, bytes "
        "| bits of file a nonzero | clean | pgd | rounding: clean, pgd | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        if run := read(name):
            lines.append(
                f"| `{name}` | {run['nonzeros']:,} | {run['nonzeros'] / run['dense_weights']:.3%} | {run['bits']} "
                f"| {run['nominal_bits']:,} | {run['file_bytes']:,} | {run['dense_file_bytes']:,} "
                f"| {8 * run['file_bytes'] / run['nonzeros']:.2f} | {percent(run['clean'])} "
                f"| {percent(run['attacks']['pgd'])} | {rounding(run)} | {run['seconds'] / 60:.1f} |"
            )
    return lines


def proofs() -> list[str]:
    """One row a run of a configuration at small scale."""
    lines = [
        "| run | threat | nonzeros | of weights | bits | file, bytes | clean | pgd | pgd-strong "
        "| rounding: clean, pgd | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in PROOFS:
        if run := read(name):
            attacks = [percent(run["attacks"].get(attack)) for attack in ("pgd", "pgd-strong")]
            lines.append(
                f"| `{name}` | {run['threat']} | {run['nonzeros']:,} | {run['nonzeros'] / run['dense_weights']:.3%} "
                f"| {run['bits']} | {run['file_bytes']:,} | {percent(run['clean'])} | {' | '.join(attacks)} "
                f"| {rounding(run)} | {run['seconds'] / 60:.1f} |"
            )
    return lines


def checkpoint() -> list[str]:
    """Before and after."""
    lines = ["| model | file, bytes | clean | pgd | pgd-strong | rounding: clean, pgd |", "|---|---|---|---|---|---|"]
    run, before = read("somebody-elses-checkpoint"), HERE / "natural.json"
    if run and before.exists():
        natural = json.loads(before.read_text())
        rows = (
            ("the checkpoint as it was, naturally trained", f"{run['dense_file_bytes']:,} (float32)", natural),
            (f"compressed: {run['nonzeros']:,} nonzeros, {run['bits']} bits", f"{run['file_bytes']:,}", run),
        )
        for title, size, figures in rows:
            cells = [figures["clean"], *(figures["attacks"].get(attack) for attack in ("pgd", "pgd-strong"))]
            changed = rounding(figures) if figures is run else "–"
            lines.append(f"| {title} | {size} | {' | '.join(map(percent, cells))} | {changed} |")
    return lines


def main() -> None:
    """Fill the three tables in."""
    text = (HERE / "about.md").read_text()
    for mark, lines in (("brief", sizes(BRIEF)), ("proof", proofs()), ("checkpoint", checkpoint())):
        text = text.replace(f"<!-- table: {mark} -->", "\n".join(lines))
    (HERE / "README.md").write_text(text)


if __name__ == "__main__":
    main()
