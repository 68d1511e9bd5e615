"""AutoAttack (Croce and Hein 2020) through `pyautoattack`, one attack at a time.

pyautoattack does the attacking; who is attacked, in which batches, and what counts as fooled is `evaluate`'s. Order,
batches and seeds are those of its `run_standard_evaluation`, so that the verdicts are the same too (a test holds the
two against each other). For 10 classes and more the parameters are untouched. With fewer, the targeted attacks take
all wrong classes as targets; with 2 or 3, where the DLR loss is undefined (it divides by a difference of third and
fourth logits), the margin of the logits takes its place. l1 is Croce and Hein 2021.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from atmc.robust.attacks import attack_mode, margin
from atmc.robust.threats import Threat

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
STAGES = {"autoattack": STANDARD, **{name: (name,) for name in ("apgd-ce", "apgd-dlr", "fab", "square")}}
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
QUERIES = 5000  # of Square, in the standard version
DLR_CLASSES = 4  # the fewest for which the targeted DLR loss is defined

Attack = Callable[[Tensor, Tensor], Tensor]


def suite(model: nn.Module, threat: Threat, *, classes: int, seed: int, device: torch.device) -> Any:
    """pyautoattack's object in its standard version, fitted to the number of classes, and silent."""
    norm, names = NORMS[threat.name], list(STANDARD)
    found = AutoAttack(
        model, attacks=names, norm=norm, eps=threat.eps, seed=seed, device=device, version="custom"
    )  # custom says nothing to the log of the whole program; the standard's numbers come next
    logger = logging.Logger("pyautoattack")  # of nobody's hierarchy: what it says is said by our checks
    logger.addHandler(logging.NullHandler())
    for part in (found, found.apgd, found.apgd_targeted):
        part.logger = logger
    found._set_version("standard")
    wrong = classes - 1
    found.apgd_targeted.n_target_classes = min(found.apgd_targeted.n_target_classes, wrong)
    found.fab.n_target_classes = min(found.fab.n_target_classes, wrong)
    if classes < DLR_CLASSES:
        targeted = found.apgd_targeted

        def targeted_margin(logits: Tensor, y: Tensor) -> Tensor:
            chosen = torch.stack((targeted.y_target, y), dim=1)
            return logits.gather(1, chosen).diff(dim=1)[:, 0].neg()

        targeted.dlr_loss_targeted = targeted_margin
        found.apgd.dlr_loss = margin
    return found


def attacks(
    model: nn.Module,
    threat: Threat,
    name: str,
    *,
    classes: int,
    seed: int,
    device: torch.device,
    queries: int | None = None,
) -> dict[str, Attack]:
    """The stages of `autoattack`, or the one of a single attack: stage -> (x, y) -> adversarial images.

    Args:
        name: a key of `STAGES`.
        queries: of Square; the standard's by default.
    """
    whole = suite(model, threat, classes=classes, seed=seed, device=device)
    whole.square.n_queries = queries or QUERIES

    def attack(stage: str) -> Attack:
        part = {"apgd-t": whole.apgd_targeted, "square": whole.square}.get(stage)
        part = part or (whole.fab if stage.startswith("fab") else whole.apgd)

        def run(x: Tensor, y: Tensor) -> Tensor:
            if stage in ("apgd-ce", "apgd-dlr"):
                part.loss = stage.removeprefix("apgd-")
            part.targeted = stage == "fab-t"
            part.seed = seed
            with _undisturbed(model, x.device), torch.no_grad():
                adv: Tensor = part.perturb(x.contiguous(), y)
            return adv

        return run

    return {stage: attack(stage) for stage in STAGES[name]}


def settings(threat: Threat, name: str, *, classes: int, seed: int) -> dict[str, Any]:
    """What was run, for metrics.json."""
    found: dict[str, Any] = {"eps": threat.eps, "seed": seed, "attacks": list(STAGES[name])}
    if name != "autoattack":
        found |= {"restarts": 5} if threat.name == "l1" and name.startswith("apgd") else {"restarts": 1}
        found |= {"queries": QUERIES} if name == "square" else {"steps": 100}
    else:
        targets = min(5 if threat.name == "l1" else 9, classes - 1)
        found |= {"version": "standard", "targets": targets, "fab_targets": min(9, classes - 1), "queries": QUERIES}
    replaced = classes < DLR_CLASSES and name in ("autoattack", "apgd-dlr")
    if name in ("autoattack", "apgd-dlr"):
        found["loss"] = "margin" if replaced else "dlr"
    notes = []
    if name == "autoattack" and classes < 10:
        notes.append(f"{classes} classes: the targeted attacks take all {classes - 1} wrong ones")
    if replaced:
        notes.append(f"the DLR loss is not defined for {classes} classes, the margin of the logits takes its place")
    return found | ({"note": "; ".join(notes)} if notes else {})


def check_fit(threat: Threat, name: str, *, classes: int, shape: tuple[int, ...]) -> None:
    """ValueError where pyautoattack cannot attack such images.

    Args:
        shape: (c, h, w).
    """
    if classes < 2:
        raise ValueError(f"{name} needs at least 2 classes, the model has {classes}")
    if "square" in STAGES[name] and threat.name != "linf" and min(shape[1:]) < 5:
        raise ValueError(
            f"{name} needs images of at least 5x5 pixels for {threat.name}, got {shape[1]}x{shape[2]}: its Square "
            "Attack lays a grid of fifths"
        )


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, no weight gradients (FAB would leave them behind), and torch's generators as they were."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with attack_mode(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for parameter in wanted:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)
