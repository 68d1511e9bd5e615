"""AutoAttack (Croce and Hein 2020) through `pyautoattack`, one part at a time.

pyautoattack makes the adversarial images; `accuracy` decides which images are attacked, in which batches, and what
counts as fooled. Order, batches and seeds are those of its `run_standard_evaluation`, so that the verdicts are the same
too (a test compares the two). For 10 classes and more the parameters are unchanged. With fewer classes, the targeted
attacks take all wrong classes as targets. With 2 or 3 classes the margin of the logits replaces the DLR loss, which
divides by a difference of the third and fourth logits. The attacks for l1 are those of Croce and Hein 2021.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pyautoattack import AutoAttack
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from atmc.core.torch_state import own_generators
from atmc.robust.attacks import attack_mode, margin
from atmc.robust.threats import Threat

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
QUERIES = 5000  # of Square, in the standard version
LONG_QUERIES, QUICK_QUERIES = 20_000, 200  # of a longer Square and of a short one
SHARE = 0.8  # of the pixels in the first squares of these two
STEPS = 100  # of APGD and FAB, in the standard version
DLR_CLASSES = 4  # the fewest for which the targeted DLR loss is defined

Attack = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of pyautoattack's attacks, and how it is called.

    Args:
        attribute: where AutoAttack keeps it.
        loss: the loss to select, None if there is no choice.
        dlr: whether it maximizes the DLR loss.
        targeted: whether to set it to aim at chosen classes.
        l1_restarts: starts for l1; other norms have one.
        gradient_free: whether it takes queries instead of gradient steps.
    """

    attribute: str
    loss: str | None = None
    dlr: bool = False
    targeted: bool = False
    l1_restarts: int = 1
    gradient_free: bool = False


SQUARE = "square"
PARTS = {
    "apgd-ce": Part(attribute="apgd", loss="ce", l1_restarts=5),
    "apgd-dlr": Part(attribute="apgd", loss="dlr", dlr=True, l1_restarts=5),
    "apgd-t": Part(attribute="apgd_targeted", dlr=True),
    "fab": Part(attribute="fab"),
    "fab-t": Part(attribute="fab", targeted=True),
    SQUARE: Part(attribute="square", gradient_free=True),
}
STANDARD = ("apgd-ce", "apgd-t", "fab-t", SQUARE)  # AutoAttack's standard version, in its order


def build_suite(model: nn.Module, threat: Threat, *, classes: int, seed: int, device: torch.device) -> Any:
    """Return pyautoattack's object in its standard version, adapted to the number of classes, and silent."""
    norm, names = NORMS[threat.name], list(STANDARD)
    # the version "custom" logs nothing; the parameters of "standard" are set below
    suite = AutoAttack(model, attacks=names, norm=norm, eps=threat.eps, seed=seed, device=device, version="custom")
    logger = logging.Logger("pyautoattack")  # outside the hierarchy of loggers: our checks cover its warnings
    logger.addHandler(logging.NullHandler())
    for attack in (suite, suite.apgd, suite.apgd_targeted):
        attack.logger = logger
    suite._set_version("standard")
    wrong = classes - 1
    suite.apgd_targeted.n_target_classes = min(suite.apgd_targeted.n_target_classes, wrong)
    suite.fab.n_target_classes = min(suite.fab.n_target_classes, wrong)
    if classes < DLR_CLASSES:
        targeted = suite.apgd_targeted

        def targeted_margin(logits: Tensor, y: Tensor) -> Tensor:
            target_and_right = torch.stack((targeted.y_target, y), dim=1)
            return logits.gather(1, target_and_right).diff(dim=1)[:, 0].neg()

        targeted.dlr_loss_targeted = targeted_margin
        suite.apgd.dlr_loss = margin
    return suite


def build_attacks(
    model: nn.Module,
    threat: Threat,
    names: Sequence[str],
    *,
    classes: int,
    seed: int,
    device: torch.device,
    queries: int | None = None,
) -> dict[str, Attack]:
    """Return parts of AutoAttack by name, each a function (x, y) -> adversarial images.

    Args:
        names: keys of `PARTS`.
        queries: of Square; those of the standard version by default.
    """
    suite = build_suite(model, threat, classes=classes, seed=seed, device=device)
    suite.square.n_queries = queries or QUERIES

    def build(part: Part) -> Attack:
        attack = getattr(suite, part.attribute)

        def run(x: Tensor, y: Tensor) -> Tensor:
            if part.loss is not None:
                attack.loss = part.loss
            attack.targeted = part.targeted
            attack.seed = seed
            with _isolate(model, x.device), torch.no_grad():
                adv: Tensor = attack.perturb(x.contiguous(), y)
            return adv

        return run

    return {name: build(PARTS[name]) for name in names}


def build_square(
    model: nn.Module,
    logits: Callable[[Tensor], Tensor],
    threat: Threat,
    *,
    queries: int,
    seed: int,
    device: torch.device,
) -> Attack:
    """Return Square with another number of queries than in the standard version, over which its squares shrink.

    Args:
        logits: what stands for the model: images (n, c, h, w) -> logits (n, classes).
    """
    attack = SquareAttack(
        logits,
        norm=NORMS[threat.name],
        eps=threat.eps,
        n_queries=queries,
        p_init=SHARE,
        seed=seed,
        resc_schedule=True,
        device=device,
    )

    def run(x: Tensor, y: Tensor) -> Tensor:
        with _isolate(model, x.device), torch.no_grad():
            adv: Tensor = attack.perturb(x.contiguous(), y)
        return adv

    return run


def describe_settings(threat: Threat, names: Sequence[str], *, classes: int, seed: int) -> dict[str, Any]:
    """Return the settings that metrics.json shows of one part, or of the standard version.

    Args:
        names: a key of `PARTS`, or those of `STANDARD`.
    """
    parts = [PARTS[name] for name in names]
    settings: dict[str, Any] = {"eps": threat.eps, "seed": seed, "attacks": list(names)}
    if len(parts) == 1:
        settings |= {"restarts": parts[0].l1_restarts if threat.name == "l1" else 1}
        settings |= {"queries": QUERIES} if parts[0].gradient_free else {"steps": STEPS}
    else:
        targets = min(5 if threat.name == "l1" else 9, classes - 1)
        settings |= {"version": "standard", "targets": targets, "fab_targets": min(9, classes - 1), "queries": QUERIES}
    notes = []
    if len(parts) > 1 and classes < 10:
        notes.append(f"{classes} classes: the targeted attacks take all {classes - 1} wrong ones")
    if any(part.dlr for part in parts):
        settings["loss"] = "dlr" if classes >= DLR_CLASSES else "margin"
        notes += [no_dlr_note(classes)] if classes < DLR_CLASSES else []
    return settings | ({"note": "; ".join(notes)} if notes else {})


def no_dlr_note(classes: int) -> str:
    """Return the note of a result for which the margin replaced the DLR loss."""
    return f"the DLR loss is not defined for {classes} classes, the margin of the logits takes its place"


def check_fit(threat: Threat, names: Sequence[str], *, attack: str, classes: int, shape: tuple[int, ...]) -> None:
    """Raise ValueError if pyautoattack cannot attack such images.

    Args:
        names: keys of `PARTS`.
        attack: what an error calls the attack.
        shape: (c, h, w).
    """
    if classes < 2:
        raise ValueError(f"{attack} needs at least 2 classes, the model has {classes}")
    if SQUARE in names and threat.name != "linf" and min(shape[1:]) < 5:
        raise ValueError(
            f"{attack} needs images of at least 5x5 pixels for {threat.name}, got {shape[1]}x{shape[2]}: its Square "
            "Attack divides them into a grid of 5x5"
        )


@contextmanager
def _isolate(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Set evaluation mode without weight gradients (FAB leaves some), and restore torch's generators at the end."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with attack_mode(model), own_generators(device):
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
