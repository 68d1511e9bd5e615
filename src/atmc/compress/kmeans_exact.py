"""One-dimensional k-means over {0, a_1 .. a_B} with the center 0 fixed: the global optimum.

Legend: x the tensor; q its quantization; N the number of distinct nonzero entries of x; B = levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from atmc.compress.sorted_values import (
    Float64s,
    Int64s,
    SortedValues,
    copy_unquantized,
    distinct_if_few,
    quantize_to_nearest,
    sorted_nonzeros,
)

Starts = NDArray[np.int32]


@dataclass(frozen=True)
class _DynamicProgram:
    """The optimal clusterings of the magnitudes on one side of 0; the smallest magnitudes may go to the zero cluster.

    Row j of the program: best[i] is the least objective of the first i magnitudes in j clusters, starts[i] the index at
    which the last of these clusters starts.

    Args:
        count, first, second: (n + 1,) prefix sums of weight, weight * magnitude and weight * magnitude^2 over the n
            distinct magnitudes in ascending order.
    """

    count: Float64s
    first: Float64s
    second: Float64s

    @staticmethod
    def of(magnitudes: Float64s, weights: Float64s) -> _DynamicProgram:
        """Compute the prefix sums."""
        powers = (weights, weights * magnitudes, weights * magnitudes**2)
        return _DynamicProgram(*(np.append(0.0, np.cumsum(power)) for power in powers))

    def solve(self, levels: int) -> tuple[list[float], list[Starts]]:
        """Return the least objective with 0, 1, .. clusters (at most `levels`), and the starts of rows 1, 2, .."""
        best, starts = self.second, np.zeros(len(self.count), dtype=np.int64)
        totals, rows = [float(best[-1])], []
        for clusters in range(1, min(levels, len(self.count) - 1) + 1):
            best, starts = self._next_row(best, starts, clusters)
            totals.append(float(best[-1]))
            rows.append(starts.astype(np.int32))
        return totals, rows

    def _next_row(self, before: Float64s, earlier: Int64s, clusters: int) -> tuple[Float64s, Int64s]:
        """Compute best and starts of a row from the row before, by divide and conquer, one depth at a time.

        The best start grows with i (the cost is concave Monge) and with the number of clusters; both bound the search.
        """
        size = len(self.count)
        best, starts = np.full(size, np.inf), np.arange(-1, size - 1)
        ends, step = np.array([clusters]), 1 << size.bit_length()
        while step:
            if len(ends):
                low = np.where(ends > clusters, starts[np.maximum(ends - step, clusters)], clusters - 1)
                high = np.where(ends + step < size, starts[np.minimum(ends + step, size - 1)], ends - 1)
                high = np.minimum(high, ends - 1)
                low = np.minimum(np.maximum(low, earlier[ends]), high)
                starts[ends], best[ends] = self._best_starts(before, ends, low, high)
            step //= 2
            ends = np.arange(clusters + step, size, 2 * step) if step else ends
        return best, starts

    def _best_starts(self, before: Float64s, ends: Int64s, low: Int64s, high: Int64s) -> tuple[Int64s, Float64s]:
        """Return for each end the start in low..high with the least before[start] + error(start..end), and this sum."""
        lengths = high - low + 1
        heads = np.cumsum(lengths) - lengths
        start = np.arange(int(lengths.sum())) + np.repeat(low - heads, lengths)
        total = np.repeat(self.first[ends], lengths) - self.first[start]
        score = (before - self.second)[start] - total**2 / (np.repeat(self.count[ends], lengths) - self.count[start])
        least = np.minimum.reduceat(score, heads)
        hits = np.flatnonzero(score == np.repeat(least, lengths))
        return start[hits[np.searchsorted(hits, heads)]], self.second[ends] + least

    def centers(self, rows: list[Starts]) -> Float64s:
        """Return the cluster means of the optimum with len(rows) clusters."""
        end, means = len(self.count) - 1, []
        for starts in reversed(rows):
            start = int(starts[end])
            means.append((self.first[end] - self.first[start]) / (self.count[end] - self.count[start]))
            end = start
        return np.array(means, dtype=np.float64)


def _optimum(nonzeros: SortedValues, levels: int) -> Float64s:
    """Return the centers of the optimum over both sides of 0, as float32 numbers, in order."""
    points, first = np.unique(nonzeros.values, return_index=True)
    zero = int(np.searchsorted(points, np.float32(0.0)))
    magnitudes = np.abs(points.astype(np.float64))
    masses = np.diff(nonzeros.mass[np.append(first, len(nonzeros.values))])
    below = _DynamicProgram.of(magnitudes[:zero][::-1], masses[:zero][::-1])
    above = _DynamicProgram.of(magnitudes[zero:], masses[zero:])
    (errors_below, rows_below), (errors_above, rows_above) = below.solve(levels), above.solve(levels)
    rest = [min(levels - j, len(rows_above)) for j in range(len(errors_below))]
    j = int(np.argmin([error + errors_above[k] for error, k in zip(errors_below, rest, strict=True)]))
    centers = np.concatenate([-below.centers(rows_below[:j]), above.centers(rows_above[: rest[j]])])
    return np.sort(centers.astype(np.float32)).astype(np.float64)


def exact_zero_kmeans(x: Tensor, levels: int, *, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Argmin over q of sum w (x - q)^2: q is 0 where x is, and has at most `levels` distinct nonzero values.

    Dynamic programming (Wang and Song 2011, Ckmeans.1d.dp; divide and conquer as in Gronlund et al. 2017). The center 0
    is fixed, so no cluster of an optimum contains both signs: there is one program for the negative entries, one for
    the positive entries, and the levels are divided between them in the best way. It takes O(levels * N log N) time and
    O(levels * N) memory. The result is exact up to float64 sums of squares (clusters narrower than 1e-7 of their
    magnitude look alike) and to centers rounded to float32.

    Arguments, results and errors are those of `zero_kmeans`.

    >>> import torch
    >>> exact_zero_kmeans(torch.tensor([0.0, 1.0, 2.0, -5.0]), 2)
    (tensor([ 0.0000,  1.5000,  1.5000, -5.0000]), tensor([-5.0000,  1.5000]))
    """
    positions, values, sorted_weights = sorted_nonzeros(x, levels, weights)
    distinct = distinct_if_few(values, levels)
    if distinct is not None:
        return copy_unquantized(x, distinct)
    nonzeros = SortedValues.of(values, sorted_weights)
    return quantize_to_nearest(x, positions, nonzeros, _optimum(nonzeros, levels))
