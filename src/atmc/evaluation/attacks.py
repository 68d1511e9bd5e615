"""The attacks that a name stands for: `pgd-strong` or `autoattack` -> stages, with the settings that a figure shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from atmc.core.rng import Noise, check_seed
from atmc.data import Images
from atmc.evaluation import autoattack
from atmc.robust.attacks import LOSSES, attack_mode, cw, fgsm, pgd, wrm
from atmc.robust.threats import Threat, check_threat

ATTACKS = ("fgsm", "pgd", "pgd-strong", "wrm", "cw", "apgd-ce", "apgd-dlr", "fab", "square", "autoattack")
NORMS = {"cw": ("l2",)}  # of the attacks that do not take every norm
STRONG_STEPS, STRONG_RESTARTS = 40, 5

Perturber = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Custom:
    """Settings of `pgd` other than the paper's; None: as `paper_steps` and the paper have them.

    The paper's attack keeps its last iterate, also with other steps; with any of the other settings changed, each
    example's iterate of highest loss counts.

    Args:
        steps: ascent steps, at least 1.
        step_size: in the threat's norm, pixel units; 1.25 eps / steps by default.
        restarts: starts; the first at the image, the others at random points of the ball.
        loss: a name in `attacks.LOSSES`.
    """

    steps: int | None = None
    step_size: float | None = None
    restarts: int = 1
    loss: str = "ce"

    @property
    def as_the_paper(self) -> bool:
        """Whether all but the number of steps is the paper's."""
        return self == Custom(steps=self.steps)

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"expected steps >= 1, got {self.steps}")
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise ValueError(f"expected a step size > 0, in pixel units, got {self.step_size}")
        if self.restarts < 1:
            raise ValueError(f"expected restarts >= 1, got {self.restarts}")
        if self.loss not in LOSSES:
            hint = _near(self.loss, LOSSES)
            raise ValueError(f"unknown loss {self.loss!r}: expected one of {', '.join(LOSSES)}{hint}")


@dataclass(frozen=True)
class Stage:
    """One attack of a protocol: (x, y, index in the split) -> adversarial images."""

    name: str
    perturb: Perturber


@dataclass(frozen=True)
class Protocol:
    """Attacks in turn, each on what the ones before left standing; threat None: no ball, only [0, 1]."""

    attack: str
    stages: list[Stage]
    settings: dict[str, Any]
    threat: Threat | None


def paper_steps(threat: Threat) -> int:
    """Steps of the paper's attack: 7 at its CIFAR-10 radii (l-infinity below 0.1), 16 at MNIST's and elsewhere."""
    return 7 if threat.name == "linf" and threat.eps < 0.1 else 16


def check_attacks(names: Sequence[str]) -> None:
    """ValueError for an attack that is not known, with the nearest name."""
    for name in names:
        if name not in ATTACKS:
            raise ValueError(f"unknown attack {name!r}: expected one of {', '.join(ATTACKS)}{_near(name, ATTACKS)}")


def check_norm(name: str, threat: Threat) -> None:
    """ValueError where the attack does not exist for the threat's norm."""
    norms = NORMS.get(name, (threat.name,))
    if threat.name not in norms:
        raise ValueError(f"attack {name!r} exists for {', '.join(norms)} only, the threat is {threat}")


def _near(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def build_protocol(
    model: nn.Module, images: Images, threat: Threat, attack: str, *, custom: Custom | None = None, seed: int = 0
) -> Protocol:
    """The stages that a name stands for, and the settings that metrics.json shows.

    Raises:
        ValueError: as `robust_accuracy`.
    """
    check_attacks([attack])
    check_seed(seed)
    check_norm(attack, threat)
    check_threat(threat, images.pixels[0].numel())
    custom = custom or Custom()
    if attack == "fgsm":
        return Protocol(attack, [Stage("fgsm", lambda x, y, _: fgsm(model, x, y, threat))], {"eps": threat.eps}, threat)
    if attack == "wrm":
        return Protocol(attack, [Stage("wrm", lambda x, y, _: wrm(model, x, y))], {"penalty": 1.3, "steps": 7}, None)
    if attack == "cw":
        found = {"eps": threat.eps, "steps": 200, "searches": 9, "learning_rate": 0.01}
        return Protocol(attack, [Stage("cw", lambda x, y, _: cw(model, x, y))], found, threat)
    classes = _classes(model, images)
    if attack in autoattack.STAGES:
        autoattack.check_fit(threat, attack, classes=classes, shape=tuple(images.pixels.shape[1:]))
        device = images.labels.device
        parts = autoattack.attacks(model, threat, attack, classes=classes, seed=seed, device=device)
        stages = [Stage(name, lambda x, y, _, run=run: run(x, y)) for name, run in parts.items()]  # type: ignore[misc]
        return Protocol(attack, stages, autoattack.settings(threat, attack, classes=classes, seed=seed), threat)
    return _pgd_protocol(model, threat, attack, custom, classes, seed)


def _pgd_protocol(model: nn.Module, threat: Threat, attack: str, custom: Custom, classes: int, seed: int) -> Protocol:
    steps = custom.steps or paper_steps(threat)
    size = custom.step_size or 1.25 * threat.eps / steps
    loss = "margin" if custom.loss == "dlr" and classes < autoattack.DLR_CLASSES else custom.loss

    def start(restart: int, *, strong: bool) -> Perturber:
        def perturb(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
            if strong:
                noise = Noise(index, seed=seed, purpose="evaluation", epoch=restart)
                step = threat.eps / 10
                return pgd(model, x, y, threat, steps=STRONG_STEPS, step_size=step, noise=noise, best_of_steps=True)
            noise = None if restart == 0 else Noise(index, seed=seed, purpose="pgd", epoch=restart)  # type: ignore[assignment]
            best = not custom.as_the_paper
            return pgd(model, x, y, threat, steps=steps, step_size=size, noise=noise, loss=loss, best_of_steps=best)

        return perturb

    stages = [Stage("pgd", start(restart, strong=False)) for restart in range(custom.restarts)]
    found: dict[str, Any] = {"eps": threat.eps, "steps": steps, "step_size": size, "random_start": custom.restarts > 1}
    found |= {"restarts": custom.restarts, "loss": loss, "seed": seed}
    if loss != custom.loss:
        found["note"] = f"the DLR loss is not defined for {classes} classes, the margin of the logits takes its place"
    if attack == "pgd-strong":
        stages += [Stage("pgd-strong", start(restart, strong=True)) for restart in range(STRONG_RESTARTS)]
        weak: dict[str, Any] = {key: found[key] for key in ("steps", "step_size", "random_start")}
        if not custom.as_the_paper:
            weak |= {"restarts": custom.restarts, "loss": loss}
        found |= {"steps": STRONG_STEPS, "step_size": threat.eps / 10, "random_start": True, "loss": "ce"}
        found |= {"restarts": STRONG_RESTARTS, "with": {"attack": "pgd", **weak}}
    return Protocol(attack, stages, found, threat)


@torch.no_grad()
def _classes(model: nn.Module, images: Images) -> int:
    with attack_mode(model):
        return int(model(images.float_pixels(slice(0, 2))).shape[1])
