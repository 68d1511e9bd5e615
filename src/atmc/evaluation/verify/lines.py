"""Backward linear bounds (CROWN, Zhang et al. 2018), with optimized lines (alpha-CROWN, Xu et al. 2021), in float64.

A margin z_j - z_y is affine in the pixels and the open maxima around an image (`units.py`). From the last level of
maxima to the first, each maximum is replaced by an affine function of its candidates that bounds it, from above or from
below as its coefficient's sign demands; and the candidates are affine in pixels and earlier maxima. What remains is
affine in the pixels, and its largest value over their box is an upper bound of the margin. Every choice of such
functions, and of the multipliers >= 0 that stand for a branch's conditions (beta-CROWN, Wang et al. 2021), gives a
bound. So gradient descent on the bound may choose them. docs/verification.md derives the functions and the error terms,
which make the bounds hold for what float32 computes.

Legend: B bounds that are calculated at once; u maxima ("units") of a level, r of its candidates; v variables before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from atmc.evaluation.verify.matrices import Matrix
from atmc.evaluation.verify.units import DELTA, Rows

DENSE = 0.03  # share of nonzeros from which on a dense product is faster than a sparse one
OVER = 1 + 2.0**-20  # factor on an error that covers the rounding of its own calculation
Pixels = tuple[Tensor, Tensor]  # lower and upper bounds (pixels,)


@dataclass(frozen=True, eq=False, kw_only=True)
class Forms:
    """Affine forms of values in the variables: |value - (matrix @ variables + offset)| <= error.

    Args:
        matrix: (rows, v), a dense tensor or a sparse matrix of scipy.
        offset, error, terms: (rows,), see `Rows`.
    """

    matrix: Any
    offset: Tensor
    error: Tensor
    terms: Tensor

    @classmethod
    def of(cls, rows: Rows, variables: int, *, dense: bool = False) -> Self:
        """Return forms in the first variables, on which alone the rows depend."""
        matrix = rows.matrix[:, :variables]
        if dense or matrix.nnz > DENSE * matrix.shape[0] * variables:
            matrix = torch.from_numpy(matrix.toarray())
        offset, error, terms = (torch.from_numpy(values) for values in (rows.offset, rows.error, rows.terms))
        return cls(matrix=matrix, offset=offset, error=error, terms=terms)

    def __getitem__(self, rows: Any) -> Self:
        return type(self)(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def negate(self) -> Self:
        """Return the forms of the values with the other sign."""
        return replace(self, matrix=-self.matrix, offset=-self.offset)

    def run(self, variables: Tensor) -> Tensor:
        """Return the values (B, rows) at variables (B, v), without the error."""
        if isinstance(self.matrix, Tensor):
            return variables @ self.matrix.T + self.offset
        return torch.from_numpy((self.matrix @ variables.numpy().T).T) + self.offset

    def multiply(self, coefficients: Tensor) -> Tensor:
        """Return coefficients (B, rows) times the matrix, (B, v)."""
        if isinstance(self.matrix, Tensor):
            return coefficients @ self.matrix
        product: Tensor = _SparseProduct.apply(coefficients, self.matrix)  # type: ignore[no-untyped-call]
        return product


class _SparseProduct(torch.autograd.Function):
    """Product of a dense tensor (B, rows) and a constant sparse matrix (rows, v)."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, matrix: Matrix) -> Tensor:
        ctx.matrix = matrix
        return torch.from_numpy(np.ascontiguousarray((matrix.T @ coefficients.detach().numpy().T).T))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.from_numpy(np.ascontiguousarray((ctx.matrix @ grad.numpy().T).T)), None


@dataclass(frozen=True, eq=False, kw_only=True)
class Level:
    """Maxima y = max(floor, candidates) that depend on none of each other, but on pixels and earlier maxima.

    Args:
        first: variable of the first unit.
        forms: of the candidates (r,), without the floor.
        unit: (r,) the unit of each candidate, in ascending order.
        lower, upper: (1, r) bounds of the candidates.
        floor: (u,) the constant candidate, 0 of a ReLU; -infinity if there is none.
    """

    first: int
    forms: Forms
    unit: Tensor
    lower: Tensor
    upper: Tensor
    floor: Tensor

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.floor)

    @property
    def is_single(self) -> bool:
        """Whether every unit has one candidate besides the floor, as ReLUs do."""
        return len(self.unit) == self.units

    def spread(self, values: Tensor) -> Tensor:
        """Return for each candidate (B, r) the value of its unit (B, u)."""
        return values if self.is_single else values[:, self.unit]

    def add(self, values: Tensor) -> Tensor:
        """Return for each unit (B, u) the sum over its candidates (B, r)."""
        if self.is_single:
            return values
        return values.new_zeros(len(values), self.units).index_add(1, self.unit, values)

    def largest(self, values: Tensor) -> Tensor:
        """Return for each unit (B, u) the largest value of its candidates (B, r)."""
        if self.is_single:
            return values
        start, index = values.new_full((len(values), self.units), -torch.inf), self.unit.expand_as(values)
        return start.scatter_reduce(1, index, values, "amax")

    def region(self) -> Region:
        """Return what is known of the level without a branch."""
        alive, floored = torch.ones_like(self.lower, dtype=torch.bool), self.floor.isfinite()[None]
        return Region.of(self, self.lower, self.upper, alive, floored)


@dataclass(frozen=True, eq=False, kw_only=True)
class Region:
    """What is known of the units of a level in each of B branches.

    Args:
        lower, upper: (B, r) bounds of the candidates.
        alive: (B, r) bool, whether the unit may equal the candidate.
        floored: (B, u) bool, whether the unit may equal its floor.
        bottom, top: (B, u) bounds of the units.
    """

    lower: Tensor
    upper: Tensor
    alive: Tensor
    floored: Tensor
    bottom: Tensor
    top: Tensor

    @classmethod
    def of(cls, level: Level, lower: Tensor, upper: Tensor, alive: Tensor, floored: Tensor) -> Region:
        """Derive the bounds of the units, and raise the lower bound of a candidate that is the unit for sure."""
        bottom = torch.maximum(level.largest(lower), level.floor)
        only = alive & level.spread((level.add(alive.double()) == 1) & ~floored)
        lower = torch.where(only, torch.maximum(lower, level.spread(bottom)), lower)
        top = level.largest(torch.where(alive, upper, -torch.inf))
        top = torch.maximum(top, torch.where(floored, level.floor, -torch.inf))
        return cls(lower=lower, upper=upper, alive=alive, floored=floored, bottom=bottom, top=top)

    def __getitem__(self, branches: Any) -> Region:
        return Region(**{field.name: getattr(self, field.name)[branches] for field in fields(self)})


@dataclass(frozen=True, eq=False, kw_only=True)
class Lines:
    """Which affine functions bound the units of a level: B choices, or one for all. Any choice is sound.

    Args:
        rise: (B, u) in [0, 1]: for c = bottom + rise (top - bottom) and for the candidates x_i in [l_i, u_i],
            y <= c + sum of s_i (x_i - l_i), s_i = max(u_i - c, 0) / (u_i - l_i).
        share: (B, r) >= 0, of sum at most 1 per unit: y >= sum of share_i x_i + (1 - sum of share_i) bottom.
        both: (B, u) >= 0, multiplier of the difference of these two bounds of y, in units of the target's largest
            coefficient.
    """

    rise: Tensor
    share: Tensor
    both: Tensor

    @classmethod
    def crown(cls, level: Level, region: Region) -> Lines:
        """Return the lines of CROWN: for a ReLU y >= x if upper > -lower, else y >= 0."""
        middle = torch.where(region.alive, (region.lower + region.upper) / 2, -torch.inf)
        best = middle >= level.spread(torch.maximum(level.largest(middle), region.bottom))
        share = best.double() / level.spread(level.add(best.double()).clamp(min=1))
        return cls(rise=torch.zeros_like(region.bottom), share=share, both=torch.zeros_like(region.bottom))

    @classmethod
    def flat(cls, level: Level, region: Region) -> Lines:
        """Return the constants bottom and top, as interval bounds do."""
        zero, share = torch.zeros_like(region.bottom), torch.zeros_like(region.lower)
        return cls(rise=torch.ones_like(zero), share=share, both=zero)

    @classmethod
    def mixed(cls, level: Level, region: Region) -> Lines:
        """Return the lines of CROWN for a level of ReLUs, and constants for other maxima.

        The candidates of a max pooling often move apart from each other, and lines are loose then.
        """
        return (cls.crown if level.is_single else cls.flat)(level, region)

    @classmethod
    def blend(cls, level: Level, region: Region) -> Lines:
        """Return a start for an optimization between `flat`, at whose lines the bound has kinks, and `mixed`."""
        flat, mixed = cls.flat(level, region), cls.mixed(level, region)
        rise, share = (0.8 * one + 0.2 * two for one, two in zip(flat.free[:2], mixed.free[:2], strict=True))
        return cls(rise=rise, share=share, both=flat.both)

    def map(self, function: Callable[[Tensor], Tensor]) -> Lines:
        """Return the result of a function on each tensor."""
        return Lines(**{field.name: function(getattr(self, field.name)) for field in fields(self)})

    @staticmethod
    def join(parts: Sequence[Lines]) -> Lines:
        """Return the choices of all parts, one part after the other."""
        return Lines(**{field.name: torch.cat([getattr(one, field.name) for one in parts]) for field in fields(Lines)})

    def merge(self, chosen: Tensor, other: Lines) -> Lines:
        """Return these lines for the bounds that are chosen, (B,) bool, and the other lines for the rest."""
        pairs = {field.name: (getattr(self, field.name), getattr(other, field.name)) for field in fields(self)}
        return Lines(**{name: torch.where(chosen[:, None], one, two) for name, (one, two) in pairs.items()})

    @property
    def free(self) -> list[Tensor]:
        """What an optimization may change."""
        return [self.rise, self.share, self.both]

    @torch.no_grad()
    def project_(self) -> None:
        """Move every choice in place to one that is allowed."""
        self.rise.clamp_(0, 1)
        self.share.clamp_(0, 1)
        self.both.clamp_(min=0)


@dataclass(frozen=True, eq=False, kw_only=True)
class Bounds:
    """Upper bounds (B,), with what they were made of.

    Args:
        values: (B,); NaN if nothing is known.
        pixels: (B, pixels) the coefficients that remained.
        relaxations: of each level; none for bounds that were merged.
    """

    values: Tensor
    pixels: Tensor
    relaxations: tuple[Relaxation, ...] = ()

    def __getitem__(self, rows: Tensor) -> Bounds:
        return Bounds(values=self.values[rows], pixels=self.pixels[rows])

    def merge(self, chosen: Tensor, other: Bounds) -> Bounds:
        """Return these bounds if they are chosen, (B,) bool, and the others for the rest."""
        return Bounds(
            values=torch.where(chosen, self.values, other.values),
            pixels=torch.where(chosen[:, None], self.pixels, other.pixels),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Relaxation:
    """Affine bounds of the units y of a level in their candidates x_i, with the multipliers that they get.

    Args:
        up, down: (B, u) >= 0, of which the difference is the coefficient of y: of the upper and of the lower bound.
        slope, height: (B, r), (B, u): y <= sum of slope_i x_i + height.
        share, base: (B, r), (B, u): y >= sum of share_i x_i + base.
    """

    up: Tensor
    down: Tensor
    slope: Tensor
    height: Tensor
    share: Tensor
    base: Tensor

    @classmethod
    def of(cls, level: Level, region: Region, line: Lines, c: Tensor, scale: Tensor) -> Relaxation:
        """Return the bounds that `line` says for coefficients c (B, u); scale: (B, 1), the unit of `Lines.both`."""
        both = line.both * scale
        start = region.bottom + line.rise * (region.top - region.bottom).clamp(min=0)
        lower, upper = region.lower, region.upper
        slope = (upper - level.spread(start)).clamp(min=0) / (upper - lower).clamp(min=1e-300)
        slope = torch.where(region.alive, slope.clamp(max=1), 0.0)
        slack = 4 * DELTA * level.add(torch.maximum(lower.abs(), upper.abs()))
        total = level.add(line.share)
        return cls(
            up=c.clamp(min=0) + both,
            down=both - c.clamp(max=0),
            slope=slope,
            height=start - level.add(slope * lower) + slack,
            share=line.share / level.spread(total.clamp(min=1)),
            base=(1 - total).clamp(min=0) * region.bottom,
        )

    def gaps(self, level: Level, candidates: Tensor, units: Tensor) -> Tensor:
        """Return how much the bounds lose at each unit (B, u), for values of the candidates (B, r) and units (B, u)."""
        above = level.add(self.slope * candidates) + self.height - units
        below = units - level.add(self.share * candidates) - self.base
        return self.up * above + self.down * below


def bound_above(
    levels: Sequence[Level], pixels: Pixels, targets: Forms, regions: Sequence[Region], lines: Sequence[Lines]
) -> Bounds:
    """Return upper bounds of targets over all images of a box that lie in a branch.

    Args:
        targets: (B,) values whose upper bounds are wanted; their matrix is dense.
        regions, lines: of each level.
    """
    rest, constant, error, terms = targets.matrix, targets.offset, targets.error, targets.terms
    scale = rest.abs().amax(1, keepdim=True)
    relaxations = []
    for level, region, line in zip(reversed(levels), reversed(regions), reversed(lines), strict=True):
        c, rest = rest[:, level.first :], rest[:, : level.first]
        relaxed = Relaxation.of(level, region, line, c, scale)
        relaxations.append(relaxed)
        above, below = level.spread(relaxed.up) * relaxed.slope, level.spread(relaxed.down) * relaxed.share
        rest = rest + level.forms.multiply(above - below)
        constant = constant + (above - below) @ level.forms.offset
        constant = constant + (relaxed.up * relaxed.height - relaxed.down * relaxed.base).sum(1)
        error = error + (above + below) @ level.forms.error
        extent = level.add(torch.maximum(region.lower.abs(), region.upper.abs()))
        extent = extent + relaxed.height.abs() + region.bottom.abs() + region.top.abs()
        terms = terms + (above + below) @ level.forms.terms + ((relaxed.up + relaxed.down) * extent).sum(1)
    largest = rest.clamp(min=0) @ pixels[1] + rest.clamp(max=0) @ pixels[0]
    values = largest + constant + (error + DELTA * terms) * OVER
    return Bounds(values=values, pixels=rest, relaxations=tuple(reversed(relaxations)))


def optimize(
    levels: Sequence[Level],
    pixels: Pixels,
    targets: Forms,
    regions: Sequence[Region],
    lines: Sequence[Lines],
    *,
    steps: int,
    step_size: float = 0.2,
) -> tuple[Bounds, list[Lines]]:
    """Lower the bounds of `bound_above` by Adam on the lines; return the best bound of each target and its lines.

    It ends early if all bounds are below 0. The bounds are never above those of the lines where it starts.

    Args:
        lines: where it starts.
        step_size: of a share, at the first step; it falls linearly to a tenth.
    """
    count = len(targets.offset)
    best_lines = [one.map(lambda values: values.expand(count, *values.shape[1:])) for one in lines]
    with torch.no_grad():
        best = bound_above(levels, pixels, targets, regions, best_lines)
    if not levels or not steps:
        return best, best_lines
    current = [one.map(torch.clone) for one in best_lines]
    adam = torch.optim.Adam([tensor.requires_grad_() for one in current for tensor in one.free], lr=step_size)
    for step in range(steps):
        if bool((best.values < 0).all()):
            break
        bounds = bound_above(levels, pixels, targets, regions, current)
        adam.zero_grad()
        bounds.values.sum().backward()  # type: ignore[no-untyped-call]
        adam.param_groups[0]["lr"] = step_size * (1 - 0.9 * step / steps)
        with torch.no_grad():
            best, best_lines = keep_better(best, best_lines, bounds, current)
            adam.step()
            for one in current:
                one.project_()
    with torch.no_grad():
        return keep_better(best, best_lines, bound_above(levels, pixels, targets, regions, current), current)


def keep_better(
    best: Bounds, best_lines: Sequence[Lines], bounds: Bounds, lines: Sequence[Lines]
) -> tuple[Bounds, list[Lines]]:
    """Return the lower bound of each target, and its lines."""
    better = bounds.values < best.values
    merged = [one.merge(better, other) for one, other in zip(lines, best_lines, strict=True)]
    return bounds.merge(better, best), merged
