"""Count how often the checks fail on honest models; write false_alarms.json.

python results/evaluation/false_alarms.py

Honest models are plain ReLU networks, trained here on the digits (8x8), naturally and by PGD, with three seeds each,
under three norms. A check sees blocks of 100 images that were not used in training. A failed check counts as a false
alarm unless AutoAttack confirms it, by an accuracy below the interval of the one that the check doubted.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import atmc
from atmc.commands.outputs import write_json
from atmc.data import Images
from atmc.evaluation.accuracy import robust_accuracy
from atmc.evaluation.evaluate import EvaluationOptions, Report, run_evaluation
from atmc.evaluation.statistics import wilson
from atmc.robust.attacks import pgd
from atmc.robust.threats import Threat

THREATS = [atmc.Linf(0.1), atmc.L2(0.6), atmc.L1(2.0)]
KINDS = ("mlp", "cnn")


def shrink(images: Images) -> Images:
    """Return the digits as images of 8x8 pixels."""
    return Images(images.float_pixels(slice(None))[:, :, 3:27:3, 3:27:3].contiguous(), images.labels)


def build_network(kind: str) -> nn.Module:
    """Return an untrained network: two dense layers, or two convolutions and a dense layer."""
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    body = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(128, 10))


def train_network(kind: str, train: Images, threat: Threat | None, seed: int) -> nn.Module:
    """Train a network for 400 steps of Adam, on images of PGD if there is a threat."""
    torch.manual_seed(seed)
    model = build_network(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(400):
        part = torch.randint(len(train), (128,))
        x, y = train.pixels[part], train.labels[part]
        adv = pgd(model, x, y, threat, steps=5, step_size=threat.eps / 2) if threat else x
        optimizer.zero_grad()
        F.cross_entropy(model(adv), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


def is_confirmed(model: nn.Module, images: Images, threat: Threat, attack: str) -> bool:
    """Return whether AutoAttack leaves less than the interval of the attack's own accuracy."""
    own = robust_accuracy(model, images, threat, attack)
    strong = robust_accuracy(model, images, threat, "autoattack")
    low = wilson(int(own.right.sum()), own.n)[0]
    return int((own.right & strong.right).sum()) / own.n < low


def main() -> None:
    """Evaluate every model under every threat and attack, on every block of images."""
    torch.set_num_threads(1)
    data = atmc.load_data("digits")
    train, blocks = shrink(data.train), [shrink(data.test.take(slice(i, i + 100))) for i in (0, 100, 200)]
    verdicts: dict[str, Counter[str]] = {"pgd": Counter(), "pgd-strong": Counter()}
    alarms: list[dict[str, Any]] = []
    spent, evaluations = 0.0, 0
    for kind in KINDS:
        for seed in range(3):
            for threat in THREATS:
                for training in ("natural", "pgd"):
                    model = train_network(kind, train, threat if training == "pgd" else None, seed)
                    for position, block in enumerate(blocks):
                        for attack in verdicts:
                            began = time.perf_counter()
                            *_, report = run_evaluation(model, block, threat, EvaluationOptions(attacks=(attack,)))
                            assert isinstance(report, Report)
                            spent, evaluations = spent + time.perf_counter() - began, evaluations + 1
                            verdicts[attack].update(f"{check.name}: {check.ok}" for check in report.checks)
                            if not report.failed:
                                continue
                            confirmed = is_confirmed(model, block, threat, attack)
                            evaluated = {"model": f"{kind} {training} {seed}", "threat": str(threat), "attack": attack}
                            for check in report.failed:
                                alarms.append(
                                    evaluated | {"block": position, **check.to_json(), "borne_out": confirmed}
                                )
                                print(alarms[-1], flush=True)
    answered = {
        name: sum(n for key, n in counter.items() if not key.endswith("None")) for name, counter in verdicts.items()
    }
    false = {name: sum(a["attack"] == name and not a["borne_out"] for a in alarms) for name in verdicts}
    summary: dict[str, Any] = {"evaluations": evaluations, "images": 100, "verdicts": answered, "false_alarms": false}
    summary["share"] = {name: round(false[name] / answered[name], 5) for name in answered}
    loud = {name: {(a["model"], a["threat"], a["block"]) for a in alarms if a["attack"] == name} for name in verdicts}
    summary["evaluations_with_an_alarm"] = {name: len(alarmed) for name, alarmed in loud.items()}
    summary["seconds_an_evaluation"] = round(spent / evaluations, 2)
    counts = {name: dict(sorted(counter.items())) for name, counter in verdicts.items()}
    document = {"summary": summary, "alarms": alarms, "counts": counts}
    write_json(Path(__file__).with_name("false_alarms.json"), document)
    print(summary)


if __name__ == "__main__":
    main()
