"""Lines for the bound of a branch from a linear program, which HiGHS solves.

The tightest bound that lines can give is the value of a linear program in the pixels and units, with the rows y >= x_i
and y <= line for the units y and their candidates x_i. Its dual values say which lines give that bound. A solver works
with tolerances, so that neither the value nor the verdict "infeasible" is a proof: the lines go to `bound_above`, which
makes a sound bound of whatever lines it gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import linprog
from torch import Tensor

from atmc.evaluation.verify.lines import Forms, Level, Lines, Pixels, Region
from atmc.evaluation.verify.matrices import Array, Indices, Matrix

Knots = tuple[Indices, Array]  # units and c of upper lines
PENALTY = 1e4  # if no point meets a branch's conditions: how far below 0 its bound is to be, in largest coefficients


class Program:
    """The linear programs of all branches around an image, in pixels, units and candidates."""

    def __init__(self, levels: Sequence[Level], pixels: Pixels) -> None:
        self.levels, self.pixels = levels, pixels
        self.variables = len(pixels[0]) + sum(level.units for level in levels)
        sizes = [len(level.unit) for level in levels]
        self.firsts = [self.variables + sum(sizes[:index]) for index in range(len(levels))]  # candidate of each level
        self.columns = self.variables + sum(sizes)
        forms, lower = [sparse.csr_array((0, self.columns))], []
        for level, first in zip(levels, self.firsts, strict=True):
            candidate = self._select(first + np.arange(len(level.unit)))
            forms.append(candidate - _widen(level.forms, self.columns))
            lower.append(candidate - self._select(level.first + level.unit.numpy()))
        self.lower = lower  # rows x_i - y <= 0
        self.forms = sparse.vstack(forms, format="csr")  # rows x_i - its form = 0
        self.offsets = np.concatenate([np.zeros(0), *(level.forms.offset.numpy() for level in levels)])

    def solve(self, target: Tensor, regions: Sequence[Region], seconds: float) -> tuple[Tensor, list[Lines]] | None:
        """Maximize target (v,) over a branch; None if the solver fails or takes longer than this.

        Args:
            regions: of each level, B = 1.

        Returns:
            the variables (v,) at which the maximum is attained, and the lines of each level, B = 1.
        """
        rows, limits, knots = [sparse.csr_array((0, self.columns))], [np.zeros(0)], []
        for level, region, first, lower in zip(self.levels, regions, self.firsts, self.lower, strict=True):
            unit, start = _list_lines(level, region)
            line, offset = self._build_lines(level, region, first, unit, start)
            rows += [lower, line]
            limits += [np.zeros(lower.shape[0]), offset]
            knots.append((unit, start))
        free = np.full(self.columns - self.variables, np.inf)
        lower = [self.pixels[0], *(region.bottom[0] for region in regions)]
        upper = [self.pixels[1], *(torch.maximum(region.top, region.bottom)[0] for region in regions)]
        ends = (np.append(torch.cat(end).numpy(), sign * free) for end, sign in ((lower, -1), (upper, 1)))
        cost = np.append(-target.numpy(), 0 * free.clip(0, 0))
        problem = {"bounds": np.stack(list(ends), 1), "A_eq": self.forms, "b_eq": self.offsets}
        matrix = sparse.vstack(rows, format="csr")
        limit = np.concatenate(limits)
        result, weight = _minimize(cost, problem | {"A_ub": matrix, "b_ub": limit}, seconds), 1.0
        if result.status == 2:  # infeasible: find the least by which all rows must be violated
            slack = sparse.csr_array(-np.ones((len(limit), 1)))
            problem = {
                "bounds": np.concatenate([problem["bounds"], [[0, np.inf]]]),
                "A_eq": sparse.hstack([self.forms, sparse.csr_array((len(self.offsets), 1))], format="csr"),
                "b_eq": self.offsets,
            }
            matrix = sparse.hstack([matrix, slack], format="csr")
            violation = np.append(np.zeros(self.columns), 1.0)
            result = _minimize(violation, problem | {"A_ub": matrix, "b_ub": limit}, seconds)
            weight = PENALTY * np.abs(cost).max() / max(result.fun or 0.0, 1e-9)
        if result.status != 0:
            return None
        weight /= max(float(target.abs().max()), 1e-300)  # in units of the target's largest coefficient
        lines = self._read_lines(result, weight, regions, knots, np.cumsum([len(one) for one in limits])[:-1])
        return torch.from_numpy(result.x[: self.variables]), lines

    def _read_lines(
        self, result: Any, weight: float, regions: Sequence[Region], knots: Sequence[Knots], cuts: Indices
    ) -> list[Lines]:
        """Return the lines of dual values times a weight; cuts: where the rows of each kind and level begin."""
        multipliers = np.split(weight * np.clip(-result.ineqlin.marginals, 0, None), cuts)[1:]
        ends = result.lower.marginals, -result.upper.marginals
        at_bottom, at_top = (weight * np.clip(values, 0, None) for values in ends)
        lines = []
        for index, (level, region) in enumerate(zip(self.levels, regions, strict=True)):
            part = slice(level.first, level.first + level.units)
            below, above = multipliers[2 * index : 2 * index + 2]
            lines.append(_to_lines(level, region, below, above, knots[index], at_bottom[part], at_top[part]))
        return lines

    def _build_lines(
        self, level: Level, region: Region, first: int, unit: Indices, start: Array
    ) -> tuple[Matrix, Array]:
        """Return rows and limits of y <= c + sum of s_i (x_i - l_i) for units and their c."""
        candidates = level.unit.numpy()
        of_unit = np.searchsorted(candidates, np.arange(level.units))
        counts = np.bincount(candidates, minlength=level.units)[unit]
        line = np.repeat(np.arange(len(unit)), counts)
        within = np.arange(len(line)) - np.repeat(np.cumsum(counts) - counts, counts)
        candidate = of_unit[unit][line] + within
        lower, upper, alive = (values[0].numpy() for values in (region.lower, region.upper, region.alive))
        width = np.maximum(upper - lower, 1e-300)[candidate]
        slope = np.where(alive[candidate], ((upper[candidate] - start[line]) / width).clip(0, 1), 0.0)
        shape = len(unit), self.columns
        slopes = sparse.coo_array((slope, (line, first + candidate)), shape=shape).tocsr()
        limits = start - np.bincount(line, slope * lower[candidate], len(unit))
        return self._select(level.first + unit) - slopes, limits

    def _select(self, columns: Indices) -> Matrix:
        """Return the matrix that selects columns."""
        rows, shape = np.arange(len(columns)), (len(columns), self.columns)
        return sparse.coo_array((np.ones(len(columns)), (rows, columns)), shape=shape).tocsr()


def _minimize(cost: Array, problem: Mapping[str, Any], seconds: float) -> Any:
    """Minimize by the simplex method, or if it fails by interior points."""
    options = {"time_limit": max(seconds, 0.01)}
    result = linprog(cost, **problem, method="highs-ds", options=options)
    return linprog(cost, **problem, method="highs-ipm", options=options) if result.status == 4 else result


def _widen(forms: Forms, count: int) -> Matrix:
    """Return the matrix of forms with a column for every variable."""
    dense = isinstance(forms.matrix, Tensor)
    matrix = sparse.csr_array(forms.matrix.numpy()) if dense else forms.matrix
    return sparse.csr_array((matrix.data, matrix.indices, matrix.indptr), shape=(matrix.shape[0], count))


def _list_lines(level: Level, region: Region) -> Knots:
    """Return the units and c of all upper lines that may be tight: c is the bottom, or the upper end of a candidate."""
    unit = level.unit.numpy()
    bottom, top, upper, alive = (
        values[0].numpy() for values in (region.bottom, region.top, region.upper, region.alive)
    )
    knots = (alive & (upper < top[unit]) & (upper > bottom[unit])).nonzero()[0]
    return np.concatenate([np.arange(level.units), unit[knots]]), np.concatenate([bottom, upper[knots]])


def _to_lines(
    level: Level,
    region: Region,
    below: Array,
    above: Array,
    knots: Knots,
    at_bottom: Array,
    at_top: Array,
) -> Lines:
    """Return the lines of dual values.

    The line of the mean c is at least as tight as the mean of lines, since it is convex in c.

    Args:
        below: (r,) of y >= x_i; above: (lines,) of y <= line; at_bottom, at_top: (u,) of bottom <= y <= top.
        knots: units and c of the upper lines.
    """
    unit, start = knots
    candidates = level.unit.numpy()
    bottom, top = region.bottom[0].numpy(), region.top[0].numpy()
    up = np.bincount(unit, above, level.units) + at_top
    down = np.bincount(candidates, below, level.units) + at_bottom
    mean = (np.bincount(unit, above * start, level.units) + at_top * top) / np.maximum(up, 1e-300)
    rise = np.where(up > 0, (mean - bottom) / np.maximum(top - bottom, 1e-300), 0.0).clip(0, 1)
    share = np.where(down[candidates] > 0, below / np.maximum(down[candidates], 1e-300), 0.0)
    tensors = {"rise": rise, "share": share, "both": np.minimum(up, down)}
    return Lines(**{name: torch.from_numpy(values)[None] for name, values in tensors.items()})
