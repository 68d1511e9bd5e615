"""Accuracy, clean and under attack, with its number of examples and a 95 % interval.

A figure is the share of examples that no attack of the named kind fooled; what an attack did stands beside it. All
randomness is keyed by seed, restart and example, so that a figure depends neither on batch size nor on order. Whatever
precision the user has chosen for training, float32 is full here (no TF32).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from atmc.data import Images
from atmc.numerics import full_float32
from atmc.rng import Noise, check_seed
from atmc.robust.attacks import attack_mode, fgsm, pgd, wrm
from atmc.robust.threats import Threat

ATTACKS = ("fgsm", "pgd", "pgd-strong", "wrm")
STRONG_STEPS, STRONG_RESTARTS = 40, 5


@dataclass(frozen=True)
class Accuracy:
    """Share of n examples classified right; settings says how they were attacked; right is (n,) bool."""

    accuracy: float
    n: int
    right: Tensor = field(repr=False)
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, right: Tensor, **settings: Any) -> Accuracy:
        """From one verdict an example."""
        return cls(float(right.float().mean()), len(right), right.cpu(), settings)

    @property
    def ci95(self) -> tuple[float, float]:
        """Wilson's 95 % interval."""
        return wilson(round(self.accuracy * self.n), self.n)

    def to_json(self) -> dict[str, Any]:
        """As in metrics.json."""
        return {
            "accuracy": round(self.accuracy, 6),
            "n": self.n,
            "ci95": [round(bound, 4) for bound in self.ci95],
            **self.settings,
        }


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927).

    >>> [round(bound, 3) for bound in wilson(0, 10)]
    [0.0, 0.278]
    """
    if n < 1:
        raise ValueError(f"expected at least 1 example, got {n}")
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def paper_steps(threat: Threat) -> int:
    """Steps of the paper's attack: 7 at its CIFAR-10 radii (l-infinity below 0.1), 16 at MNIST's and elsewhere."""
    return 7 if threat.name == "linf" and threat.eps < 0.1 else 16


@full_float32()
def clean_accuracy(model: nn.Module, images: Images, *, n: int | None = None, batch_size: int = 500) -> Accuracy:
    """Accuracy on the first n unchanged images, all by default."""
    count = min(n or len(images), len(images))
    right = [predictions(model, x) == y for x, y, _ in _chunks(images, count, batch_size)]
    return Accuracy.of(torch.cat(right))


@torch.no_grad()
def predictions(model: nn.Module, x: Tensor) -> Tensor:
    """(n,) predicted classes in evaluation mode; no class (-1) where an output is not a number."""
    with attack_mode(model):
        logits = model(x).float()
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


@full_float32()
def robust_accuracy(
    model: nn.Module,
    images: Images,
    threat: Threat,
    attack: str = "pgd",
    *,
    n: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    batch_size: int = 500,
) -> Accuracy:
    """Accuracy on the first n images under a named attack: right when clean, and after every restart.

    Attacks: ``fgsm``; ``pgd``, the paper's (steps of 1.25 eps / steps, start at x, last iterate); ``pgd-strong``
    (40 steps of eps / 10, 5 random restarts, best of steps, together with ``pgd``); ``wrm`` (penalty 1.3, 7 steps, no
    ball: the threat is not used, mean distances are reported).

    Args:
        n: number of examples, all by default.
        steps: steps of ``pgd``, by default `paper_steps`.

    Raises:
        ValueError: an unknown attack, n < 1, steps < 1, or a seed that 63 bits do not hold.
    """
    check_attacks([attack])
    if n is not None and n < 1:
        raise ValueError(f"expected n >= 1 examples, got {n}")
    if steps is not None and steps < 1:
        raise ValueError(f"expected steps >= 1, got {steps}")
    check_seed(seed)
    count = min(n or len(images), len(images))
    chunks = _chunks(images, count, batch_size)
    if attack == "fgsm":
        right = [_held(model, x, y, fgsm(model, x, y, threat)) for x, y, _ in chunks]
        return Accuracy.of(torch.cat(right), eps=threat.eps)
    if attack == "wrm":
        return _under_wrm(model, chunks)
    steps = paper_steps(threat) if steps is None else steps
    step_size = 1.25 * threat.eps / steps
    right = []
    for x, y, index in chunks:
        alive = predictions(model, x) == y
        _survive(model, x, y, alive, lambda x, y, _: pgd(model, x, y, threat, steps=steps, step_size=step_size), index)
        for restart in range(STRONG_RESTARTS if attack == "pgd-strong" else 0):

            def strong(x: Tensor, y: Tensor, index: Tensor, restart: int = restart) -> Tensor:
                noise = Noise(index, seed=seed, purpose="evaluation", epoch=restart)
                size = threat.eps / 10
                return pgd(model, x, y, threat, steps=STRONG_STEPS, step_size=size, noise=noise, best_of_steps=True)

            _survive(model, x, y, alive, strong, index)
        right.append(alive)
    return Accuracy.of(torch.cat(right), **_pgd_settings(attack, threat, steps, step_size, seed))


def _pgd_settings(attack: str, threat: Threat, steps: int, step_size: float, seed: int) -> dict[str, Any]:
    strong = attack == "pgd-strong"
    return {
        "eps": threat.eps,
        "steps": STRONG_STEPS if strong else steps,
        "step_size": threat.eps / 10 if strong else step_size,
        "random_start": strong,
        "restarts": STRONG_RESTARTS if strong else 1,
        "loss": "ce",
        "seed": seed,
        **(
            {"with": {"attack": "pgd", "steps": steps, "step_size": step_size, "random_start": False}} if strong else {}
        ),
    }


def _held(model: nn.Module, x: Tensor, y: Tensor, adv: Tensor) -> Tensor:
    """(n,) whether both the clean and the attacked image are classified right."""
    return (predictions(model, x) == y) & (predictions(model, adv) == y)


def _survive(model: nn.Module, x: Tensor, y: Tensor, alive: Tensor, attack: Any, index: Tensor) -> None:
    """Attack the examples still alive and clear the mark, in place, of those that are fooled."""
    if alive.any():
        adv = attack(x[alive], y[alive], index[alive])
        alive[alive.clone()] = predictions(model, adv) == y[alive]


def _under_wrm(model: nn.Module, chunks: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Accuracy:
    right, l2, linf = [], [], []
    for x, y, _ in chunks:
        adv = wrm(model, x, y)
        right.append(_held(model, x, y, adv))
        change = (adv - x).flatten(1)
        l2.append(change.norm(dim=1))
        linf.append(change.abs().amax(1))
    return Accuracy.of(
        torch.cat(right),
        penalty=1.3,
        steps=7,
        mean_l2=round(float(torch.cat(l2).mean()), 6),
        mean_linf=round(float(torch.cat(linf).mean()), 6),
    )


def check_attacks(names: Sequence[str]) -> None:
    """ValueError for an attack that is not known, with the nearest name."""
    for name in names:
        if name not in ATTACKS:
            near = get_close_matches(name, ATTACKS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown attack {name!r}: expected one of {', '.join(ATTACKS)}{hint}")


def _chunks(images: Images, count: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(x float32 in [0, 1], y, index) over the first count images."""
    for start in range(0, count, batch_size):
        index = torch.arange(start, min(start + batch_size, count), device=images.labels.device)
        yield images.float_pixels(index), images.labels[index], index
