"""Long measurements in parts, kept in a file so that an interrupted one goes on: curves and the certificate."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atmc.core.files import write_beside
from atmc.data import Images
from atmc.evaluation import curves, smoothing
from atmc.robust.threats import Threat

SAVE_EVERY = 20.0  # seconds between two writes of the file


@dataclass(frozen=True)
class Measured:
    """`done` of `total` parts of a measurement are there; `found` says in words what it gives so far."""

    what: str
    done: int
    total: int
    found: str


class Parts:
    """Parts of a measurement by name, each a JSON value.

    Args:
        path: the file that keeps them; None to keep nothing.
        mark: the fingerprint of what decides them, besides what their names say.

    Raises:
        ValueError: the file is of another measurement, or is none.
    """

    def __init__(self, path: Path | None, mark: str) -> None:
        self._path, self._mark, self._saved = path, mark, time.monotonic()
        self._parts: dict[str, Any] = {}
        if path is None or not path.exists():
            return
        try:
            held = json.loads(path.read_bytes())
            found, parts = held["mark"], dict(held["parts"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the state of a measurement, or is damaged: {error}") from error
        if found != mark:
            raise ValueError(f"{path} is of another measurement: remove it, or ask for the same as then")
        self._parts = parts

    def part(self, name: str, measure: Callable[[], Any]) -> Any:
        """The part of that name: as kept, else measured now and kept."""
        if name not in self._parts:
            self._parts[name] = measure()
            if time.monotonic() - self._saved >= SAVE_EVERY:
                self.save()
        return self._parts[name]

    def save(self) -> None:
        """Write the file."""
        if self._path is not None:
            write_beside(self._path, json.dumps({"mark": self._mark, "parts": self._parts}).encode())
        self._saved = time.monotonic()


def measured_curves(
    parts: Parts, model: nn.Module, images: Images, threat: Threat, n: int
) -> Generator[Measured, None, dict[str, Any]]:
    """Accuracy against eps and against steps on the first n images; see `robust.curves`."""
    first = images.take(slice(0, n))
    radii = curves.eps_grid(threat, images.pixels[0].numel())
    measures: dict[str, list[partial[dict[str, Any]]]] = {
        "eps": [partial(curves.at_eps, model, first, threat, eps) for eps in radii],
        "steps": [partial(curves.at_steps, model, first, threat, steps) for steps in curves.STEPS],
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in measures}
    for name, points in measures.items():
        for measure in points:
            point = parts.part(f"{name} {len(found[name])} of {n} images", measure)
            found[name].append(point)
            share = f"{point['accuracy']:.1%} at {point[name]:.4g}"
            yield Measured(f"accuracy against {name}", len(found[name]), len(points), share)
    parts.save()
    return found


def measured_certificate(
    parts: Parts, model: nn.Module, images: Images, sigma: float, n: int, samples: int, seed: int
) -> Generator[Measured, None, dict[str, Any]]:
    """Certified accuracy against radius on the first n images; see `robust.certify`."""
    radii: list[float] = []
    abstained, n = 0, min(n, len(images))
    for i in range(n):
        measure = partial(smoothing.certify_radius, model, images, i, sigma, samples=samples, seed=seed)
        radius, answered = parts.part(f"radius {i} at {sigma!r}, {samples} samples", measure)
        radii.append(radius)
        abstained += not answered
        share = sum(radius >= 0 for radius in radii) / len(radii)
        yield Measured("certificate", i + 1, n, f"{share:.1%} certified right")
    parts.save()
    return smoothing.SmoothingCertificate(torch.tensor(radii, dtype=torch.float64), abstained, sigma, samples).to_json()
