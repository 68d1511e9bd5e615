"""Certified l2 accuracy by randomized smoothing (Cohen, Rosenfeld and Kolter 2019).

The smoothed classifier answers with the class that the model gives most often to the image plus noise N(0, sigma^2).
If that class has probability at least p > 1/2, no change of Euclidean length below sigma * Phi^-1(p) moves the answer.
p is bounded from below out of samples (Clopper and Pearson 1934), so each radius is wrong with probability at most
`FAILURE`. The certificate is of the smoothed classifier, not of the model itself, and pixels of noisy images leave
[0, 1]: a model trained without noise (objective `gaussian`) has little of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import beta, norm
from torch import Tensor, nn

from atmc.core.numerics import full_float32
from atmc.core.rng import Noise
from atmc.data import Images
from atmc.evaluation.accuracy import predictions
from atmc.evaluation.statistics import Accuracy
from atmc.robust.threats import L2, Threat

FAILURE, SELECTION = 0.001, 100  # probability of a wrong radius, an image; samples that choose the class


@dataclass(frozen=True)
class SmoothingCertificate:
    """Certified radii of n images: -1 where the smoothed classifier abstains or is wrong.

    Args:
        radii: (n,) float64, pixel units.
        abstained: how many images it abstained on.
    """

    radii: Tensor
    abstained: int
    sigma: float
    samples: int

    def at(self, radius: float) -> Accuracy:
        """The share that is right and certified up to a radius."""
        return Accuracy.of(self.radii >= radius)

    def to_json(self) -> dict[str, Any]:
        """As in the JSON of `atmc evaluate --certify`: certified accuracy at multiples of sigma / 4."""
        largest = self.sigma * float(norm.ppf(FAILURE ** (1 / self.samples)))  # where every sample agrees
        radii = [k * self.sigma / 4 for k in range(int(largest / (self.sigma / 4)) + 1)]
        curve = [{"radius": radius, **self.at(radius).to_json()} for radius in radii]
        about = {"sigma": self.sigma, "samples": self.samples, "failure_probability": FAILURE, "norm": "l2"}
        return about | {"n": len(self.radii), "abstained": self.abstained, "curve": curve}


def check_settings(threat: Threat, sigma: float, samples: int) -> None:
    """ValueError where a certificate makes no sense."""
    if not isinstance(threat, L2):
        raise ValueError(f"randomized smoothing certifies l2 only, the threat is {threat}")
    if not 0 < sigma < math.inf:
        raise ValueError(f"expected a finite sigma > 0 in pixel units, got {sigma}")
    if samples < SELECTION:
        raise ValueError(f"expected at least {SELECTION} samples an image, got {samples}")


def lower_bound(successes: int, n: int, failure: float = FAILURE) -> float:
    """A bound below the probability of success that n trials exceed with probability at most `failure`.

    >>> round(lower_bound(10_000, 10_000), 5)
    0.99931
    """
    return float(beta.ppf(failure, successes, n - successes + 1)) if successes else 0.0


@full_float32()
def certify_radius(
    model: nn.Module, images: Images, i: int, sigma: float, *, samples: int = 10_000, seed: int = 0
) -> tuple[float, bool]:
    """The certified radius of image i, -1 where the smoothed classifier abstains or is wrong; whether it answered."""
    x = images.float_pixels([i])
    first = _counts(model, x, i, SELECTION, sigma, seed, "smoothing: choice")
    top = int(first.argmax())
    hits = int(_counts(model, x, i, samples, sigma, seed, "smoothing: bound", classes=len(first))[top])
    p = lower_bound(hits, samples)
    if p <= 0.5:
        return -1.0, False
    return (sigma * float(norm.ppf(p)) if top == int(images.labels[i]) else -1.0), True


def _counts(
    model: nn.Module, x: Tensor, index: int, samples: int, sigma: float, seed: int, purpose: str, classes: int = 1
) -> Tensor:
    """(classes or more,) how often each class is predicted among noisy copies of x, (1, c, h, w)."""
    total = torch.zeros(classes, dtype=torch.int64)
    for start in range(0, samples, 1000):
        copies = torch.arange(start, min(start + 1000, samples), device=x.device)
        noise = Noise(copies, seed=seed, purpose=purpose, epoch=index).normal(x.shape[1:])
        found = predictions(model, x + sigma * noise)
        counted = found[found >= 0].bincount(minlength=len(total)).cpu()
        total = torch.nn.functional.pad(total, (0, len(counted) - len(total))) + counted
    return total
