"""A tensor's nonzero entries as a sorted line, and back: what the quantizers of `kmeans` and `kmeans_exact` share.

All sums are taken in float64 from zero outward, so that small entries do not drown in the sum of the large ones. The
sort runs on the tensor's device, what follows in NumPy: every device gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Line:
    """The nonzero values in order: (N,) values, (N + 1,) sums with sums[j] - sums[i] = sum of values[i:j]."""

    values: Singles
    sums: Floats
    zero: int  # how many values are negative

    @staticmethod
    def of(values: Singles) -> Line:
        zero = int(np.searchsorted(values, np.float32(0.0)))
        below = np.cumsum(values[:zero][::-1], dtype=np.float64)[::-1]
        above = np.cumsum(values[zero:], dtype=np.float64)
        return Line(values, np.concatenate([-below, [0.0], above]), zero)

    def count(self, thresholds: Floats) -> Integers:
        """How many values are at most each threshold."""
        found: Integers = np.searchsorted(self.values, _round_down(thresholds), side="right")
        return found

    def mean(self, low: Integers, high: Integers) -> Floats:
        """Means of values[low:high]; 0 where that is empty."""
        total = (self.sums[high] - self.sums[low]) / np.maximum(high - low, 1)
        last = len(self.values) - 1
        inside = np.clip(total, self.values[np.minimum(low, last)], self.values[np.maximum(high - 1, 0)])
        return np.where(high > low, inside, 0.0)


def _round_down(numbers: Floats) -> Singles:
    """The largest float32 not above each number: float32 values compare with it exactly as with the number."""
    near = numbers.astype(np.float32)
    return np.where(near > numbers, np.nextafter(near, np.float32(-np.inf)), near)


def _with_zero(centers: Floats) -> Floats:
    return np.sort(np.append(centers, 0.0))


def midpoints(centers: Floats) -> Floats:
    """The borders between the regions of numbers nearest to each of {0} and centers."""
    points = _with_zero(centers)
    between: Floats = (points[1:] + points[:-1]) / 2
    return between


def sorted_nonzeros(x: Tensor, levels: int) -> tuple[Tensor, Singles]:
    """(positions of the nonzeros in the flat tensor, their values in order); checks what the user gave."""
    if levels < 1:
        raise ValueError(f"expected levels >= 1, got {levels}")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected a float32 or float64 tensor, got {x.dtype}")
    flat = x.detach().flatten().float()
    positions = flat.nonzero()[:, 0]
    found = flat[positions]
    values: Singles = found.sort().values.cpu().numpy() if found.is_cuda else np.sort(found.cpu().numpy())
    if len(values) and not (np.isfinite(values[0]) and np.isfinite(values[-1])):  # a NaN sorts last
        raise ValueError("expected finite entries, got nan or inf")
    return positions, values


def distinct_if_few(values: Singles, levels: int) -> Singles | None:
    """The distinct values if they are at most `levels`, else None."""
    first = np.append(True, values[1:] != values[:-1]) if len(values) else np.zeros(0, dtype=np.bool_)
    return values[first] if int(first.sum()) <= levels else None


def move_to_nearest(x: Tensor, positions: Tensor, line: Line, centers: Floats) -> tuple[Tensor, Tensor]:
    """(every nonzero moved to the nearest of {0} and centers, the centers that are in use)."""
    sizes = np.diff(np.concatenate([[0], line.count(midpoints(centers)), [len(line.values)]]))
    used = _with_zero(centers)[sizes > 0]
    used = used[used != 0]
    borders = torch.from_numpy(_round_down(midpoints(used))).to(x.device)
    table = torch.from_numpy(_with_zero(used)).to(x.device, torch.float32)
    flat = x.detach().flatten().float()
    quantized = torch.zeros_like(flat)
    quantized[positions] = table[torch.bucketize(flat[positions], borders)]
    return quantized.view(x.shape).to(x.dtype), table[table != 0]


def unchanged(x: Tensor, distinct: Singles) -> tuple[Tensor, Tensor]:
    """(a copy of x, its distinct nonzero values), for an x that needs no quantizing."""
    return x.detach().float().to(x.dtype, copy=True), torch.from_numpy(distinct.copy()).to(x.device)
