"""Long measurements in parts, kept in a file so that an interrupted one continues: curves and the certificate."""

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
from atmc.evaluation import curves, resume, smoothing
from atmc.robust.threats import Threat


@dataclass(frozen=True)
class PartMeasured:
    """`done` of `total` parts of a measurement are finished; `result` tells in words what they give so far."""

    measurement: str
    done: int
    total: int
    result: str


class PartialResults:
    """Finished parts of measurements by name, each a JSON value.

    Args:
        path: the file that keeps them; None to keep them in memory only.
        fingerprint: of everything that decides the values besides the names of the parts.

    Raises:
        ValueError: the file is damaged, is not of this kind, or has another fingerprint.
    """

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self._path, self._fingerprint, self._saved = path, fingerprint, time.monotonic()
        self._values: dict[str, Any] = {}
        if path is None or not path.exists():
            return
        try:
            content = json.loads(path.read_bytes())
            mark, values = content["mark"], dict(content["parts"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the state of a measurement, or is damaged: {error}") from error
        if mark != fingerprint:
            raise ValueError(f"{path} is of another measurement: remove it, or repeat the options of that measurement")
        self._values = values

    def get(self, name: str) -> Any:
        """Return the part of this name; None if there is none yet."""
        return self._values.get(name)

    def keep(self, name: str, value: Any) -> None:
        """Keep a part, and write the file if the last time was some seconds ago."""
        self._values[name] = value
        if time.monotonic() - self._saved >= resume.SAVE_EVERY:
            self.save()

    def get_or_measure(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return the part of this name; if there is none yet, measure and keep it."""
        if name not in self._values:
            self.keep(name, measure())
        return self._values[name]

    def save(self) -> None:
        """Write the file, if there is one."""
        if self._path is not None:
            write_beside(self._path, json.dumps({"mark": self._fingerprint, "parts": self._values}).encode())
        self._saved = time.monotonic()


def measure_curves(
    results: PartialResults, model: nn.Module, images: Images, threat: Threat, n: int
) -> Generator[PartMeasured, None, dict[str, Any]]:
    """Measure accuracy against eps and against steps on the first n images; yield after each point, return all."""
    first = images.take(slice(0, n))
    radii = curves.eps_grid(threat, images.pixels[0].numel())
    measures: dict[str, list[partial[dict[str, Any]]]] = {
        "eps": [partial(curves.at_eps, model, first, threat, eps) for eps in radii],
        "steps": [partial(curves.at_steps, model, first, threat, steps) for steps in curves.STEPS],
    }
    points: dict[str, list[dict[str, Any]]] = {name: [] for name in measures}
    for name, measures_of_points in measures.items():
        for measure in measures_of_points:
            point = results.get_or_measure(f"{name} {len(points[name])} of {n} images", measure)
            points[name].append(point)
            text = f"{point['accuracy']:.1%} at {point[name]:.4g}"
            yield PartMeasured(f"accuracy against {name}", len(points[name]), len(measures_of_points), text)
    results.save()
    return points


def measure_certificate(
    results: PartialResults, model: nn.Module, images: Images, sigma: float, n: int, samples: int, seed: int
) -> Generator[PartMeasured, None, dict[str, Any]]:
    """Certify the first n images by randomized smoothing; yield after each image, return the JSON."""
    radii: list[float] = []
    abstained, n = 0, min(n, len(images))
    for i in range(n):
        measure = partial(smoothing.certify_radius, model, images, i, sigma, samples=samples, seed=seed)
        radius, answered = results.get_or_measure(f"radius {i} at {sigma!r}, {samples} samples", measure)
        radii.append(radius)
        abstained += not answered
        share = sum(radius >= 0 for radius in radii) / len(radii)
        yield PartMeasured("certificate", i + 1, n, f"{share:.1%} certified right")
    results.save()
    return smoothing.SmoothingCertificate(torch.tensor(radii, dtype=torch.float64), abstained, sigma, samples).to_json()
