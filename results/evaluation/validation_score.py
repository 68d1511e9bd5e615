"""Which cheap attack on the validation images ranks models as AutoAttack does (validation_score.json)?

Eight LeNets for the digits with 4,305 nonzeros: two objectives, two learning rates of the l0 phase, two seeds. Each
is attacked on the same validation images by the candidates and by AutoAttack.

python results/evaluation/validation_score.py [--epochs 15]
"""

from __future__ import annotations

import argparse
import time
from itertools import combinations, product
from pathlib import Path

import torch

import atmc
from atmc.commands.outputs import write_json
from atmc.data import load_data
from atmc.evaluation.accuracy import clean_accuracy, robust_accuracy
from atmc.models import build
from atmc.training.job import Result

THREAT, NONZEROS = atmc.Linf(0.2), 4305
OBJECTIVES, RATES, SEEDS = ("mixed", "mart"), (0.003, 0.01), (0, 1)
CANDIDATES = ("pgd", "pgd-strong", "apgd-ce", "quick")
OUT = Path(__file__).with_name("validation_score.json")


def main() -> None:
    """Train the models, attack them, and write the figures after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=15, help="of the dense phase; the l0 phase has 10")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, rows = load_data("digits"), []
    for objective, seed in product(OBJECTIVES, SEEDS):

        def train(model: torch.nn.Module, objective: str = objective, seed: int = seed, **settings: object) -> Result:
            return atmc.compress(
                model,
                data.train,
                data.val,
                threat=THREAT,
                budget=atmc.Budget(nonzeros=NONZEROS),
                method="al0",
                objective=objective,
                seed=seed,
                batch_size=32,
                **settings,
            )

        dense = atmc.compress(
            build("lenet", data.num_classes, seed=seed),
            data.train,
            data.val,
            threat=THREAT,
            budget=atmc.Budget(ratio=1.0),
            method="da",
            objective=objective,
            seed=seed,
            batch_size=32,
            epochs={"dense": options.epochs},
        ).model
        for rate in RATES:
            epochs = {"dense": 0, "l0": 10, "tune": 0}
            model = train(dense, epochs=epochs, learning_rate={"l0": rate}).model
            row = {"objective": objective, "rate": rate, "seed": seed}
            row["clean"] = clean_accuracy(model, data.val).accuracy
            for attack in (*CANDIDATES, "autoattack"):
                began = time.monotonic()
                row[attack] = robust_accuracy(model, data.val, THREAT, attack).accuracy
                row[f"{attack}, s"] = round(time.monotonic() - began, 1)
            rows.append(row)
            print(row, flush=True)
            summary = [summarize(attack, rows) for attack in CANDIDATES] if len(rows) > 2 else []
            write_json(OUT, {"threat": str(THREAT), "n": len(data.val), "rows": rows, "summary": summary})


def summarize(attack: str, rows: list[dict[str, float]]) -> dict[str, object]:
    """Return how far an attack's accuracies are from AutoAttack's, and how often the two order a pair of models alike.

    A pair counts half if the attack sees no difference; pairs that AutoAttack does not separate do not count.
    """
    ours, theirs = (torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in (attack, "autoattack"))
    agreements = [
        (1 + torch.sign((ours[i] - ours[j]) * (theirs[i] - theirs[j])).item()) / 2
        for i, j in combinations(range(len(rows)), 2)
        if theirs[i] != theirs[j]
    ]
    return {
        "attack": attack,
        "correlation": round(float(torch.corrcoef(torch.stack((ours, theirs)))[0, 1]), 3),
        "pairs_ordered_alike": round(sum(agreements) / len(agreements), 3),
        "pairs": len(agreements),
        "mean_excess": round(float((ours - theirs).mean()), 4),
        "chosen": round(float(theirs[ours.argmax()]), 4),
        "best": round(float(theirs.max()), 4),
        "seconds": round(sum(row[f"{attack}, s"] for row in rows) / len(rows), 1),
    }


if __name__ == "__main__":
    main()
