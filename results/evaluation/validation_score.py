"""Which cheap attack on a model says what AutoAttack would say (validation_score.json)?

Every file of results/mnist-adversarial, on the first 1,000 test images: `quick`, the default of `val_attack`, beside
the attacks that results/evaluation/mnist has already. No model is chosen here.

python results/evaluation/validation_score.py [--data ../shared/data/mnist]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

import atmc
from atmc.commands.outputs import write_json
from atmc.data import load_data
from atmc.evaluation.accuracy import robust_accuracy

HERE = Path(__file__).parent
THREAT, N = atmc.Linf(76 / 255), 1000
CANDIDATES = ("pgd", "pgd-strong", "quick")
OUT = HERE / "validation_score.json"


def main() -> None:
    """Attack every model, and write the figures after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="ylecun/mnist")
    test = load_data(parser.parse_args().data).test
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for path in sorted((HERE / "mnist").glob("*.json")):
        run = path.stem
        if run.endswith("-checks"):
            continue
        attacks = json.loads(path.read_text(encoding="utf-8"))["attacks"]
        row = {"run": run, **{name: attacks[name]["accuracy"] for name in ("pgd", "pgd-strong", "autoattack")}}
        model, began = atmc.load(HERE.parent / "mnist-adversarial" / run / "model.atmc"), time.monotonic()
        row["quick"] = robust_accuracy(model, test, THREAT, "quick", n=N).accuracy
        row["seconds"] = round(time.monotonic() - began, 1)
        rows.append(row)
        print(row, flush=True)
        summary = [summarize(attack, rows) for attack in CANDIDATES] if len(rows) > 2 else []
        write_json(OUT, {"threat": str(THREAT), "n": N, "rows": rows, "summary": summary})


def summarize(attack: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how far an attack's accuracies are from AutoAttack's, and how often the two order a pair of models alike.

    Only pairs count that are within 10 points of each other under AutoAttack, and not equal; a pair counts half if the
    attack sees no difference.
    """
    ours, theirs = (torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in (attack, "autoattack"))
    agreements = [
        (1 + torch.sign((ours[i] - ours[j]) * (theirs[i] - theirs[j])).item()) / 2
        for i, j in combinations(range(len(rows)), 2)
        if 0 < abs(float(theirs[i] - theirs[j])) <= 0.1
    ]
    excess = ours - theirs
    return {
        "attack": attack,
        "correlation": round(float(torch.corrcoef(torch.stack((ours, theirs)))[0, 1]), 3),
        "pairs_ordered_alike": round(sum(agreements) / max(len(agreements), 1), 3),
        "pairs": len(agreements),
        "least_excess": round(float(excess.min()), 4),
        "mean_excess": round(float(excess.mean()), 4),
        "most_excess": round(float(excess.max()), 4),
    }


if __name__ == "__main__":
    main()
