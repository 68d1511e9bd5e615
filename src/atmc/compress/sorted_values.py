"""Sort the nonzero entries of a tensor, and quantize a tensor to given centers: shared by `kmeans` and `kmeans_exact`.

All sums are taken in float64 from zero outward, so that small entries are not lost in the sum of large ones. The sort
runs on the tensor's device, the rest in NumPy: every device gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Float64s = NDArray[np.float64]
Float32s = NDArray[np.float32]
Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class SortedValues:
    """The nonzero values of a tensor in order, with prefix sums over them; every weight is 1 if none are given."""

    values: Float32s  # (N,)
    weights: Float64s  # (N,): the weight of each value's squared error
    mass: Float64s  # (N + 1,): mass[j] - mass[i] is the sum of weights[i:j]
    sums: Float64s  # (N + 1,): sums[j] - sums[i] is the sum of (weights * values)[i:j]
    zero: int  # the number of negative values

    @staticmethod
    def of(values: Float32s, weights: Float64s | None = None) -> SortedValues:
        """Compute the prefix sums of values that are sorted and not zero; weights (N,) are above 0."""
        zero = int(np.searchsorted(values, np.float32(0.0)))
        weights = np.ones(len(values)) if weights is None else weights
        weighted = weights * values
        below = np.cumsum(weighted[:zero][::-1], dtype=np.float64)[::-1]
        above = np.cumsum(weighted[zero:], dtype=np.float64)
        mass = np.append(0.0, np.cumsum(weights))
        return SortedValues(values, weights, mass, np.concatenate([-below, [0.0], above]), zero)

    def count_at_most(self, thresholds: Float64s) -> Int64s:
        """Count for each threshold the values that are at most as large."""
        counts: Int64s = np.searchsorted(self.values, _round_down(thresholds), side="right")
        return counts

    def means(self, low: Int64s, high: Int64s) -> Float64s:
        """Return the weighted mean of values[low:high] for each pair of bounds; 0 if there are no such values."""
        total = (self.sums[high] - self.sums[low]) / np.where(high > low, self.mass[high] - self.mass[low], 1.0)
        last = len(self.values) - 1
        inside = np.clip(total, self.values[np.minimum(low, last)], self.values[np.maximum(high - 1, 0)])
        return np.where(high > low, inside, 0.0)


def _round_down(numbers: Float64s) -> Float32s:
    """Return the largest float32 not above each number: float32 values compare with it exactly as with the number."""
    near = numbers.astype(np.float32)
    return np.where(near > numbers, np.nextafter(near, np.float32(-np.inf)), near)


def _with_zero(centers: Float64s) -> Float64s:
    return np.sort(np.append(centers, 0.0))


def midpoints(centers: Float64s) -> Float64s:
    """Return the borders between the regions of numbers that are nearest to each of {0} and centers."""
    points = _with_zero(centers)
    borders: Float64s = (points[1:] + points[:-1]) / 2
    return borders


def sorted_nonzeros(x: Tensor, levels: int, weights: Tensor | None = None) -> tuple[Tensor, Float32s, Float64s | None]:
    """Return the positions of the nonzeros in the flat tensor, and their values in order with their weights.

    Weights below 1e-9 of the largest are raised to that, since a cluster of no weight has no mean.

    Args:
        weights: of the entries of x, shaped like x, not negative.

    Raises:
        ValueError: levels < 1, another dtype than float32 and float64, nan or inf, weights of another shape or below 0.
    """
    if levels < 1:
        raise ValueError(f"expected levels >= 1, got {levels}")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected a float32 or float64 tensor, got {x.dtype}")
    flat = x.detach().flatten().float()
    positions = flat.nonzero()[:, 0]
    unsorted = flat[positions]
    sorted_weights: Float64s | None = None
    values: Float32s
    if weights is not None:
        if weights.shape != x.shape or not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ValueError(f"expected finite weights >= 0 of shape {tuple(x.shape)}")
        tensor, order = unsorted.sort(stable=True)
        values = tensor.cpu().numpy()
        sorted_weights = weights.detach().flatten()[positions][order].double().cpu().numpy()
        largest = sorted_weights.max(initial=0.0)
        sorted_weights = np.maximum(sorted_weights / largest, 1e-9) if largest > 0 else np.ones(len(values))
    else:
        values = unsorted.sort().values.cpu().numpy() if unsorted.is_cuda else np.sort(unsorted.cpu().numpy())
    if len(values) and not (np.isfinite(values[0]) and np.isfinite(values[-1])):  # a NaN sorts last
        raise ValueError("expected finite entries, got nan or inf")
    return positions, values, sorted_weights


def distinct_if_few(values: Float32s, levels: int) -> Float32s | None:
    """Return the distinct values if there are at most `levels` of them, else None."""
    first = np.append(True, values[1:] != values[:-1]) if len(values) else np.zeros(0, dtype=np.bool_)
    return values[first] if int(first.sum()) <= levels else None


def quantize_to_nearest(
    x: Tensor, positions: Tensor, nonzeros: SortedValues, centers: Float64s
) -> tuple[Tensor, Tensor]:
    """Move every nonzero of x to the nearest of {0} and centers; return the result and the centers that are in use."""
    sizes = np.diff(np.concatenate([[0], nonzeros.count_at_most(midpoints(centers)), [len(nonzeros.values)]]))
    used = _with_zero(centers)[sizes > 0]
    used = used[used != 0]
    borders = torch.from_numpy(_round_down(midpoints(used))).to(x.device)
    table = torch.from_numpy(_with_zero(used)).to(x.device, torch.float32)
    flat = x.detach().flatten().float()
    quantized = torch.zeros_like(flat)
    quantized[positions] = table[torch.bucketize(flat[positions], borders)]
    return quantized.view(x.shape).to(x.dtype), table[table != 0]


def copy_unquantized(x: Tensor, distinct: Float32s) -> tuple[Tensor, Tensor]:
    """Return a copy of x and its distinct nonzero values, for an x that needs no quantizing."""
    return x.detach().float().to(x.dtype, copy=True), torch.from_numpy(distinct.copy()).to(x.device)
