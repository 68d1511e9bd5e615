"""Accuracy against eps and against steps: single figures hide where an attack has not converged, or gives up.

Both are PGD from the image, best of steps, on the first images, so that the points of a curve differ in one number.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from atmc.data import Images
from atmc.evaluation.accuracy import clean_accuracy, robust_accuracy
from atmc.robust.threats import Threat

SCALES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)  # of eps
STEPS = (1, 2, 5, 10, 20, 50, 100)
PATH = 2.5  # length of the path of all steps together, over eps


def eps_grid(threat: Threat, pixels: int) -> list[float]:
    """The radii of the curve: multiples of eps, from 0 to what the box allows an image of so many values."""
    radii = (threat.eps * scale for scale in SCALES)
    return [0.0, *(eps for eps in radii if eps <= threat.largest_eps(pixels))]


def at_eps(model: nn.Module, images: Images, threat: Threat, eps: float, *, steps: int = 40) -> dict[str, Any]:
    """One point of the curve against eps, as JSON; eps 0 is clean."""
    if not eps:
        return {"eps": 0.0, **clean_accuracy(model, images).to_json()}
    return {"eps": eps, **_pgd(model, images, threat.with_eps(eps), steps)}


def at_steps(model: nn.Module, images: Images, threat: Threat, steps: int) -> dict[str, Any]:
    """One point of the curve against steps, as JSON."""
    return {"steps": steps, **_pgd(model, images, threat, steps)}


def _pgd(model: nn.Module, images: Images, threat: Threat, steps: int) -> dict[str, Any]:
    found = robust_accuracy(model, images, threat, "pgd", steps=steps, step_size=PATH * threat.eps / steps)
    return {key: found.to_json()[key] for key in ("accuracy", "n", "ci95")}
