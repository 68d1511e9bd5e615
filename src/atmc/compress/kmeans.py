"""One-dimensional k-means over {0, a_1 .. a_B} with the center 0 fixed: Lloyd's algorithm, improved.

The exact optimum is in `kmeans_exact`.

Legend: x the tensor; q its quantization; N the number of nonzero entries of x; B = levels, the largest number of
distinct nonzero values of q. Every cluster is an interval of the sorted values, and only the zero cluster contains 0.
The sort takes O(N log N); then an iteration tries a fixed number of edges and looks up O(B) borders, O(B log N).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from atmc.compress.sorted_values import (
    Float64s,
    Int64s,
    SortedValues,
    copy_unquantized,
    distinct_if_few,
    midpoints,
    quantize_to_nearest,
    sorted_nonzeros,
)

_GRID_SIZE = 4096  # quantiles from which the density is estimated
_MAX_CUTS = 8192  # cuts that one call tries, over all intervals
_ROUNDING_ERROR = 2.0**-46  # least gain of a change, in parts of the sum of squares: rounding to float32 costs less


def _initial_centers(nonzeros: SortedValues, levels: int) -> Float64s:
    """Place centers at equal steps of the integral of density^(1/3), asymptotically optimal (Panter and Dite 1951).

    The density comes from order statistics: a cell of mass m and width w weighs m^(1/3) w^(2/3). The cells are spaced
    evenly in rank, and geometrically towards both ends, since one cell could contain a whole heavy tail. The gap
    between the largest negative and the smallest positive value weighs nothing.
    """
    last = len(nonzeros.values) - 1
    tail = np.geomspace(1, last, min(last, _GRID_SIZE // 8))
    ranks = (
        np.concatenate([np.linspace(0, last, min(last, _GRID_SIZE) + 1), tail, last - tail]).round().astype(np.int64)
    )
    ranks = np.unique(np.append(ranks, [r for r in (nonzeros.zero - 1, nonzeros.zero) if 0 <= r <= last]))
    points = nonzeros.values[ranks].astype(np.float64)
    weights = np.cbrt(np.diff(ranks) * np.diff(points) ** 2)
    weights[(points[:-1] < 0) & (points[1:] > 0)] = 0.0
    steps = np.append(0.0, np.cumsum(weights))
    return _distinct_centers(np.interp((np.arange(levels) + 0.5) / levels * steps[-1], steps, points))


@dataclass(frozen=True)
class _Partition:
    """Clusters as intervals values[edges[i]:edges[i + 1]].

    The zero cluster is the two intervals that meet at edges[middle] = nonzeros.zero, its negative and its positive
    half; either may be empty. Both have center 0; every other interval is free: its center is its mean.
    """

    edges: Int64s
    middle: int

    @staticmethod
    def nearest(nonzeros: SortedValues, centers: Float64s) -> _Partition:
        """Assign each value to the nearest of {0} and centers, a tie to the lower one; drop empty clusters."""
        borders = nonzeros.count_at_most(midpoints(centers))
        negatives = int((centers < 0).sum())
        below = np.unique(np.append(0, borders[:negatives]))
        above = np.unique(np.append(borders[negatives:], len(nonzeros.values)))
        return _Partition(np.concatenate([below, [nonzeros.zero], above]), len(below))

    def free(self) -> NDArray[np.bool_]:
        """Mark the intervals outside the zero cluster."""
        free = np.ones(len(self.edges) - 1, dtype=np.bool_)
        free[self.middle - 1 : self.middle + 1] = False
        return free

    def means(self, nonzeros: SortedValues) -> Float64s:
        """Return the center of every interval."""
        return np.where(self.free(), nonzeros.means(self.edges[:-1], self.edges[1:]), 0.0)

    def centers(self, nonzeros: SortedValues) -> Float64s:
        """Return the means of the free intervals, as float32 numbers."""
        return self.means(nonzeros)[self.free()].astype(np.float32).astype(np.float64)


def _best_cuts(
    nonzeros: SortedValues, low: Int64s, high: Int64s, free: tuple[NDArray[np.bool_], NDArray[np.bool_]], now: Int64s
) -> tuple[Int64s, Float64s]:
    """Return for each interval low..high the best place to cut it, and the gain over leaving it whole.

    `free` tells for each side of the cut whether its center is its mean; otherwise it is 0. The places tried are `now`,
    which wins ties, and a grid: every place in a short interval.
    """
    steps = max(_MAX_CUTS // len(low), 32)
    grid = low[:, None] + (high - low)[:, None] * np.arange(steps + 1) // steps
    places = np.concatenate([now[:, None], grid], axis=1)
    mass, sums = nonzeros.mass[places], nonzeros.sums[places]
    before, after = mass - nonzeros.mass[low][:, None], nonzeros.mass[high][:, None] - mass
    left = np.where(free[0][:, None], (sums - nonzeros.sums[low][:, None]) / _or_one(before), 0.0)
    right = np.where(free[1][:, None], (nonzeros.sums[high][:, None] - sums) / _or_one(after), 0.0)
    pooled = before * after / _or_one(before + after)
    weights = np.where((free[0] & free[1])[:, None], pooled, np.where(free[0][:, None], before, after))
    gains = weights * (left - right) ** 2
    gains[:, 1:] -= _ROUNDING_ERROR * (before * left**2 + after * right**2)[:, 1:]
    best = gains.argmax(axis=1)
    rows = np.arange(len(low))
    return places[rows, best], gains[rows, best]


def _or_one(mass: Float64s) -> Float64s:
    """Replace masses of 0, over which nothing is to be divided, by 1."""
    return np.where(mass > 0, mass, 1.0)


def _move_edges(nonzeros: SortedValues, parts: _Partition, parity: int) -> _Partition:
    """Move every second edge to the best place between its neighbors; Lloyd's step moves it to a local optimum."""
    inner = np.arange(1, len(parts.edges) - 1)
    inner = inner[(inner % 2 == parity) & (inner != parts.middle)]
    if not len(inner):
        return parts
    free, edges = parts.free(), parts.edges.copy()
    sides = (free[inner - 1], free[inner])
    edges[inner], _ = _best_cuts(nonzeros, edges[inner - 1], edges[inner + 1], sides, edges[inner])
    return _Partition(edges, parts.middle)


def _best_splits(nonzeros: SortedValues, parts: _Partition) -> tuple[Int64s, Float64s]:
    """Return for each interval the best place to cut it, and the decrease of the objective.

    If a half of the zero cluster is cut, its part next to 0 keeps center 0.
    """
    left_free, right_free = parts.free(), parts.free()
    left_free[parts.middle - 1] = right_free[parts.middle] = True
    whole = np.where(left_free, parts.edges[:-1], parts.edges[1:])  # a cut that gains nothing
    return _best_cuts(nonzeros, parts.edges[:-1], parts.edges[1:], (left_free, right_free), whole)


def _merge_costs(nonzeros: SortedValues, parts: _Partition) -> Float64s:
    """Return the increase of the objective if the intervals on both sides of each inner edge are merged (Ward 1963)."""
    free, means = parts.free(), parts.means(nonzeros)
    masses = np.diff(nonzeros.mass[parts.edges])
    left, right = masses[:-1], masses[1:]
    pooled = left * right / _or_one(left + right)
    costs = np.where(free[:-1] & free[1:], pooled, np.where(free[:-1], left, right)) * np.diff(means) ** 2
    costs += _ROUNDING_ERROR * (left * means[:-1] ** 2 + right * means[1:] ** 2)
    costs[parts.middle - 1] = np.inf  # the edge at 0 stays
    return costs


def _choose_swaps(gains: Float64s, costs: Float64s, unused: int) -> tuple[list[int], list[int]]:
    """Choose the intervals to cut, and the edges to remove (edge p lies between intervals p and p + 1).

    The cuts that gain most come first. Each takes an unused level, or else a merge that costs less than the cut gains.
    No interval takes part twice, hence the changes add up.
    """
    merges = np.argsort(costs, kind="stable").tolist()
    taken: set[int] = set()
    cut, merged = [], []
    for i in np.argsort(-gains, kind="stable").tolist():
        if gains[i] <= 0 or (not unused and (not merges or gains[i] <= costs[merges[0]])):
            break
        if i in taken:
            continue
        if unused:
            unused -= 1
        else:
            pair = next((p for p in merges if not {p, p + 1} & (taken | {i})), None)
            if pair is None or costs[pair] >= gains[i]:
                continue
            merges.remove(pair)
            merged.append(pair)
            taken |= {pair, pair + 1}
        taken.add(i)
        cut.append(i)
    return cut, merged


def _swap_centers(nonzeros: SortedValues, parts: _Partition, levels: int) -> _Partition:
    """Cut intervals in two, and merge others to keep the number of levels, if that lowers the objective."""
    places, gains = _best_splits(nonzeros, parts)
    cut, merged = _choose_swaps(gains, _merge_costs(nonzeros, parts), levels - (len(parts.edges) - 3))
    keep = np.ones(len(parts.edges), dtype=np.bool_)
    keep[[p + 1 for p in merged]] = False
    m = parts.middle
    below = np.append(parts.edges[:m][keep[:m]], places[[i for i in cut if i < m]])
    above = np.append(parts.edges[m + 1 :][keep[m + 1 :]], places[[i for i in cut if i >= m]])
    return _Partition(np.concatenate([np.sort(below), [nonzeros.zero], np.sort(above)]), len(below))


def _iterate(nonzeros: SortedValues, centers: Float64s, levels: int) -> Float64s:
    """Return the centers after one iteration, which assigns values to centers, moves edges, swaps centers, takes means.

    The first and the last are Lloyd's steps; none of the four raises the objective.
    """
    parts = _Partition.nearest(nonzeros, centers)
    for parity in (0, 1):
        parts = _move_edges(nonzeros, parts, parity)
    return _swap_centers(nonzeros, parts, levels).centers(nonzeros)


def _lloyd(nonzeros: SortedValues, centers: Float64s, levels: int, iterations: int) -> Float64s:
    """Return the centers after a number of iterations, or fewer if nothing changes any more."""
    for _ in range(iterations):
        before, centers = centers, _iterate(nonzeros, centers, levels)
        if np.array_equal(before, centers):
            break
    return centers


def _distinct_centers(centers: NDArray[Any]) -> Float64s:
    """Return the distinct centers other than 0 in order, rounded to float32."""
    distinct: Float64s = np.unique(centers.astype(np.float32)).astype(np.float64)
    nonzero: Float64s = distinct[distinct != 0]
    return nonzero


def _check_centers(centers: Tensor, levels: int) -> Float64s:
    """Return the centers that a user gave, in order and without zeros; raise ValueError for too many, nan or inf."""
    distinct = _distinct_centers(centers.detach().flatten().cpu().numpy())
    if len(distinct) > levels or not np.isfinite(distinct).all():
        raise ValueError(f"expected at most {levels} nonzero centers, all finite, got {distinct.tolist()}")
    return distinct


def zero_kmeans(
    x: Tensor, levels: int, *, centers: Tensor | None = None, iterations: int = 100, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Near argmin over q of sum w (x - q)^2: q is 0 where x is, and has at most `levels` distinct nonzero values.

    Lloyd's algorithm in one dimension (ZeroKmeans of Gui et al. 2019; Lloyd 1982) with a center fixed at 0 and steps
    out of bad local optima, see `_iterate`. No iteration raises the objective. There is no randomness.

    Args:
        x: any shape, float32 (float64 is rounded to float32 first), finite.
        levels: at least 1.
        centers: where to start, at most `levels` numbers besides 0; the result is never worse than moving every entry
            to the nearest of them and 0. None starts from the density of x.
        iterations: the largest number of iterations; it ends earlier when nothing changes any more.
        weights: w, shaped like x and not negative; 1 by default.

    Returns:
        q like x, and the nonzero values of q in ascending order, float32. An x with at most `levels` distinct nonzero
        values comes back bit for bit.

    Raises:
        ValueError: levels < 1, iterations < 0, another dtype, too many centers, nan or inf, or weights of another shape
            or below 0.

    >>> import torch
    >>> zero_kmeans(torch.tensor([0.0, 1.0, 2.0, -5.0]), 2)
    (tensor([ 0.0000,  1.5000,  1.5000, -5.0000]), tensor([-5.0000,  1.5000]))
    """
    if iterations < 0:
        raise ValueError(f"expected iterations >= 0, got {iterations}")
    positions, values, sorted_weights = sorted_nonzeros(x, levels, weights)
    start = None if centers is None else _check_centers(centers, levels)
    distinct = distinct_if_few(values, levels)
    if distinct is not None:
        return copy_unquantized(x, distinct)
    nonzeros = SortedValues.of(values, sorted_weights)
    optimum = _lloyd(nonzeros, _initial_centers(nonzeros, levels) if start is None else start, levels, iterations)
    return quantize_to_nearest(x, positions, nonzeros, optimum)
