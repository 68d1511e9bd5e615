"""What the checks say of the files of results/mnist; writes mnist/RUN-checks.json.

python results/evaluation/checks.py [RUN ...] [--models results/mnist] [--data ../shared/data/mnist]
    [--state /tmp/states]

The verdicts of the attacks are those that attacks.py left in the folder --state, as far as it has come; the first 100
images are looked at. The dense model's images are tried on every other (`transfer`).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from common import HERE, RUNS, lenet, mark_of, state_path, write

import atmc
from atmc.data import load_data
from atmc.evaluation import resume
from atmc.evaluation.accuracy import clean_accuracy, summarize
from atmc.evaluation.attacks import build_protocol
from atmc.evaluation.checks import run_checks
from atmc.evaluation.evaluate import prepare
from atmc.evaluation.suspect import suspect


def main() -> None:
    """Every run, once for each set of attacks that is there: pgd alone, with pgd-strong, with AutoAttack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", default=RUNS)
    parser.add_argument("--models", default="results/mnist")
    parser.add_argument("--data", default="../shared/data/mnist")
    parser.add_argument("--state", default="/tmp/atmc-evaluation")
    options = parser.parse_args()
    torch.set_num_threads(1)
    threat, data = atmc.Linf(76 / 255), load_data(options.data).test
    dense, _ = prepare(lenet(Path(options.models) / "dense"), data)
    for run in options.runs:
        model, test = prepare(lenet(Path(options.models) / run), data)
        clean, attacks, found = clean_accuracy(model, test), {}, {}
        for attack in ("pgd", "pgd-strong", "autoattack"):
            path = state_path(options.state, Path(options.models) / run, attack)
            mark, verdicts = resume.read_state(path)[attack] if path.exists() else ("", None)
            if verdicts is None or verdicts.start < len(verdicts.right):
                break
            if mark != mark_of(model, test, len(verdicts.right), threat, attack):
                raise ValueError(f"{path} is of another model or data")
            attacks[attack] = summarize(build_protocol(model, test, threat, attack), verdicts)
            key = ", ".join(attacks)
            if key in _there(run):
                found[key] = _there(run)[key]
                continue
            began = time.monotonic()
            looked_at = suspect(model, test, threat, clean, attacks, source=None if run == "dense" else dense)
            said = [check.to_json() for check in run_checks(looked_at)]
            found[key] = {"checks": said, "seconds": round(time.monotonic() - began, 1)}
            print(run, key, [check["name"] for check in said if check["ok"] is False], flush=True)
            write(f"mnist/{run}-checks.json", found)


def _there(run: str) -> dict[str, Any]:
    path = HERE / "mnist" / f"{run}-checks.json"
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    main()
