"""`pgd`, `pgd-strong` and AutoAttack on the files of runs; resumable, one JSON a file, in a folder of the same name.

python results/evaluation/attacks.py [results/mnist/RUN ...] [--n 1000] [--state /tmp/states] [--threads 1]
    [--after-pgd]

Data and threat are those of each run's metrics.json; the models are those in the files. An interrupted call goes on
where it was. The states stay in the folder --state: `checks.py` reads the verdicts there. With --after-pgd AutoAttack
sees only the images that `pgd-strong` left, which takes less time and gives the worst case of the three.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from common import BATCH, HERE, RUNS, mark_of, state_path, values

import atmc
from atmc.data import Images, load_data
from atmc.evaluation import resume
from atmc.evaluation.accuracy import Verdicts, clean_accuracy, run_protocol, summarize
from atmc.evaluation.attacks import build_protocol
from atmc.evaluation.evaluate import prepare
from atmc.evaluation.statistics import Accuracy
from atmc.robust.threats import parse_threat


def evaluate(folder: Path, attack: str, options: argparse.Namespace) -> None:
    """One attack on one file; saves the state every minute."""
    out = HERE / folder.parent.name / f"{folder.name}.json"
    found = json.loads(out.read_text()) if out.exists() else {}
    metrics = json.loads((folder / "metrics.json").read_text())
    threat = parse_threat(metrics["threat"])
    model, test = prepare(atmc.load(folder / "model.atmc"), load_data(metrics["data"]).test)
    n = min(options.n, len(test))
    if found and found["values"] != values(model):
        raise ValueError(f"{out} is of another model: remove it")
    if not found:
        found = {"model": str(folder / "model.atmc"), "data": metrics["data"], "threat": str(threat), "seed": 0}
        found["values"] = values(model)
        found |= {"clean": clean_accuracy(model, test).to_json(), "attacks": {}, "seconds": {}, "right": {}}
    if attack in found["attacks"]:
        return
    left = torch.ones(n, dtype=torch.bool)
    if attack == "autoattack" and options.after_pgd:
        left = torch.tensor([digit == "1" for digit in found["right"]["pgd-strong"]])[:n]
    path = state_path(options.state, folder, attack, left=not bool(left.all()))
    began = time.monotonic()
    right, settings = torch.zeros(n, dtype=torch.bool), {}
    if left.any():
        accuracy = judge(folder.name, model, test.take(left.nonzero()[:, 0]), attack, threat, path, options)
        right[left], settings = accuracy.right, accuracy.to_json()
    found["attacks"][attack] = settings | Accuracy.of(right).to_json()
    if not left.all():
        found["attacks"][attack]["on_those_left_by"] = "pgd-strong"
    found["seconds"][attack] = round(time.monotonic() - began)  # of this call; less where it went on
    found["right"][attack] = "".join(str(int(each)) for each in right.tolist())
    print(folder.name, attack, found["attacks"][attack]["accuracy"], found["seconds"][attack], "s", flush=True)
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")


def judge(
    run: str,
    model: torch.nn.Module,
    test: Images,
    attack: str,
    threat: atmc.Threat,
    path: Path,
    options: argparse.Namespace,
) -> Accuracy:
    """The attack's figure on the first n images of test."""
    n = min(options.n, len(test))
    mark = mark_of(model, test, n, threat, attack)
    stored = resume.read_state(path)[attack] if path.exists() else (mark, Verdicts.fresh(test, n, keep=True))
    if stored[0] != mark:
        raise ValueError(f"{path} is of another evaluation")
    protocol = build_protocol(model, test, threat, attack)
    saved = time.monotonic()
    for event in run_protocol(model, test, protocol, stored[1], batch_size=BATCH):
        if time.monotonic() - saved > 60:
            resume.write_state(path, {attack: (mark, event.verdicts)})
            saved = time.monotonic()
            print(run, event.attack, event.stage, event.verdicts.done, f"{event.right}/{event.n}", flush=True)
    resume.write_state(path, {attack: (mark, stored[1])})
    return summarize(protocol, stored[1])


def main() -> None:
    """First the quick attacks on every file, then AutoAttack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("results/mnist") / run for run in RUNS])
    parser.add_argument("--state", default="/tmp/atmc-evaluation")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--after-pgd", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    Path(options.state).mkdir(parents=True, exist_ok=True)
    for attacks in (("pgd", "pgd-strong"), ("autoattack",)):
        for folder in options.folders:
            for attack in attacks:
                evaluate(folder, attack, options)


if __name__ == "__main__":
    main()
