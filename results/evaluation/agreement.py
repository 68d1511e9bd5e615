"""Compare the PGD of atmc with pyautoattack's APGD, image by image, on LeNets trained against attacks (agreement.json).

python results/evaluation/agreement.py [--models results/mnist-adversarial] [--data ../shared/data/mnist] [--n 300]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import atmc
from atmc.commands.outputs import write_json
from atmc.data import load_data
from atmc.evaluation.accuracy import robust_accuracy
from atmc.evaluation.evaluate import prepare
from atmc.evaluation.statistics import compare

HUNDRED_STEPS = {"steps": 100, "step_size": 76 / 255 / 20}  # the number of gradients that APGD takes
SETTINGS = {
    "pgd 100 steps, ce": {**HUNDRED_STEPS, "loss": "ce"},
    "pgd 100 steps, dlr": {**HUNDRED_STEPS, "loss": "dlr"},
    "pgd-strong": {},
}
APGD = {"pgd 100 steps, ce": "apgd-ce", "pgd 100 steps, dlr": "apgd-dlr", "pgd-strong": "apgd-ce"}


def main() -> None:
    """Compare three pairs of attacks on three models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="results/mnist-adversarial")
    parser.add_argument("--data", default="../shared/data/mnist")
    parser.add_argument("--n", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    threat, rows = atmc.Linf(76 / 255), []
    for run in ("dense", "atmc8-01", "atmc8-0015"):
        model, test = prepare(atmc.load(Path(options.models) / run / "model.atmc"), load_data(options.data).test)
        theirs = {name: robust_accuracy(model, test, threat, name, n=options.n) for name in set(APGD.values())}
        for name, settings in SETTINGS.items():
            attack = "pgd-strong" if name == "pgd-strong" else "pgd"
            ours, other = robust_accuracy(model, test, threat, attack, n=options.n, **settings), theirs[APGD[name]]
            comparison = compare(ours.right, other.right)
            row = {"model": run, "ours": name, "theirs": APGD[name], "n": options.n}
            row |= {"ours_right": int(ours.right.sum()), "theirs_right": int(other.right.sum())}
            row |= {"same_verdict": int((ours.right == other.right).sum())}
            row |= {"only_theirs_fools": comparison.only_a, "only_ours_fools": comparison.only_b}
            rows.append(row | {"mcnemar_p": float(f"{comparison.p:.3g}")})
            print(rows[-1], flush=True)
            out = Path(__file__).with_name("agreement.json")
            write_json(out, {"threat": str(threat), "seed": 0, "rows": rows})


if __name__ == "__main__":
    main()
