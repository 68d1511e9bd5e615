"""Verdicts of an attack, example by example, and what is reported of them besides the accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atmc.data import Images


@dataclass(kw_only=True)
class Verdicts:
    """The progress of a protocol on n examples: all that it takes to continue. Tensors are on the CPU.

    Examples before `start` are finished. Of the block of examples that begins at `start`, `queue` waits for stage
    `stage` (-1: for the clean pass), and the first `done` of the queue have been attacked by it.

    Args:
        right: (n,) bool, whether the example is still classified right.
        fooled_by: (n,) int8, position of the stage that fooled the example, -1 for none.
        l2, linf: (n,) distances of the last adversarial image in these norms, NaN if there was none.
        distance: (n,) distance of the image that fooled the model in the threat's norm, 0 if there was none.
        queue: rows of examples that wait for the stage.
        adv: (n, c, h, w) what fooled the model, or the clean image; None if it is not kept.
        refused: number of images that did not count, since they were outside the ball or [0, 1].
    """

    right: Tensor
    fooled_by: Tensor
    l2: Tensor
    linf: Tensor
    distance: Tensor
    queue: Tensor
    adv: Tensor | None = None
    start: int = 0
    stage: int = -1
    done: int = 0
    refused: int = 0

    @classmethod
    def fresh(cls, images: Images, n: int, *, keep: bool) -> Verdicts:
        """Return the verdicts of the first n images before any attack; with keep, adversarial images are kept."""
        return cls(
            right=torch.zeros(n, dtype=torch.bool),
            fooled_by=torch.full((n,), -1, dtype=torch.int8),
            l2=torch.full((n,), torch.nan),
            linf=torch.full((n,), torch.nan),
            distance=torch.zeros(n),
            queue=torch.zeros(0, dtype=torch.int64),
            adv=images.float_pixels(slice(0, n)).cpu().clone() if keep else None,
        )


def mean_distances(verdicts: Verdicts, stages: Sequence[str]) -> dict[str, Any]:
    """Return the mean distances of the adversarial images, in pixel units; None if no image was attacked."""
    means: dict[str, Any] = {}
    for name, distances in (("mean_l2", verdicts.l2), ("mean_linf", verdicts.linf)):
        distances = distances[: verdicts.start]
        distances = distances[~distances.isnan()]
        means[name] = round(float(distances.mean()), 6) if len(distances) else None
    return means


def accuracy_after_stages(verdicts: Verdicts, stages: Sequence[str]) -> dict[str, Any]:
    """Return the accuracy after each stage, by the stage's name."""
    right, fooled_by = verdicts.right[: verdicts.start], verdicts.fooled_by[: verdicts.start]
    clean = right | (fooled_by >= 0)
    left = [clean & ((fooled_by < 0) | (fooled_by > position)) for position in range(len(stages))]
    return {"after": {name: round(float(one.float().mean()), 6) for name, one in zip(stages, left, strict=True)}}
