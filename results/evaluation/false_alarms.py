"""How often the checks fail on honest models; writes false_alarms.json.

python results/evaluation/false_alarms.py

Honest: plain ReLU networks, trained here on the digits (8x8), naturally and by PGD, three seeds each, under three
norms; a check sees blocks of 100 images that training did not. A failed check counts as a false alarm, unless a
stronger attack bears it out: AutoAttack takes more than the interval from the accuracy that the check doubted.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from common import write
from torch import nn

import atmc
from atmc.data import Images
from atmc.evaluation.accuracy import robust_accuracy
from atmc.evaluation.evaluate import EvaluationOptions, Report, run_evaluation
from atmc.evaluation.statistics import wilson
from atmc.robust.attacks import pgd
from atmc.robust.threats import Threat

THREATS = [atmc.Linf(0.1), atmc.L2(0.6), atmc.L1(2.0)]
FAMILIES = {"mlp": (64, 128), "cnn": (0, 0)}


def small(images: Images) -> Images:
    """The digits as 8x8."""
    return Images(images.float_pixels(slice(None))[:, :, 3:27:3, 3:27:3].contiguous(), images.labels)


def network(kind: str) -> nn.Module:
    """Two layers of one kind or the other."""
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    body = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(128, 10))


def trained(kind: str, train: Images, threat: Threat | None, seed: int) -> nn.Module:
    """A network after 400 steps of Adam, against PGD where there is a threat."""
    torch.manual_seed(seed)
    model = network(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(400):
        part = torch.randint(len(train), (128,))
        x, y = train.pixels[part], train.labels[part]
        adv = pgd(model, x, y, threat, steps=5, step_size=threat.eps / 2) if threat else x
        optimizer.zero_grad()
        F.cross_entropy(model(adv), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


def borne_out(model: nn.Module, images: Images, threat: Threat, attack: str) -> bool:
    """Whether AutoAttack leaves less than the interval of the attack's own accuracy."""
    own = robust_accuracy(model, images, threat, attack)
    strong = robust_accuracy(model, images, threat, "autoattack")
    low = wilson(int(own.right.sum()), own.n)[0]
    return int((own.right & strong.right).sum()) / own.n < low


def main() -> None:
    """Every model, threat, attack and block."""
    torch.set_num_threads(1)
    data = atmc.load_data("digits")
    train, blocks = small(data.train), [small(data.test.take(slice(i, i + 100))) for i in (0, 100, 200)]
    verdicts: dict[str, Counter[str]] = {"pgd": Counter(), "pgd-strong": Counter()}
    alarms: list[dict[str, Any]] = []
    spent, evaluations = 0.0, 0
    for kind in FAMILIES:
        for seed in range(3):
            for threat in THREATS:
                for training in ("natural", "pgd"):
                    model = trained(kind, train, threat if training == "pgd" else None, seed)
                    for position, block in enumerate(blocks):
                        for attack in verdicts:
                            began = time.perf_counter()
                            *_, report = run_evaluation(model, block, threat, EvaluationOptions((attack,)))
                            assert isinstance(report, Report)
                            spent, evaluations = spent + time.perf_counter() - began, evaluations + 1
                            verdicts[attack].update(f"{check.name}: {check.ok}" for check in report.checks)
                            if not report.failed:
                                continue
                            true = borne_out(model, block, threat, attack)
                            about = {"model": f"{kind} {training} {seed}", "threat": str(threat), "attack": attack}
                            for check in report.failed:
                                found = {"block": position, **check.to_json(), "borne_out": true}
                                alarms.append(about | found)
                                print(alarms[-1], flush=True)
    told = {name: sum(n for key, n in found.items() if not key.endswith("None")) for name, found in verdicts.items()}
    false = {name: sum(a["attack"] == name and not a["borne_out"] for a in alarms) for name in verdicts}
    summary: dict[str, Any] = {"evaluations": evaluations, "images": 100, "verdicts": told, "false_alarms": false}
    summary["share"] = {name: round(false[name] / told[name], 5) for name in told}
    loud = {name: {(a["model"], a["threat"], a["block"]) for a in alarms if a["attack"] == name} for name in verdicts}
    summary["evaluations_with_an_alarm"] = {name: len(found) for name, found in loud.items()}
    summary["seconds_an_evaluation"] = round(spent / evaluations, 2)
    counts = {name: dict(sorted(found.items())) for name, found in verdicts.items()}
    write("false_alarms.json", {"summary": summary, "alarms": alarms, "counts": counts})
    print(summary)


if __name__ == "__main__":
    main()
