"""Accuracies with their intervals, and paired comparisons of models on the same examples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

REPLICATES = 4000  # of a bootstrap


@dataclass(frozen=True)
class Accuracy:
    """Share of n examples classified right.

    Args:
        accuracy, n: the share and the number of examples.
        right: (n,) bool, one verdict per example.
        settings: how the examples were attacked, as in metrics.json.
        fooled_by: (n,) int8, the position in `stages` of the stage that fooled the model, -1 for none.
        stages: the stages of the attack, in order.
        adv: (n, c, h, w) float32, the image that fooled the model, or the clean image if none did; None if not kept.
        largest: the largest distance of an image that fooled the model, in the threat's norm; 0 if there is none.
        refused: number of images of attacks that did not count, since they were outside the ball or [0, 1].
    """

    accuracy: float
    n: int
    right: Tensor = field(repr=False)
    settings: dict[str, Any] = field(default_factory=dict)
    fooled_by: Tensor | None = field(default=None, repr=False)
    stages: tuple[str, ...] = ()
    adv: Tensor | None = field(default=None, repr=False)
    largest: float = 0.0
    refused: int = 0

    @classmethod
    def of(cls, right: Tensor, **settings: Any) -> Accuracy:
        """Return the accuracy of one verdict per example."""
        return cls(int(right.sum()) / len(right), len(right), right.cpu(), settings)

    @property
    def ci95(self) -> tuple[float, float]:
        """Wilson's 95 % interval (low, high)."""
        return wilson(round(self.accuracy * self.n), self.n)

    def right_before(self, *stages: str) -> Tensor:
        """Return the (n,) verdicts before these stages, which must be the last of the attack."""
        if self.fooled_by is None:
            return self.right
        positions = [position for position, stage in enumerate(self.stages) if stage in stages]
        late = torch.isin(self.fooled_by, torch.tensor(positions, dtype=torch.int8))
        return self.right | late

    def count_fooled(self, stages: Iterable[str]) -> dict[str, int]:
        """Return how many examples each of these stages fooled, of those that the attack ran."""
        if self.fooled_by is None:
            return {}
        by_stage = Counter(self.stages[position] for position in self.fooled_by.tolist() if position >= 0)
        return {stage: by_stage[stage] for stage in stages if stage in self.stages}

    def to_json(self) -> dict[str, Any]:
        """Return the accuracy as in metrics.json."""
        return {
            "accuracy": round(self.accuracy, 6),
            "n": self.n,
            "ci95": [round(bound, 4) for bound in self.ci95],
            **self.settings,
        }


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the score interval (low, high) of a proportion (Wilson 1927).

    >>> [round(bound, 3) for bound in wilson(0, 10)]
    [0.0, 0.278]

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"expected at least 1 example, got {n}")
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def worst_case(accuracies: list[Accuracy]) -> Accuracy:
    """Return the accuracy under all of several attacks, on the first examples, which all of them saw."""
    n = min(accuracy.n for accuracy in accuracies)
    return Accuracy.of(torch.stack([accuracy.right[:n] for accuracy in accuracies]).all(0))


def binomial_tail(successes: int, n: int) -> float:
    """Return P(X >= successes) for X binomial with n trials of probability 1/2, exactly.

    >>> binomial_tail(3, 3)
    0.125
    """
    return float(sum(math.comb(n, k) for k in range(successes, n + 1)) / 2**n)


@dataclass(frozen=True)
class Comparison:
    """Two models A and B on the same n examples: how many only one of them has right, and McNemar's exact p-value.

    p is two-sided: the probability of a split at least as uneven if both models were equally likely to be the only one
    that is right.
    """

    n: int
    only_a: int
    only_b: int
    p: float

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as in the JSON of `atmc evaluate --against`."""
        verdict = (
            "no difference shown" if self.p >= 0.05 else "A is better" if self.only_a > self.only_b else "B is better"
        )
        return {
            "n": self.n,
            "only_a": self.only_a,
            "only_b": self.only_b,
            "p": float(f"{self.p:.3g}"),
            "verdict": verdict,
        }


def compare(a: Tensor, b: Tensor) -> Comparison:
    """Return McNemar's exact test (1947; binomial form) of two models' verdicts, (n,) bool, on the same n examples.

    >>> compare(torch.tensor([True] * 9 + [False]), torch.tensor([False] * 9 + [False])).p
    0.00390625

    Raises:
        ValueError: different numbers of examples.
    """
    if a.shape != b.shape:
        raise ValueError(f"expected verdicts on the same examples, got {len(a)} and {len(b)}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = min(1.0, 2 * binomial_tail(max(only_a, only_b), only_a + only_b))
    return Comparison(len(a), only_a, only_b, p)


@dataclass(frozen=True)
class PairedDifference:
    """The mean difference of accuracy of A over B, with a 95 % interval.

    Args:
        difference, low, high: in parts of 1.
        pairs: number of pairs of models, such as seeds.
        n: number of images.
    """

    difference: float
    low: float
    high: float
    pairs: int
    n: int

    def to_json(self) -> dict[str, Any]:
        """Return the difference as plain numbers."""
        ends = [round(self.low, 5), round(self.high, 5)]
        return {"difference": round(self.difference, 5), "ci95": ends, "pairs": self.pairs, "n": self.n}


def paired_difference(a: Tensor, b: Tensor, *, seed: int = 0) -> PairedDifference:
    """Compare two methods by pairs of models on the same images; the interval is from a bootstrap.

    All models see the same images, so that pairs and images are crossed: each replicate draws pairs with replacement
    and, for all of them alike, images with replacement (Owen 2007, "The pigeonhole bootstrap", which shows that this
    variance is not too small). With few pairs the interval rests on few draws: three seeds give a rough idea of how
    much seeds differ. With one pair only images are drawn, and the interval says nothing about other seeds.

    Args:
        a, b: (pairs, n) bool, whether each model has each image right; row i of both is a pair.
        seed: of the bootstrap.

    >>> same = torch.ones(3, 50, dtype=torch.bool)
    >>> paired_difference(same, same).to_json()
    {'difference': 0.0, 'ci95': [0.0, 0.0], 'pairs': 3, 'n': 50}

    Raises:
        ValueError: verdicts of different shapes, or none.
    """
    if a.shape != b.shape or a.dim() != 2 or not a.numel():
        raise ValueError(
            f"expected verdicts of as many models on as many images, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    differences = a.cpu().numpy().astype(np.int8) - b.cpu().numpy().astype(np.int8)
    pairs, n = differences.shape
    changed = differences[:, differences.any(0)].astype(np.float64)  # other images add 0 to every replicate
    generator = np.random.default_rng(seed)
    outcomes = np.append(np.full(changed.shape[1], 1 / n), 1 - changed.shape[1] / n)
    images = generator.multinomial(n, outcomes, size=REPLICATES)[:, :-1]
    models = generator.multinomial(pairs, np.full(pairs, 1 / pairs), size=REPLICATES)
    means = ((models @ changed) * images).sum(1) / (n * pairs)
    low, high = np.quantile(means, [0.025, 0.975])
    return PairedDifference(float(differences.mean()), float(low), float(high), pairs, n)


def per_class(accuracy: Accuracy, labels: Tensor) -> list[dict[str, Any]]:
    """Return the accuracy, with its interval, of each class that occurs among the labels (n,)."""
    labels = labels[: accuracy.n].cpu()
    shares = [(label, Accuracy.of(accuracy.right[labels == label])) for label in torch.unique(labels).tolist()]
    return [{"class": label, **share.to_json()} for label, share in shares]
