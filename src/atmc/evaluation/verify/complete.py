"""Branch and bound: decide an image by splitting the maxima that are open around it (Bunel et al. 2020).

A *branch* is a set of images of the threat for which some maxima are known to equal, or not to equal, a candidate. Its
margin is bounded by the linear bounds of `lines.py`, whose multipliers stand for the branch's conditions (beta-CROWN,
Wang et al. 2021). The branch of the largest bound is split in two until all bounds are below 0, which proves the image
for one execution, or until the float32 model errs on an image. The images that are tried are those at which the linear
bounds are largest, improved by a few steps of PGD.

Only bounds that are sound for what float32 computes count as a proof, and only an image that the model gets wrong
counts as broken; what chooses branches, lines and images need not be right.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor, nn

from atmc.evaluation.accuracy import predictions
from atmc.evaluation.verify.executions import Execution
from atmc.evaluation.verify.linear import Neighborhood, Reducer
from atmc.evaluation.verify.linear_program import Program
from atmc.evaluation.verify.lines import Bounds, Lines, Region, bound_above
from atmc.robust.attacks import input_gradient, margin
from atmc.robust.threats import Threat

ROOT_STEPS = 20  # of the optimization of lines before any branch
PGD_STEPS = 4  # of an image at which a bound is largest


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was decided of an image.

    Args:
        verdict: "certified", "broken" or "undecided".
        image: (c, h, w), the image that breaks it; None if it is not broken.
        unstable: number of maxima, ReLUs and windows of max pooling, whose outcome is open under the bounds before any
            branch; of the execution that has most of them.
        branches: number of branches that were bounded.
        seconds: time that was spent.
    """

    verdict: str
    image: Tensor | None
    unstable: int
    branches: int
    seconds: float


def decide(
    model: nn.Module,
    executions: Sequence[Execution],
    x: Tensor,
    label: int,
    threat: Threat,
    *,
    seconds: float,
    seed: int = 0,
) -> Outcome:
    """Prove an image for all executions, or break it, or give up after a time limit.

    Args:
        model: in float32, on the CPU; what errs on an image that breaks x.
        executions: what runs of the model; each is proved.
        x: (c, h, w) in [0, 1].
        seconds: the time limit.
        seed: keys random choices.

    Raises:
        ValueError: as `bound_images`.
    """
    search = _Search(model, x, label, threat, time.monotonic() + seconds)
    began = time.monotonic()
    proved = search.resist(x.reshape(1, -1)) and all(search.prove(execution) for execution in executions)
    verdict = "certified" if proved else "undecided" if search.image is None else "broken"
    return Outcome(
        verdict=verdict,
        image=search.image,
        unstable=search.unstable,
        branches=search.branches,
        seconds=time.monotonic() - began,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Branch:
    """A margin on a part of the images; in units and candidates of all levels, one level after the other.

    Args:
        target: the margin.
        alive: (r,) bool, whether the unit may equal the candidate.
        floored: (u,) bool, whether the unit may equal its floor.
    """

    target: int
    alive: Tensor
    floored: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class _Bounded:
    """A branch with its bound.

    Args:
        value: the bound.
        lines: of each level, that gave it.
        images: (k, pixels) at which linear functions that bound the margin are largest.
        split: the unit and the candidate at which to split the branch; None if nothing is open.
    """

    branch: _Branch
    value: float
    lines: list[Lines]
    images: Tensor
    split: tuple[int, int] | None


class _Tree:
    """The branches of one execution around an image."""

    def __init__(self, around: Neighborhood) -> None:
        self.around = around
        self.levels, self.pixels = around.levels, around.pixels
        self.program = Program(around.levels, around.pixels)
        self.candidates = [len(level.unit) for level in around.levels]
        self.units = [level.units for level in around.levels]
        first = [sum(self.units[:index]) for index in range(len(self.units))]
        nothing = torch.zeros(0, dtype=torch.int64)
        self.unit = torch.cat([nothing, *(level.unit + at for level, at in zip(self.levels, first, strict=True))])

    def root(self) -> list[_Branch]:
        """Return one branch for each margin that intervals and optimized lines leave open."""
        bounds, _ = self.around.bound(ROOT_STEPS)
        alive = torch.ones(sum(self.candidates), dtype=torch.bool)
        floored = torch.cat([torch.zeros(0, dtype=torch.bool), *(level.floor.isfinite() for level in self.levels)])
        targets = (~(bounds.values < 0)).nonzero()[:, 0].tolist()
        return [_Branch(target=target, alive=alive, floored=floored) for target in targets]

    def regions(self, branches: Sequence[_Branch]) -> list[Region]:
        """Return what is known of each level, B = number of branches."""
        alive = torch.split(torch.stack([branch.alive for branch in branches]), self.candidates, 1)
        floored = torch.split(torch.stack([branch.floored for branch in branches]), self.units, 1)
        return [
            Region.of(level, level.lower.expand(mask.shape), level.upper.expand(mask.shape), mask, floor)
            for level, mask, floor in zip(self.levels, alive, floored, strict=True)
        ]

    def check(self, branches: Sequence[_Branch], lines: Sequence[Lines]) -> Bounds:
        """Return the bounds of branches by lines of each level, B = number of branches."""
        targets = self.around.targets[[branch.target for branch in branches]]
        return bound_above(self.levels, self.pixels, targets, self.regions(branches), lines)

    def bound(self, branch: _Branch, seconds: float) -> _Bounded | None:
        """Bound a branch; None if it takes longer than this."""
        regions, target = self.regions([branch]), self.around.targets.matrix[branch.target]
        solution = self.program.solve(target, regions, seconds)
        if solution is None:
            return None
        bounds = self.check([branch], solution.lines)
        lower, upper = self.pixels
        pixels = bounds.pixels[0]
        corner = torch.where(pixels > 0, upper, torch.where(pixels < 0, lower, (lower + upper) / 2))
        count = branch.floored.long().index_add(0, self.unit, branch.alive.long())
        losses = torch.where(count > 1, solution.losses, -torch.inf)
        split = None
        if bool((count > 1).any()):
            unit = int(losses.argmax())
            values = torch.where(branch.alive & (self.unit == unit), solution.candidates, -torch.inf)
            split = unit, int(values.argmax())
        return _Bounded(
            branch=branch,
            value=float(bounds.values.nan_to_num(nan=torch.inf)),
            lines=solution.lines,
            images=torch.stack([solution.variables[: len(lower)], corner]),
            split=split,
        )

    def split(self, branch: _Branch, unit: int, candidate: int) -> list[_Branch]:
        """Return the branch in which a unit equals a candidate, and the one in which it does not."""
        of_unit = self.unit == unit
        this = torch.zeros_like(of_unit).index_fill(0, torch.tensor(candidate), True)
        floored = branch.floored.index_fill(0, torch.tensor(unit), False)
        return [
            replace(branch, alive=branch.alive & (~of_unit | this), floored=floored),
            replace(branch, alive=branch.alive & ~this),
        ]


class _Search:
    """The search for a proof of an image, or for an image that breaks it."""

    def __init__(self, model: nn.Module, x: Tensor, label: int, threat: Threat, deadline: float) -> None:
        self.model, self.x, self.label, self.threat, self.deadline = model, x, label, threat, deadline
        self.image: Tensor | None = None
        self.unstable = self.branches = 0

    def prove(self, execution: Execution) -> bool:
        """Return whether the image is proved for an execution; set `image` and return False if it is broken."""
        around = Reducer(execution).reduce(self.x, self.label, self.threat)
        if around is None:
            return False
        self.unstable = max(self.unstable, around.units)
        tree, order = _Tree(around), count()
        heap: list[tuple[float, int, _Bounded]] = []
        new = tree.root()
        while True:
            for branch in new:
                bounded = tree.bound(branch, self.deadline - time.monotonic())
                self.branches += 1
                if bounded is None or not self.resist(bounded.images):
                    return False
                if not bounded.value < 0:
                    heapq.heappush(heap, (-bounded.value, next(order), bounded))
            if not heap:
                return True
            worst = heapq.heappop(heap)[2]
            if worst.split is None or time.monotonic() > self.deadline:
                return False
            new = tree.split(worst.branch, *worst.split)

    def resist(self, pixels: Tensor) -> bool:
        """Return whether the model is right on images (B, pixels), moved into the threat, and after a few steps of PGD.

        If it is not, set `image`.
        """
        images = self.threat.project(pixels.float().view(-1, *self.x.shape), self.x[None])
        labels = torch.full((len(images),), self.label)
        for step in range(PGD_STEPS + 1):
            wrong = predictions(self.model, images) != self.label
            if bool(wrong.any()):
                self.image = images[wrong][0]
                return False
            _, grad = input_gradient(self.model, images, labels, margin)
            step_size = self.threat.eps * (1 - step / PGD_STEPS)
            images = self.threat.project(self.threat.ascent(images, grad, step_size), self.x[None])
        return True
