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
TRIALS = 16  # splits of a branch, of which the best is taken
BATCH = 64  # branches that are bounded at once
NOTABLE = 1e-6  # excess of a unit that is no rounding of the solver
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
    simplest_first = reversed(executions)  # the first is PyTorch's, with the channels that the others leave out
    proved = search.resist(x.reshape(1, -1)) and all(search.prove(execution) for execution in simplest_first)
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
        halves: the two branches into which it is best split; none if nothing is open.
    """

    branch: _Branch
    value: float
    lines: list[Lines]
    images: Tensor
    halves: list[_Branch]


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

    def is_like(self, other: _Tree) -> bool:
        """Return whether a branch of one tree says the same of the other."""
        floors = [torch.cat([torch.zeros(0), *(one.floor for one in tree.levels)]) for tree in (self, other)]
        return (
            self.candidates == other.candidates
            and self.units == other.units
            and torch.equal(self.unit, other.unit)
            and torch.equal(floors[0].isfinite(), floors[1].isfinite())
        )

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
        target = self.around.targets.matrix[branch.target]
        solution = self.program.solve(target, self.regions([branch]), seconds)
        if solution is None:
            return None
        variables, lines = solution
        bounds = self.check([branch], lines)
        (lower, upper), slopes = self.pixels, bounds.pixels[0]
        corner = torch.where(slopes > 0, upper, torch.where(slopes < 0, lower, (lower + upper) / 2))
        value = float(bounds.values.nan_to_num(nan=torch.inf))
        return _Bounded(
            branch=branch,
            value=value,
            lines=lines,
            images=torch.stack([variables[: len(lower)], corner]),
            halves=self.split(branch, bounds, lines, variables) if value >= 0 else [],
        )

    def split(self, branch: _Branch, bounds: Bounds, lines: Sequence[Lines], variables: Tensor) -> list[_Branch]:
        """Return the halves of a branch: "a unit equals a candidate", "it does not"; none if there is nothing to split.

        The unit is the one whose value in the linear program exceeds its candidates' by most, times the multiplier of
        its upper line. If no value exceeds them, units are tried at which the bound loses most on the program's image.
        (The losses of all units add up to the distance of the bound from that image's margin.) The trial is taken whose
        halves have the lowest bounds by the lines of the whole (Bunel et al. 2020, section 5). The candidate is the
        largest.

        Args:
            variables: (v,) of the solution of the linear program.
        """
        count = branch.floored.long().index_add(0, self.unit, branch.alive.long())
        trials = (count > 1).nonzero()[:, 0]
        if not len(trials):
            return []
        excess, losses, values, attained = [], [], [], []
        image = variables[None, : len(self.pixels[0])]
        for level, relaxation in zip(self.levels, bounds.relaxations, strict=True):
            candidates = level.forms.run(variables[None, : level.first])
            units = torch.maximum(level.largest(candidates), level.floor)[0]
            excess.append(relaxation.up[0] * (variables[level.first : level.first + level.units] - units))
            values.append(candidates[0])
            candidates = level.forms.run(image)
            of_image = torch.maximum(level.largest(candidates), level.floor)
            losses.append(relaxation.gaps(level, candidates, of_image)[0])
            attained.append(candidates[0])
            image = torch.cat([image, of_image], 1)
        worst = torch.cat(excess)[trials].argmax()
        if float(torch.cat(excess)[trials[worst]]) > NOTABLE:
            return self.halve(branch, int(trials[worst]), torch.cat(values))
        trials = trials[torch.cat(losses)[trials].argsort(descending=True, stable=True)[:TRIALS]]
        halves = [half for unit in trials.tolist() for half in self.halve(branch, unit, torch.cat(attained))]
        whole = float(bounds.values)
        gains = (whole - self.check(halves, self.adapt(lines, halves)).values.view(-1, 2)).clamp(1e-6, whole + 1e-3)
        best = int(gains.prod(1).argmax())
        return halves[2 * best : 2 * best + 2]

    def halve(self, branch: _Branch, unit: int, values: Tensor) -> list[_Branch]:
        """Return the branch in which a unit equals its largest candidate, by values (r,), and the one in which not."""
        of_unit = self.unit == unit
        candidate = torch.where(of_unit & branch.alive, values, -torch.inf).argmax()
        this = torch.arange(len(of_unit)) == candidate
        floored = branch.floored.index_fill(0, torch.tensor(unit), False)
        return [
            replace(branch, alive=branch.alive & (~of_unit | this), floored=floored),
            replace(branch, alive=branch.alive & ~this),
        ]

    def adapt(self, lines: Sequence[Lines], branches: Sequence[_Branch]) -> list[Lines]:
        """Return lines for each branch: those for all, except for units that are decided."""
        result = []
        for level, region, one in zip(self.levels, self.regions(branches), lines, strict=True):
            decided = level.add(region.alive.double()) + region.floored.double() == 1
            rise = torch.where(decided, 0.0, one.rise)
            rows = len(branches)
            result.append(Lines(rise=rise, share=one.share.expand(rows, -1), both=one.both.expand(rows, -1)))
        return result


class _Search:
    """The search for a proof of an image, or for an image that breaks it."""

    def __init__(self, model: nn.Module, x: Tensor, label: int, threat: Threat, deadline: float) -> None:
        self.model, self.x, self.label, self.threat, self.deadline = model, x, label, threat, deadline
        self.image: Tensor | None = None
        self.unstable = self.branches = 0
        self.proof: tuple[_Tree, list[_Bounded]] | None = None  # of the execution before

    def prove(self, execution: Execution) -> bool:
        """Return whether the image is proved for an execution; set `image` and return False if it is broken."""
        around = Reducer(execution).reduce(self.x, self.label, self.threat)
        if around is None:
            return False
        self.unstable = max(self.unstable, around.units)
        tree, order = _Tree(around), count()
        leaves, new = self.begin(tree)
        heap: list[tuple[float, int, _Bounded]] = []
        while True:
            for branch in new:
                bounded = tree.bound(branch, self.deadline - time.monotonic())
                self.branches += 1
                if bounded is None or not self.resist(bounded.images):
                    return False
                if bounded.value < 0:
                    leaves.append(bounded)
                else:
                    heapq.heappush(heap, (-bounded.value, next(order), bounded))
            if not heap:
                self.proof = tree, leaves
                return True
            new = heapq.heappop(heap)[2].halves
            if not new or time.monotonic() > self.deadline:
                return False

    def begin(self, tree: _Tree) -> tuple[list[_Bounded], list[_Branch]]:
        """Return branches of a tree that together are all images: those that are proved, and the others.

        The executions of a model are almost the same. So if the trees are alike, the branches that proved the one
        before are taken, with the lines that they had there.
        """
        roots, leaves = tree.root(), []
        if self.proof is None or not tree.is_like(self.proof[0]):
            return [], roots
        targets = {root.target for root in roots}
        earlier = [leaf for leaf in self.proof[1] if leaf.branch.target in targets]
        covered = {leaf.branch.target for leaf in earlier}
        new = [root for root in roots if root.target not in covered]
        for start in range(0, len(earlier), BATCH):
            part = earlier[start : start + BATCH]
            lines = [Lines.join(ones) for ones in zip(*(leaf.lines for leaf in part), strict=True)]
            values = tree.check([leaf.branch for leaf in part], lines).values.tolist()
            for leaf, value in zip(part, values, strict=True):
                if value < 0:
                    leaves.append(leaf)
                else:
                    new.append(leaf.branch)
        return leaves, new

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
