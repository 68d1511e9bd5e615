"""How dear is an error of rounding beside one of pruning? Writes price.json and README.md.

python results/rate/price.py [--seeds 0 1 2] [--budgets 2000 4500] [--prices 1 4 8 16 64]

`compress.rate.ROUNDING` weighs both when bits are chosen for a budget in bytes. LeNet on the digits, linf 0.2, with the
settings of configs/digits.toml: one dense model a seed, and from it one compressed model for each budget and price.
Judged on the *validation* split, by `pgd` and `pgd-strong`; the test split is not read. What price.json holds already
is not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tomllib
from pathlib import Path
from typing import Any

import torch
from torch import nn

import atmc
from atmc.compress import rate_control
from atmc.data import Data, load_data

HERE = Path(__file__).parent
CONFIG = tomllib.loads((HERE.parents[1] / "configs" / "digits.toml").read_text())


def measure(data: Data, dense: nn.Module, seed: int, budget: int, price: float) -> dict[str, Any]:
    """One compressed model's figures on the validation split."""
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


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds."""
    lines = ["| budget, bytes | price | nonzeros | bits | clean | pgd | pgd-strong (each seed) | pgd-strong, mean |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for budget in sorted({row["budget"] for row in rows}):
        for price in sorted({row["price"] for row in rows}):
            some = [row for row in rows if (row["budget"], row["price"]) == (budget, price)]
            if not some:
                continue
            mean = {key: statistics.mean(row[key] for row in some) for key in ("nonzeros", "bits", "clean", "pgd")}
            strong = [100 * row["pgd-strong"] for row in some]
            lines.append(
                f"| {budget:,} | {price:g} | {mean['nonzeros']:,.0f} | {mean['bits']:.2f} | {100 * mean['clean']:.1f} "
                f"| {100 * mean['pgd']:.1f} | {' '.join(f'{each:.1f}' for each in strong)} "
                f"| {statistics.mean(strong):.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Every run that price.json lacks, then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--budgets", type=int, nargs="*", default=[2000, 4500])
    parser.add_argument("--prices", type=float, nargs="*", default=[1, 4, 8, 16, 64])
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = HERE / "price.json"
    rows: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    made = {(row["seed"], row["budget"], row["price"]) for row in rows}
    data = load_data(CONFIG["data"])
    for seed in options.seeds:
        dense = None
        for budget in options.budgets:
            for price in options.prices:
                if (seed, budget, price) in made:
                    continue
                dense = dense if dense is not None else trained(data, seed)
                rows.append(measure(data, dense, seed, budget, price))
                print(rows[-1], flush=True)
                out.write_text(json.dumps(rows, indent=1) + "\n")
    about = (HERE / "about.md").read_text()
    (HERE / "README.md").write_text(about.replace("<!-- table -->", table(rows)))


def trained(data: Data, seed: int) -> nn.Module:
    """The dense model of a seed, adversarially trained."""
    model = atmc.models.build("lenet", data.num_classes, seed=seed)
    settings = CONFIG["training"] | {"epochs": {"dense": CONFIG["training"]["epochs"]["dense"]}, "seed": seed}
    whole = atmc.Budget(ratio=1.0)
    return atmc.compress(
        model, data.train, data.val, threat=CONFIG["threat"], budget=whole, method="da", **settings
    ).model


if __name__ == "__main__":
    main()
