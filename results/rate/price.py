"""Measure what the price of an error of rounding, beside one of pruning, does to accuracy; write price.json.

python results/rate/price.py [--seeds 0 1 2] [--budgets 2000 4500] [--prices 1 4 8 16 64]
atmc table --page results/rate/README.md

`atmc.compress.rate_control.ROUNDING` weighs the two if bits are chosen for a budget in bytes. LeNet on the digits, linf
0.2, with the settings of digits.toml: one dense model per seed, and from it one compressed model per budget and
price, evaluated on the *validation* split by `pgd` and `pgd-strong`; the test split is not read. Rows that price.json
has already are kept.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path
from typing import Any

import torch
from torch import nn

import atmc
from atmc.compress import rate_control
from atmc.data import Data, load_data

HERE = Path(__file__).parent
CONFIG = tomllib.loads((HERE / "digits.toml").read_text())


def measure(data: Data, dense: nn.Module, seed: int, budget: int, price: float) -> dict[str, Any]:
    """Return the figures of one compressed model on the validation split."""
    rate_control.ROUNDING = price
    settings = CONFIG["training"] | {"epochs": {**CONFIG["training"]["epochs"], "dense": 0}, "seed": seed}
    limit = atmc.Budget(max_bytes=budget)
    result = atmc.compress(dense, data.train, data.val, threat=CONFIG["threat"], budget=limit, **settings)
    attacks = ["pgd", "pgd-strong"]
    report = atmc.evaluate(result.model, data.val, threat=CONFIG["threat"], attack=attacks, checks=False)
    figures = {name: round(accuracy.accuracy, 4) for name, accuracy in report.attacks.items()}
    size = result.decided.size
    row = {"seed": seed, "budget": budget, "price": price, "bytes": len(result.data), "nonzeros": size.nonzeros}
    return row | {"bits": size.bits, "clean": round(report.clean.accuracy, 4), **figures, "n": report.clean.n}


def main() -> None:
    """Make every row that price.json lacks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--budgets", type=int, nargs="*", default=[2000, 4500])
    parser.add_argument("--prices", type=float, nargs="*", default=[1, 4, 8, 16, 64])
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = HERE / "price.json"
    rows: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    measured = {(row["seed"], row["budget"], row["price"]) for row in rows}
    data = load_data(CONFIG["data"])
    for seed in options.seeds:
        dense = None
        for budget in options.budgets:
            for price in options.prices:
                if (seed, budget, price) in measured:
                    continue
                dense = dense if dense is not None else train_dense(data, seed)
                rows.append(measure(data, dense, seed, budget, price))
                print(rows[-1], flush=True)
                out.write_text(json.dumps(rows, indent=1) + "\n")


def train_dense(data: Data, seed: int) -> nn.Module:
    """Return the dense model of a seed, adversarially trained."""
    model = atmc.models.build("lenet", data.num_classes, seed=seed)
    settings = CONFIG["training"] | {"epochs": {"dense": CONFIG["training"]["epochs"]["dense"]}, "seed": seed}
    whole = atmc.Budget(ratio=1.0)
    return atmc.compress(
        model, data.train, data.val, threat=CONFIG["threat"], budget=whole, method="da", **settings
    ).model


if __name__ == "__main__":
    main()
