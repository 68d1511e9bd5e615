"""Accuracy against eps and against steps: single figures hide where an attack has not converged, or gives up.

Both are PGD from the image, best of steps, on the first images, so that the points of a curve differ in one number.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from atmc.data import Images
from atmc.robust.evaluate import clean_accuracy, robust_accuracy
from atmc.robust.threats import Threat

SCALES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)  # of eps
STEPS = (1, 2, 5, 10, 20, 50, 100)
PATH = 2.5  # length of the path of all steps together, over eps


def against_eps(model: nn.Module, images: Images, threat: Threat, *, n: int, steps: int = 40) -> list[dict[str, Any]]:
    """Accuracies at multiples of the threat's eps, from 0 up to what the box allows, as JSON."""
    first = images.take(slice(0, n))
    points = [{"eps": 0.0, **clean_accuracy(model, first).to_json()}]
    for eps in (threat.eps * scale for scale in SCALES):
        if eps <= threat.largest_eps(images.pixels[0].numel()):
            points.append({"eps": eps, **_pgd(model, first, threat.with_eps(eps), steps)})
    return points


def against_steps(model: nn.Module, images: Images, threat: Threat, *, n: int) -> list[dict[str, Any]]:
    """Accuracies after more and more steps within the threat, as JSON."""
    first = images.take(slice(0, n))
    return [{"steps": steps, **_pgd(model, first, threat, steps)} for steps in STEPS]


def _pgd(model: nn.Module, images: Images, threat: Threat, steps: int) -> dict[str, Any]:
    found = robust_accuracy(model, images, threat, "pgd", steps=steps, step_size=PATH * threat.eps / steps)
    return {key: found.to_json()[key] for key in ("accuracy", "n", "ci95")}
