"""Figures: shares of examples with their intervals, and paired comparisons on the same examples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Accuracy:
    """Share of n examples classified right.

    Args:
        accuracy, n: the share and its denominator.
        right: (n,) bool, one verdict an example.
        settings: how the examples were attacked, as in metrics.json.
        fooled_by: (n,) int8, the position in `stages` of the attack that fooled an example, -1 for none.
        stages: the attacks of the protocol, in order.
        adv: (n, c, h, w) float32, what fooled an example, and the clean image where nothing did; None if not kept.
        largest: the largest distance of an image that counts, in the threat's norm, 0 where none does.
        refused: how many images of attacks were not counted since they lay outside the ball, or [0, 1].
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
        """From one verdict an example."""
        return cls(int(right.sum()) / len(right), len(right), right.cpu(), settings)

    @property
    def ci95(self) -> tuple[float, float]:
        """Wilson's 95 % interval."""
        return wilson(round(self.accuracy * self.n), self.n)

    def without(self, *stages: str) -> Tensor:
        """(n,) verdicts before these stages, which stand at the protocol's end, had their turn."""
        if self.fooled_by is None:
            return self.right
        positions = [self.stages.index(stage) for stage in stages if stage in self.stages]
        late = torch.isin(self.fooled_by, torch.tensor(positions, dtype=torch.int8))
        return self.right | late

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


def worst_case(accuracies: list[Accuracy]) -> Accuracy:
    """Right where right under every one, on the examples that all of them judged (the first ones)."""
    n = min(accuracy.n for accuracy in accuracies)
    return Accuracy.of(torch.stack([accuracy.right[:n] for accuracy in accuracies]).all(0))


def at_least(successes: int, n: int) -> float:
    """P(X >= successes) for X of n fair coins; exact.

    >>> at_least(3, 3)
    0.125
    """
    return float(sum(math.comb(n, k) for k in range(successes, n + 1)) / 2**n)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same examples: how many only one of them has right, and McNemar's exact p-value.

    p is two-sided: the chance of a split at least as uneven if either model were as likely to be the only right one.
    """

    n: int
    only_a: int
    only_b: int
    p: float

    def to_json(self) -> dict[str, Any]:
        """As in the JSON of `atmc evaluate --against`."""
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
    """McNemar's exact test (1947; binomial form) of two models' verdicts, each (n,) bool, on the same n examples.

    >>> compare(torch.tensor([True] * 9 + [False]), torch.tensor([False] * 9 + [False])).p
    0.00390625

    Raises:
        ValueError: different numbers of examples.
    """
    if a.shape != b.shape:
        raise ValueError(f"expected verdicts on the same examples, got {len(a)} and {len(b)}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = min(1.0, 2 * at_least(max(only_a, only_b), only_a + only_b))
    return Comparison(len(a), only_a, only_b, p)


def per_class(accuracy: Accuracy, labels: Tensor) -> list[dict[str, Any]]:
    """One accuracy with its interval for each class that occurs among the labels (n,)."""
    labels = labels[: accuracy.n].cpu()
    found = [(label, Accuracy.of(accuracy.right[labels == label])) for label in torch.unique(labels).tolist()]
    return [{"class": label, **share.to_json()} for label, share in found]
