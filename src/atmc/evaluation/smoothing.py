"""Certified l2 accuracy by randomized smoothing (Cohen, Rosenfeld and Kolter 2019).

The smoothed classifier answers with the class that the model gives most often to the image plus noise N(0, sigma^2).
If that class has probability at least p > 1/2, no change of Euclidean length below sigma * Phi^-1(p) moves the answer.
Samples bound p from below (Clopper and Pearson 1934), so each radius is wrong with probability at most `FAILURE`. The
certificate is of the smoothed classifier, not of the model itself. Pixels of noisy images leave [0, 1]: a model that
was not trained on noise (objective `gaussian`) has small radii.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import beta, norm
from torch import Tensor, nn

from atmc.core.rng import Noise
from atmc.core.torch_state import full_float32
from atmc.data import Images
from atmc.evaluation.accuracy import predictions
from atmc.evaluation.statistics import Accuracy
from atmc.robust.threats import L2, Threat

FAILURE = 0.001  # probability that the radius of an image is too large
SELECTION = 100  # samples that choose the class


@dataclass(frozen=True)
class SmoothingCertificate:
    """Certified radii of n images: -1 if the smoothed classifier abstains or is wrong.

    Args:
        radii: (n,) float64, pixel units.
        abstained: number of images on which it abstains.
        sigma: standard deviation of the noise, pixel units.
        samples: noisy copies per image that bound the probability.
    """

    radii: Tensor
    abstained: int
    sigma: float
    samples: int

    def at(self, radius: float) -> Accuracy:
        """Return the share of images that are right and certified up to a radius."""
        return Accuracy.of(self.radii >= radius)

    def to_json(self) -> dict[str, Any]:
        """Return the certificate as in the JSON of `atmc evaluate --certify`: accuracy at multiples of sigma / 4."""
        largest = self.sigma * float(norm.ppf(FAILURE ** (1 / self.samples)))  # the radius if all samples agree
        radii = [k * self.sigma / 4 for k in range(int(largest / (self.sigma / 4)) + 1)]
        curve = [{"radius": radius, **self.at(radius).to_json()} for radius in radii]
        settings = {"sigma": self.sigma, "samples": self.samples, "failure_probability": FAILURE, "norm": "l2"}
        return settings | {"n": len(self.radii), "abstained": self.abstained, "curve": curve}


def check_settings(threat: Threat, sigma: float, samples: int) -> None:
    """Raise ValueError if smoothing gives no certificate against the threat, or sigma or samples make no sense."""
    if not isinstance(threat, L2):
        raise ValueError(f"randomized smoothing certifies l2 only, the threat is {threat}")
    if not 0 < sigma < math.inf:
        raise ValueError(f"expected a finite sigma > 0 in pixel units, got {sigma}")
    if samples < SELECTION:
        raise ValueError(f"expected at least {SELECTION} samples per image, got {samples}")


def lower_bound(successes: int, n: int, failure: float = FAILURE) -> float:
    """Return a lower bound on the probability of success, wrong with probability at most `failure`.

    The bound is Clopper and Pearson's (1934), from the number of successes in n trials.

    >>> round(lower_bound(10_000, 10_000), 5)
    0.99931
    """
    return float(beta.ppf(failure, successes, n - successes + 1)) if successes else 0.0


@full_float32()
def certify_radius(
    model: nn.Module, images: Images, i: int, sigma: float, *, samples: int = 10_000, seed: int = 0
) -> tuple[float, bool]:
    """Return the certified radius of image i, and whether the smoothed classifier gives an answer.

    The algorithm is "Certify" of Cohen et al. 2019. The radius is -1 if the classifier abstains or is wrong.

    Args:
        model: on the images' device.
        sigma: standard deviation of the noise, pixel units.
        samples: noisy copies of the image that bound the probability, besides the 100 that choose the class.
        seed: keys the noise, together with i.
    """
    x = images.float_pixels([i])
    counts = _count_classes(model, x, i, SELECTION, sigma, seed, "smoothing: choice")
    top = int(counts.argmax())
    hits = int(_count_classes(model, x, i, samples, sigma, seed, "smoothing: bound", classes=len(counts))[top])
    p = lower_bound(hits, samples)
    if p <= 0.5:
        return -1.0, False
    return (sigma * float(norm.ppf(p)) if top == int(images.labels[i]) else -1.0), True


def _count_classes(
    model: nn.Module, x: Tensor, index: int, samples: int, sigma: float, seed: int, purpose: str, classes: int = 1
) -> Tensor:
    """Return how often each class is predicted among noisy copies of x, (1, c, h, w); at least `classes` counts."""
    total = torch.zeros(classes, dtype=torch.int64)
    for start in range(0, samples, 1000):
        copies = torch.arange(start, min(start + 1000, samples), device=x.device)
        noise = Noise(copies, seed=seed, purpose=purpose, epoch=index).normal(x.shape[1:])
        predicted = predictions(model, x + sigma * noise)
        counts = predicted[predicted >= 0].bincount(minlength=len(total)).cpu()
        total = torch.nn.functional.pad(total, (0, len(counts) - len(total))) + counts
    return total
