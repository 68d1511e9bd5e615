"""Accuracy against eps and against steps: the curves show whether an attack has converged and sees gradients.

The attack is PGD from the image on the first images, and each example's iterate of highest loss counts
(`PgdSettings.from_image`), so that the points of a curve differ in one number.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from atmc.data import Images
from atmc.evaluation.accuracy import clean_accuracy, robust_accuracy
from atmc.robust.attacks import PgdSettings
from atmc.robust.threats import Threat

SCALES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)  # radii of the curve, as multiples of eps
STEPS = (1, 2, 5, 10, 20, 50, 100)


def eps_grid(threat: Threat, pixels: int) -> list[float]:
    """Return the radii of the curve: 0 and multiples of eps, up to the largest radius that is possible.

    Args:
        pixels: number of values of an image.
    """
    radii = (threat.eps * scale for scale in SCALES)
    return [0.0, *(eps for eps in radii if eps <= threat.largest_eps(pixels))]


def at_eps(model: nn.Module, images: Images, threat: Threat, eps: float, *, steps: int = 40) -> dict[str, Any]:
    """Return one point of the curve against eps, as JSON; eps 0 is clean."""
    if not eps:
        return {"eps": 0.0, **clean_accuracy(model, images).to_json()}
    return {"eps": eps, **_pgd_accuracy(model, images, threat.with_eps(eps), steps)}


def at_steps(model: nn.Module, images: Images, threat: Threat, steps: int) -> dict[str, Any]:
    """Return one point of the curve against steps, as JSON."""
    return {"steps": steps, **_pgd_accuracy(model, images, threat, steps)}


def _pgd_accuracy(model: nn.Module, images: Images, threat: Threat, steps: int) -> dict[str, Any]:
    step_size = PgdSettings.from_image(threat, steps).step_size
    accuracy = robust_accuracy(model, images, threat, "pgd", steps=steps, step_size=step_size)
    return {key: accuracy.to_json()[key] for key in ("accuracy", "n", "ci95")}
