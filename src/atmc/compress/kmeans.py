"""One-dimensional k-means over {0, a_1 .. a_B} with the center 0 held fixed: Lloyd's algorithm, helped over bad optima.

The exact optimum is in `kmeans_exact`.

Legend: x the tensor, q its quantization, N nonzero entries of x, B = levels = the most nonzero values q may hold.
Every cluster is an interval of the sorted values, and none but the zero cluster spans 0. One sort, O(N log N); then an
iteration tries a fixed number of edges and looks up O(B) borders, O(B log N), however large N is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from atmc.compress.sorted_values import (
    Floats,
    Integers,
    Line,
    distinct_if_few,
    midpoints,
    move_to_nearest,
    sorted_nonzeros,
    unchanged,
)

_GRID = 4096  # quantiles from which the start estimates the density
_PLACES = 8192  # how many cuts are tried at a time, over all intervals
_ROUNDING = 2.0**-46  # what a change must gain at least, in parts of the sum of squares: rounding to float32 costs less


def _start(line: Line, levels: int) -> Floats:
    """Centers at equal steps of the integral of density^(1/3), asymptotically optimal (Panter and Dite 1951).

    The density comes from order statistics: a cell of mass m and width w weighs m^(1/3) w^(2/3). They are spaced
    evenly, and geometrically towards both ends, where heavy tails would hide inside one cell. The gap at 0 is free.
    """
    last = len(line.values) - 1
    tail = np.geomspace(1, last, min(last, _GRID // 8))
    ranks = np.concatenate([np.linspace(0, last, min(last, _GRID) + 1), tail, last - tail]).round().astype(np.int64)
    ranks = np.unique(np.append(ranks, [r for r in (line.zero - 1, line.zero) if 0 <= r <= last]))
    points = line.values[ranks].astype(np.float64)
    weights = np.cbrt(np.diff(ranks) * np.diff(points) ** 2)
    weights[(points[:-1] < 0) & (points[1:] > 0)] = 0.0
    steps = np.append(0.0, np.cumsum(weights))
    return _tidy(np.interp((np.arange(levels) + 0.5) / levels * steps[-1], steps, points))


@dataclass(frozen=True)
class _Partition:
    """Clusters as intervals values[edges[i]:edges[i + 1]].

    The zero cluster is the two intervals that meet at edges[middle] = line.zero: a negative and a positive half, either
    of which may be empty. Both have center 0; every other interval is free and has its mean.
    """

    edges: Integers
    middle: int

    @staticmethod
    def nearest(line: Line, centers: Floats) -> _Partition:
        """Each value with the nearest of {0} and centers; a tie goes to the lower one. Empty clusters vanish."""
        borders = line.count(midpoints(centers))
        negatives = int((centers < 0).sum())
        below = np.unique(np.append(0, borders[:negatives]))
        above = np.unique(np.append(borders[negatives:], len(line.values)))
        return _Partition(np.concatenate([below, [line.zero], above]), len(below))

    def free(self) -> NDArray[np.bool_]:
        which = np.ones(len(self.edges) - 1, dtype=np.bool_)
        which[self.middle - 1 : self.middle + 1] = False
        return which

    def means(self, line: Line) -> Floats:
        return np.where(self.free(), line.mean(self.edges[:-1], self.edges[1:]), 0.0)

    def centers(self, line: Line) -> Floats:
        """The free intervals' means, as float32 numbers."""
        return self.means(line)[self.free()].astype(np.float32).astype(np.float64)


def _best_cuts(
    line: Line, low: Integers, high: Integers, free: tuple[NDArray[np.bool_], NDArray[np.bool_]], now: Integers
) -> tuple[Integers, Floats]:
    """For each interval low..high the best place to cut it, and what that gains over leaving it whole.

    `free` says which sides of the cut get their mean as center; the others have center 0. The places tried are `now`,
    which wins ties, and a grid: every place in a short interval.
    """
    steps = max(_PLACES // len(low), 32)
    grid = low[:, None] + (high - low)[:, None] * np.arange(steps + 1) // steps
    places = np.concatenate([now[:, None], grid], axis=1)
    before, after = places - low[:, None], high[:, None] - places
    at = line.sums[places]
    left = np.where(free[0][:, None], (at - line.sums[low][:, None]) / np.maximum(before, 1), 0.0)
    right = np.where(free[1][:, None], (line.sums[high][:, None] - at) / np.maximum(after, 1), 0.0)
    pooled = before * after / np.maximum(before + after, 1)
    weights = np.where((free[0] & free[1])[:, None], pooled, np.where(free[0][:, None], before, after))
    gains = weights * (left - right) ** 2
    gains[:, 1:] -= _ROUNDING * (before * left**2 + after * right**2)[:, 1:]
    best = gains.argmax(axis=1)
    rows = np.arange(len(low))
    return places[rows, best], gains[rows, best]


def _sweep(line: Line, parts: _Partition, parity: int) -> _Partition:
    """Every second edge moved to the best place between its neighbours: Lloyd moves it to a locally best one only."""
    inner = np.arange(1, len(parts.edges) - 1)
    inner = inner[(inner % 2 == parity) & (inner != parts.middle)]
    if not len(inner):
        return parts
    free, edges = parts.free(), parts.edges.copy()
    sides = (free[inner - 1], free[inner])
    edges[inner], _ = _best_cuts(line, edges[inner - 1], edges[inner + 1], sides, edges[inner])
    return _Partition(edges, parts.middle)


def _splits(line: Line, parts: _Partition) -> tuple[Integers, Floats]:
    """For each interval the best place to cut it, and what the objective falls by.

    Of half the zero cluster the part next to 0 keeps center 0.
    """
    left_free, right_free = parts.free(), parts.free()
    left_free[parts.middle - 1] = right_free[parts.middle] = True
    whole = np.where(left_free, parts.edges[:-1], parts.edges[1:])  # a cut that gains nothing
    return _best_cuts(line, parts.edges[:-1], parts.edges[1:], (left_free, right_free), whole)


def _merge_costs(line: Line, parts: _Partition) -> Floats:
    """What the objective rises by when the intervals on both sides of each inner edge become one (Ward 1963)."""
    free, means = parts.free(), parts.means(line)
    sizes = np.diff(parts.edges).astype(np.float64)
    left, right = sizes[:-1], sizes[1:]
    pooled = left * right / np.maximum(left + right, 1)
    costs = np.where(free[:-1] & free[1:], pooled, np.where(free[:-1], left, right)) * np.diff(means) ** 2
    costs += _ROUNDING * (left * means[:-1] ** 2 + right * means[1:] ** 2)
    costs[parts.middle - 1] = np.inf  # the edge at 0 stays
    return costs


def _choose(gains: Floats, costs: Floats, unused: int) -> tuple[list[int], list[int]]:
    """Which intervals to cut, which edges to merge over (edge p lies between intervals p and p + 1).

    The cuts that gain most come first; levels not in use pay for them, then merges that cost less than the cut gains.
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


def _swap(line: Line, parts: _Partition, levels: int) -> _Partition:
    """Centers moved to where they serve best: intervals cut in two, paid for by merging others. Never a worse one."""
    places, gains = _splits(line, parts)
    cut, merged = _choose(gains, _merge_costs(line, parts), levels - (len(parts.edges) - 3))
    keep = np.ones(len(parts.edges), dtype=np.bool_)
    keep[[p + 1 for p in merged]] = False
    m = parts.middle
    below = np.append(parts.edges[:m][keep[:m]], places[[i for i in cut if i < m]])
    above = np.append(parts.edges[m + 1 :][keep[m + 1 :]], places[[i for i in cut if i >= m]])
    return _Partition(np.concatenate([np.sort(below), [line.zero], np.sort(above)]), len(below))


def _step(line: Line, centers: Floats, levels: int) -> Floats:
    """One iteration: every value to its nearest center, edges to better places, centers to better use, then means.

    The first and the last are Lloyd's; none of the four raises the objective.
    """
    parts = _Partition.nearest(line, centers)
    for parity in (0, 1):
        parts = _sweep(line, parts, parity)
    return _swap(line, parts, levels).centers(line)


def _lloyd(line: Line, centers: Floats, levels: int, iterations: int) -> Floats:
    for _ in range(iterations):
        before, centers = centers, _step(line, centers, levels)
        if np.array_equal(before, centers):
            break
    return centers


def _tidy(centers: NDArray[Any]) -> Floats:
    """Centers in order, once each, without 0, rounded to float32."""
    found: Floats = np.unique(centers.astype(np.float32)).astype(np.float64)
    kept: Floats = found[found != 0]
    return kept


def _given(centers: Tensor, levels: int) -> Floats:
    """The centers a user starts from, in order and without zeros."""
    found = _tidy(centers.detach().flatten().cpu().numpy())
    if len(found) > levels or not np.isfinite(found).all():
        raise ValueError(f"expected at most {levels} nonzero centers, all finite, got {found.tolist()}")
    return found


def zero_kmeans(
    x: Tensor, levels: int, *, centers: Tensor | None = None, iterations: int = 100
) -> tuple[Tensor, Tensor]:
    """Near argmin over q of sum (x - q)^2: q is 0 where x is, and has at most `levels` distinct nonzero values.

    Lloyd's algorithm in one dimension (ZeroKmeans of Gui et al. 2019; Lloyd 1982) with a center fixed at 0 and steps
    out of bad local optima, see `_step`. From one iteration to the next the objective never rises. No randomness.

    Args:
        x: any shape, float32 (float64 is rounded to float32 first), finite.
        levels: at least 1.
        centers: where to start, at most `levels` numbers besides 0; the result is never worse than moving every entry
            to the nearest of them and 0. None starts from the density of x.
        iterations: at most so many; fewer once nothing changes any more.

    Returns:
        (q like x, the nonzero values of q in ascending order, float32). An x with at most `levels` distinct nonzero
        values comes back bit for bit.

    Raises:
        ValueError: levels < 1, iterations < 0, another dtype, too many centers, nan or inf.

    >>> import torch
    >>> zero_kmeans(torch.tensor([0.0, 1.0, 2.0, -5.0]), 2)
    (tensor([ 0.0000,  1.5000,  1.5000, -5.0000]), tensor([-5.0000,  1.5000]))
    """
    if iterations < 0:
        raise ValueError(f"expected iterations >= 0, got {iterations}")
    positions, values = sorted_nonzeros(x, levels)
    start = None if centers is None else _given(centers, levels)
    distinct = distinct_if_few(values, levels)
    if distinct is not None:
        return unchanged(x, distinct)
    line = Line.of(values)
    found = _lloyd(line, _start(line, levels) if start is None else start, levels, iterations)
    return move_to_nearest(x, positions, line, found)
