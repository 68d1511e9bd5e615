"""`pgd`, `pgd-strong` and AutoAttack on the files of results/mnist; resumable, one JSON a file in mnist/.

python results/evaluation/mnist.py [RUN ...] [--models results/mnist] [--data ../shared/data/mnist] [--n 1000]
    [--state /tmp/states]

An interrupted call goes on where it was. The states stay in the folder --state: `checks.py` reads the verdicts there.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from common import HERE, lenet

import atmc
from atmc.data import load_data
from atmc.judge import prepared
from atmc.robust import resume
from atmc.robust.evaluate import Verdicts, attacked, clean_accuracy, judged
from atmc.robust.protocols import protocol_of

ORDER = ["atmc8-0015", "dense", "bytes-1528", "bytes-4519", "atmc8-006", "atmc4-006", "atmc8-01", "atmc8-05"]
ORDER += ["atmc32-0015", "atmc32-006", "atmc32-01", "atmc32-05"]


def evaluate(run: str, attack: str, options: argparse.Namespace) -> None:
    """One attack on one file; saves the state every minute."""
    found = json.loads(out.read_text()) if (out := HERE / "mnist" / f"{run}.json").exists() else {}
    if attack in found.get("attacks", {}):
        return
    threat = atmc.Linf(76 / 255)
    model, test = prepared(lenet(Path(options.models) / run), load_data(options.data).test)
    if not found:
        found = {
            "model": f"results/mnist/{run}/model.atmc",
            "data": "mnist test split",
            "threat": str(threat),
            "seed": 0,
        }
        found |= {"clean": clean_accuracy(model, test).to_json(), "attacks": {}, "seconds": {}, "right": {}}
    path = Path(options.state) / f"{run}-{attack}.npz"
    mark = resume.fingerprint(model, test, options.n, threat=str(threat), attack=attack, seed=0)
    stored = resume.read(path)[attack] if path.exists() else (mark, Verdicts.fresh(test, options.n, keep=True))
    if stored[0] != mark:
        raise ValueError(f"{path} is of another evaluation")
    protocol = protocol_of(model, test, threat, attack)
    began = saved = time.monotonic()
    for event in attacked(model, test, protocol, stored[1], batch_size=options.batch_size):
        if time.monotonic() - saved > 60:
            resume.write(path, {attack: (mark, event.verdicts)})
            saved = time.monotonic()
            print(run, event.attack, event.stage, event.verdicts.done, f"{event.right}/{event.judged}", flush=True)
    resume.write(path, {attack: (mark, stored[1])})
    accuracy = judged(protocol, stored[1])
    found["attacks"][attack] = accuracy.to_json()
    found["seconds"][attack] = round(time.monotonic() - began)  # of this call; less where it went on
    found["right"][attack] = "".join(str(int(right)) for right in accuracy.right.tolist())
    print(run, attack, accuracy.accuracy, found["seconds"][attack], "s", flush=True)
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    """Every file, in an order that answers first what is asked most."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", default=ORDER)
    parser.add_argument("--models", default="results/mnist")
    parser.add_argument("--data", default="../shared/data/mnist")
    parser.add_argument("--state", default="/tmp/atmc-evaluation")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=250)
    options = parser.parse_args()
    torch.set_num_threads(1)
    Path(options.state).mkdir(parents=True, exist_ok=True)
    for attacks in (("pgd", "pgd-strong"), ("autoattack",)):
        for run in options.runs:
            for attack in attacks:
                evaluate(run, attack, options)


if __name__ == "__main__":
    main()
