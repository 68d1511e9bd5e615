"""What the checks look at: a model, some images, and what the evaluation found on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from atmc.core.rng import Noise
from atmc.data import Images
from atmc.evaluation.accuracy import predictions
from atmc.evaluation.attacks import STRONG_STEPS, Custom, paper_steps
from atmc.evaluation.statistics import Accuracy, wilson
from atmc.robust.attacks import attack_mode, pgd
from atmc.robust.threats import Threat

CHECKED = 100  # images
LEEWAY = 0.02  # of many images: what a second attack finds beyond a first though both are sound
NOT_WHITE_BOX = ("fgsm", "wrm", "square")  # not what the others are held against


@dataclass(frozen=True)
class Check:
    """One doubt: its name, the verdict, and the figures in words."""

    name: str
    ok: bool | None
    detail: str

    def to_json(self) -> dict[str, Any]:
        """As in metrics.json."""
        return {"name": self.name, "ok": self.ok, "detail": self.detail}


@dataclass(frozen=True, eq=False)
class Suspect:
    """A model, images, and what the evaluation found on them.

    Args:
        x, y, index: the images looked at, (m, c, h, w), their labels and positions in the split, (m,).
        right: (m,) bool, right without attack.
        standing: (m,) bool, right after the white-box attacks of the evaluation.
        against: the names of those attacks.
        clean: of all images.
        commonest: the share of the commonest label among all images.
        attacks: the evaluation's figures.
        custom: settings of `pgd`.
        source: a model whose adversarial images are tried on this one.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    index: Tensor
    threat: Threat
    right: Tensor
    standing: Tensor
    against: tuple[str, ...]
    clean: Accuracy
    commonest: float = 0.0
    attacks: Mapping[str, Accuracy] = field(default_factory=dict)
    custom: Custom = field(default_factory=Custom)
    source: nn.Module | None = None
    seed: int = 0

    @property
    def loss(self) -> str:
        """What PGD climbs; the margin for dlr, of the same sign and defined for any number of classes."""
        return "margin" if self.custom.loss == "dlr" else self.custom.loss

    @property
    def steps(self) -> int:
        """Steps of the strongest PGD that the evaluation ran."""
        if any(name != "pgd" for name in self.against):
            return STRONG_STEPS
        return self.custom.steps or paper_steps(self.threat)

    @property
    def step_size(self) -> float:
        """Their size."""
        if any(name != "pgd" for name in self.against):
            return self.threat.eps / 10
        return self.custom.step_size or 1.25 * self.threat.eps / self.steps

    def noise(self, purpose: str, draw: int = 0) -> Noise:
        """Random numbers for the images, of the checks' own."""
        return Noise(self.index, seed=self.seed, purpose=purpose, epoch=draw)

    def withstand(self, attack: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """(m,) verdicts after an attack (x, y, positions among the m) on those still standing."""
        left = self.standing.clone()
        where = left.nonzero()[:, 0]
        if len(where):
            adv = attack(self.x[where], self.y[where], where)
            left[where] = predictions(self.model, adv) == self.y[where]
        return left


def suspect(
    model: nn.Module,
    images: Images,
    threat: Threat,
    clean: Accuracy,
    attacks: Mapping[str, Accuracy],
    *,
    custom: Custom | None = None,
    source: nn.Module | None = None,
    seed: int = 0,
) -> Suspect:
    """The first images with the evaluation's verdicts on them; runs `pgd` where it ran no white-box attack.

    Args:
        images: all of them, on the model's device.
        attacks: name -> figure of the evaluation, on the first images.
    """
    custom = custom or Custom()
    white = left_by(attacks)
    m = min(CHECKED, len(images) if white is None else len(white))
    index = torch.arange(m, device=images.labels.device)
    x, y = images.float_pixels(index), images.labels[index]
    right = predictions(model, x) == y
    standing = right.clone()
    if white is not None:
        standing &= white[:m].to(standing.device)
    elif bool(right.any()):
        steps = custom.steps or paper_steps(threat)
        size = custom.step_size or 1.25 * threat.eps / steps
        loss = "margin" if custom.loss == "dlr" else custom.loss
        adv = pgd(model, x[right], y[right], threat, steps=steps, step_size=size, loss=loss)
        standing[right] = predictions(model, adv) == y[right]
    names = tuple(name for name in attacks if name not in NOT_WHITE_BOX) or ("pgd",)
    share = float(images.labels.bincount().amax()) / len(images)
    return Suspect(model, x, y, index, threat, right, standing, names, clean, share, attacks, custom, source, seed)


def left_by(attacks: Mapping[str, Accuracy]) -> Tensor | None:
    """(n,) what the white-box attacks left of the images that all of them saw, on the CPU; None without any."""
    left = None
    for name, found in attacks.items():
        if name not in NOT_WHITE_BOX:
            right = found.without("square").cpu()
            n = len(right) if left is None else min(len(left), len(right))
            left = right[:n] if left is None else left[:n] & right[:n]
    return left


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """(n, classes) float32 outputs in evaluation mode."""
    with attack_mode(model), torch.no_grad():
        output: Tensor = model(x)
    return output.float()


def relative(a: Tensor, b: Tensor) -> float:
    """Largest distance of two rows over the first's length."""
    apart = (a - b).norm(dim=1) / a.norm(dim=1).clamp_min(1e-12)
    return float(apart.amax())


def compared(name: str, found: Suspect, after: Tensor, what: str, standing: Tensor | None = None) -> Check:
    """Fails where fewer withstand than the interval of the white-box accuracy allows, by more than LEEWAY.

    Args:
        after: (m,) verdicts, or (n,) together with `standing`, those of the white-box attacks on as many images.
    """
    held = found.standing if standing is None else standing
    m, before, left = len(held), int(held.sum()), int(after.sum())
    low = wilson(before, m)[0]
    detail = f"{' and '.join(found.against)} leave {before} of {m}, {what} then {left} (interval from {low:.1%})"
    return Check(name, not before or left / m >= low or before - left <= LEEWAY * m, detail)
