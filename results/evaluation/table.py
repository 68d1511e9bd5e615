"""Write README.md from the JSON files of this folder.

python results/evaluation/table.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from common import HERE, RUNS

OTHERS = [
    "`python results/evaluation/attacks.py results/precision/*-* results/cifar10/RUN --after-pgd`: the first 1,000",
    "test images, or as many as are named. The LeNets are short trainings; the runs of cifar10 show sizes, and that",
    "configurations run: their accuracies mean nothing ([cifar10](../cifar10/README.md)). There AutoAttack had only",
    "what `pgd-strong` left, and nothing to do where that is nothing; `brief-05` and the proofs, which guess, are left",
    "out. The checks are those of each run's evaluation.",
]


def read(name: str) -> Any:
    """A JSON file beside this one, None where there is none yet."""
    path = HERE / name
    return json.loads(path.read_text()) if path.exists() else None


def percent(found: Mapping[str, Any] | None) -> str:
    """'67.40 [64.43, 70.23]'."""
    if found is None:
        return "not yet"
    low, high = found["ci95"]
    return f"{found['accuracy']:.2%} [{low:.2%}, {high:.2%}]".replace("%", "")


def failed(checks: Mapping[str, Any], key: str) -> str:
    """Names of the failed checks."""
    if key not in checks:
        return "not yet"
    names = [check["name"] for check in checks[key]["checks"] if check["ok"] is False]
    return ", ".join(f"`{name}`" for name in names) or "none"


def mnist() -> list[str]:
    """The MNIST files under three attacks, and what the checks said."""
    lines = ["## MNIST under AutoAttack", ""]
    lines += [
        "Percent of the first 1,000 test images, with 95 % Wilson intervals. The last columns name the checks that"
    ]
    lines += [
        "failed, on the first 100 images (`square` beside AutoAttack: on all), of an evaluation with them.",
        "",
    ]
    lines += [
        "| run | clean (10,000) | pgd | pgd-strong | after APGD-CE, -T, FAB-T | AutoAttack "
        "| with pgd | +pgd-strong | +autoattack |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for run in RUNS:
        found, checks = read(f"mnist/{run}.json"), read(f"mnist/{run}-checks.json") or {}
        if not (found or checks):
            lines.append(f"| `{run}` " + "| not yet " * 8 + "|")
            continue
        attacks = found["attacks"] if found else {}
        after = attacks.get("autoattack", {}).get("after", {})
        steps = " ".join(f"{100 * share:.1f}" for name, share in after.items() if name != "square") or "not yet"
        figures = [percent(attacks.get(name)) for name in ("pgd", "pgd-strong")]
        keys = ("pgd", "pgd, pgd-strong", "pgd, pgd-strong, autoattack")
        cells = [percent(found["clean"]) if found else "not yet", *figures, steps, percent(attacks.get("autoattack"))]
        lines.append(f"| `{run}` | " + " | ".join([*cells, *(failed(checks, key) for key in keys)]) + " |")
    details = []
    for run in RUNS:
        checks = read(f"mnist/{run}-checks.json") or {}
        for key, said in checks.items():
            details += [
                f"| `{run}` | {key} | `{c['name']}` | {c['detail']} |" for c in said["checks"] if c["ok"] is False
            ]
    lines += ["", "What failed, in figures:", "", "| run | attacks | check | figures |", "|---|---|---|---|", *details]
    return [*lines, ""]


def others() -> list[str]:
    """The other committed files: attacks of attacks.py, and the checks of the runs' own evaluations."""
    lines = ["## Other files", "", *OTHERS, ""]
    lines += ["| run | threat | clean | images attacked | pgd | pgd-strong | AutoAttack | failed checks of the run |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for folder in sorted(path.parent for path in HERE.parent.glob("[pc]*/*/metrics.json")):
        run = f"{folder.parent.name}/{folder.name}"
        found, metrics = read(f"{run}.json") or {}, json.loads((folder / "metrics.json").read_text())
        attacks = found.get("attacks", {})
        cells = [percent(attacks.get(name)) for name in ("pgd", "pgd-strong", "autoattack")]
        if "on_those_left_by" in attacks.get("autoattack", {}):
            cells[-1] += " (after pgd-strong)"
        failures = [f"`{check['name']}`" for check in metrics["checks"] if check["ok"] is False]
        said = (", ".join(failures) or "none") if metrics["checks"] else "not run"
        if not found:
            cells = ["not run"] * 3
        n = f"{attacks['pgd']['n']:,}" if "pgd" in attacks else "–"
        cells = [f"`{run}`", metrics["threat"], percent(metrics["clean"]), n, *cells, said]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def agreement() -> list[str]:
    """Our PGD and APGD."""
    found = read("agreement.json")
    lines = ["## Our PGD and pyautoattack's APGD", ""]
    lines += [
        "The same model and images; APGD takes 100 gradients an image, so does our PGD here; `pgd-strong` takes 216.",
        "",
    ]
    lines += ["| run | ours | theirs | right under ours | theirs | same verdict | only theirs fools | only ours | p |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in found["rows"]:
        share = f"{row['same_verdict']} of {row['n']} ({row['same_verdict'] / row['n']:.1%})"
        cells = [f"`{row['model']}`", row["ours"], row["theirs"], row["ours_right"], row["theirs_right"], share]
        cells += [row["only_theirs_fools"], row["only_ours_fools"], row["mcnemar_p"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


def cost() -> list[str]:
    """Through atmc and directly."""
    found = read("cost.json")
    lines = ["## Cost of standard AutoAttack through atmc", ""]
    lines += [
        f"{found['n']} images, `{found['model']}`, batch {found['batch_size']}, one thread, machine idle; seconds:",
        "",
    ]
    lines += ["| way | rounds |", "|---|---|"]
    lines += [f"| {name} | {', '.join(map(str, times))} |" for name, times in found["seconds"].items()]
    same, plain = found["ratio to pyautoattack, same layout"], found["ratio to pyautoattack"]
    lines += [
        "",
        f"Ratio of the medians: **{same}** to pyautoattack with the model in the same memory layout, {plain} to",
    ]
    lines += [
        "pyautoattack with the model as it is loaded (atmc converts it to channels_last; it also leaves out the weight"
    ]
    lines += ["gradients that FAB computes and nobody needs). The checks are apart: "]
    checks, strong = found["checks on 100 images, seconds"], found["pgd-strong on the same 100, seconds"]
    lines[-1] += f"{checks} s on 100 images, beside {strong} s"
    return [*lines, "for `pgd-strong` on them.", ""]


def false_alarms() -> list[str]:
    """Of honest models."""
    found = read("false_alarms.json")
    summary = found["summary"]
    lines = ["## False alarms", ""]
    lines += [
        "Honest ReLU networks on 8x8 digits (two kinds, natural and PGD training, three seeds; linf 0.1, l2 0.6, l1 2),"
    ]
    lines += ["each on three blocks of 100 images. A failed check is a false alarm unless AutoAttack takes more than"]
    lines += ["the interval from the accuracy that the check doubted.", ""]
    lines += [
        "| evaluated with | verdicts | evaluations with an alarm | false alarms | share |",
        "|---|---|---|---|---|",
    ]
    for name, told in summary["verdicts"].items():
        loud, false = summary["evaluations_with_an_alarm"][name], summary["false_alarms"][name]
        lines.append(
            f"| `{name}` | {told:,} | {loud} of {summary['evaluations'] // 2} | {false} "
            f"| {summary['share'][name]:.2%} |"
        )
    lines += [
        "",
        "The alarms that AutoAttack bore out:",
        "",
        "| model | threat | attack | check | figures |",
        "|---|---|---|---|---|",
    ]
    for alarm in found["alarms"]:
        cells = [alarm["model"], alarm["threat"], alarm["attack"], f"`{alarm['name']}`", alarm["detail"]]
        lines.append("| " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        f"An evaluation with its checks took {summary['seconds_an_evaluation']} s on the busy machine.",
        "",
    ]


def main() -> None:
    """The page."""
    parts = [(HERE / "about.md").read_text().rstrip(), "", *mnist(), *others(), *agreement(), *cost(), *false_alarms()]
    (HERE / "README.md").write_text("\n".join(parts).rstrip() + "\n")


if __name__ == "__main__":
    main()
