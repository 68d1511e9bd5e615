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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor, nn

from atmc.evaluation.accuracy import predictions
from atmc.evaluation.verify.executions import Execution
from atmc.evaluation.verify.linear import Neighborhood, Reducer
from atmc.evaluation.verify.lines import Bounds, Lines, Region, bound_above, optimize
from atmc.robust.threats import Threat

WIDTH = 16  # branches that are split at once
STEPS = 15  # of the optimization of a branch's lines
TRIALS = 8  # splits of a branch of which the best is taken
ROOT_STEPS = 60


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
    search.try_images(x[None])
    proved = search.image is None and all(search.prove(execution) for execution in executions)
    verdict = "certified" if proved else "undecided" if search.image is None else "broken"
    return Outcome(
        verdict=verdict,
        image=search.image,
        unstable=search.unstable,
        branches=search.branches,
        seconds=time.monotonic() - began,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Branches:
    """B branches; in units and candidates of all levels, one level after the other.

    Args:
        target: (B,) the margin that is bounded.
        values: (B,) its bound.
        alive: (B, r) bool, whether the unit may equal the candidate.
        floored: (B, u) bool, whether the unit may equal its floor.
        rise, share, both: (B, u), (B, r), (B, u) of `Lines`, float32 to save memory.
    """

    target: Tensor
    values: Tensor
    alive: Tensor
    floored: Tensor
    rise: Tensor
    share: Tensor
    both: Tensor

    def __getitem__(self, rows: Tensor) -> _Branches:
        return _Branches(**{name: values[rows] for name, values in vars(self).items()})

    def __len__(self) -> int:
        return len(self.target)


class _Tree:
    """The branches of one execution around an image."""

    def __init__(self, around: Neighborhood) -> None:
        self.around = around
        self.levels = around.levels
        self.candidates = [len(level.unit) for level in around.levels]
        self.units = [level.units for level in around.levels]
        first = [sum(self.units[:index]) for index in range(len(self.units))]
        self.unit = torch.cat([level.unit + at for level, at in zip(self.levels, first, strict=True)])
        self.floor = torch.cat([level.floor for level in self.levels])

    def root(self) -> tuple[_Branches, Bounds]:
        """Return one branch for each margin that the root's bound leaves open, and the bounds of all margins."""
        bounds, lines = self.around.bound(ROOT_STEPS)
        target = (~(bounds.values < 0)).nonzero()[:, 0]
        regions = [level.region() for level in self.levels]
        alive, floored = (torch.cat([getattr(one, name) for one in regions], 1) for name in ("alive", "floored"))
        branches = self.pack(
            target, bounds.values[target], alive, floored, [one.map(lambda v: v[target]) for one in lines]
        )
        return branches, bounds

    def pack(self, target: Tensor, values: Tensor, alive: Tensor, floored: Tensor, lines: Sequence[Lines]) -> _Branches:
        """Return branches with these lines."""
        rise, share, both = (
            torch.cat([getattr(one, name) for one in lines], 1).float() for name in ("rise", "share", "both")
        )
        return _Branches(
            target=target,
            values=values,
            alive=alive.expand(len(target), -1),
            floored=floored.expand(len(target), -1),
            rise=rise,
            share=share,
            both=both,
        )

    def regions(self, branches: _Branches) -> list[Region]:
        """Return what is known of each level."""
        masks = zip(
            self.levels,
            torch.split(branches.alive, self.candidates, 1),
            torch.split(branches.floored, self.units, 1),
            strict=True,
        )
        return [
            Region.of(level, level.lower.expand(alive.shape), level.upper.expand(alive.shape), alive, floored)
            for level, alive, floored in masks
        ]

    def lines(self, branches: _Branches) -> list[Lines]:
        """Return the lines of each level."""
        parts = (
            torch.split(branches.rise.double(), self.units, 1),
            torch.split(branches.share.double(), self.candidates, 1),
            torch.split(branches.both.double(), self.units, 1),
        )
        return [Lines(rise=rise, share=share, both=both) for rise, share, both in zip(*parts, strict=True)]

    def bound(self, branches: _Branches, steps: int) -> tuple[_Branches, Bounds]:
        """Optimize the lines of branches; return the branches with better bounds, and these bounds."""
        targets, regions = self.around.targets[branches.target], self.regions(branches)
        bounds, lines = optimize(self.levels, self.around.pixels, targets, regions, self.lines(branches), steps=steps)
        values = torch.fmin(bounds.values, branches.values)
        return self.pack(branches.target, values, branches.alive, branches.floored, lines), bounds

    def attain(self, bounds: Bounds) -> Tensor:
        """Return the pixels (B, pixels) at which the linear bounds are largest."""
        lower, upper = self.around.pixels
        return torch.where(bounds.pixels > 0, upper, torch.where(bounds.pixels < 0, lower, (lower + upper) / 2))

    @torch.no_grad()
    def split(self, branches: _Branches) -> tuple[_Branches, Bounds, Tensor]:
        """Split branches in two, each by the best of a few trials.

        The trials are the maxima at which the bounds lose most, at the image at which the linear bound is largest. Each
        is split into "it equals its largest candidate there" and "it does not".

        Returns:
            the halves, their bounds, and (b,) bool, which branches had nothing to split.
        """
        bounds = bound_above(
            self.levels,
            self.around.pixels,
            self.around.targets[branches.target],
            self.regions(branches),
            self.lines(branches),
        )
        variables, losses, values = self.attain(bounds), [], []
        for level, relaxation in zip(self.levels, bounds.relaxations, strict=True):
            candidates = level.forms.run(variables)
            units = torch.maximum(level.largest(candidates), level.floor)
            losses.append(relaxation.gaps(level, candidates, units))
            values.append(candidates)
            variables = torch.cat([variables, units], 1)
        choices = self.count(branches)
        loss = torch.where(choices > 1, torch.cat(losses, 1), -torch.inf)
        trial = loss.topk(min(TRIALS, loss.shape[1]), 1)
        parent, at = trial.values.isfinite().nonzero().T
        unit = trial.indices[parent, at]
        value = torch.where(branches.alive, torch.cat(values, 1), -torch.inf)[parent]
        candidate = torch.where(self.unit == unit[:, None], value, -torch.inf).argmax(1)
        halves = self.halve(branches[parent], unit, candidate)
        new, bounds = self.bound(halves, 0)
        one, two = new.values.view(2, -1)
        score = torch.maximum(one, two) + 0.1 * torch.minimum(one, two)
        best = torch.full((len(branches),), torch.inf, dtype=torch.float64).scatter_reduce(0, parent, score, "amin")
        first = torch.full((len(branches),), len(parent)).scatter_reduce(
            0, parent[score == best[parent]], (score == best[parent]).nonzero()[:, 0], "amin"
        )
        stuck = first == len(parent)
        chosen = torch.cat([first[~stuck], first[~stuck] + len(parent)])
        return new[chosen], bounds[chosen], stuck

    def count(self, branches: _Branches) -> Tensor:
        """Return for each unit (B, u) how many candidates, the floor among them, it may equal."""
        return branches.floored.long().index_add(1, self.unit, branches.alive.long())

    def halve(self, branches: _Branches, unit: Tensor, candidate: Tensor) -> _Branches:
        """Return the branches in which a unit equals a candidate, then those in which it does not.

        Args:
            unit, candidate: (B,) which, among all levels.
        """
        rows = torch.arange(len(branches))
        is_candidate = torch.zeros_like(branches.alive).index_put((rows, candidate), torch.tensor(True))
        is_unit = torch.zeros_like(branches.floored).index_put((rows, unit), torch.tensor(True))
        others = is_unit[:, self.unit]
        equal = replace(branches, alive=branches.alive & (~others | is_candidate), floored=branches.floored & ~is_unit)
        other = replace(branches, alive=branches.alive & ~is_candidate)
        halves = _Branches(**{name: torch.cat([values, getattr(other, name)]) for name, values in vars(equal).items()})
        decided = (self.count(halves) == 1) & is_unit.repeat(2, 1)
        of_decided = decided[:, self.unit]
        return replace(
            halves,
            rise=torch.where(decided, 0.0, halves.rise),
            share=torch.where(of_decided, halves.alive.float(), halves.share),
        )


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
        tree = _Tree(around)
        branches, bounds = tree.root()
        self.branches += len(around.limits)
        self.try_images(self.shape(tree.attain(bounds)))
        heap: list[tuple[float, int, _Branches]] = []
        order, width = count(), WIDTH
        self.push(heap, branches, order)
        while heap and self.image is None:
            began = time.monotonic()
            if began > self.deadline:
                return False
            parents = _join([heapq.heappop(heap)[2] for _ in range(min(width, len(heap)))])
            halves, bounds, stuck = tree.split(parents)
            if bool(stuck.any()):
                return False
            self.branches += len(halves)
            is_open = ~(halves.values < 0)
            if not bool(is_open.any()):
                continue
            halves, bounds = tree.bound(halves[is_open], STEPS)
            self.try_images(self.shape(tree.attain(bounds)))
            self.push(heap, halves[~(halves.values < 0)], order)
            width = max(1, min(4 * WIDTH, int(width * (2 if time.monotonic() - began < 0.25 else 0.5))))
        return self.image is None

    def push(self, heap: list[tuple[float, int, _Branches]], branches: _Branches, order: Iterator[int]) -> None:
        """Add branches to the heap, of which the first has the largest bound."""
        for row, value in enumerate(branches.values.nan_to_num(nan=torch.inf).tolist()):
            heapq.heappush(heap, (-value, next(order), branches[torch.tensor([row])]))

    def shape(self, pixels: Tensor) -> Tensor:
        """Return images (B, c, h, w) of the threat for pixels (B, pixels)."""
        return self.threat.project(pixels.float().view(-1, *self.x.shape), self.x[None])

    def try_images(self, images: Tensor) -> None:
        """Set `image` to one that the model gets wrong, if there is one."""
        wrong = predictions(self.model, images) != self.label
        if bool(wrong.any()):
            self.image = images[wrong][0]


def _join(branches: Sequence[_Branches]) -> _Branches:
    return _Branches(**{name: torch.cat([getattr(one, name) for one in branches]) for name in vars(branches[0])})
