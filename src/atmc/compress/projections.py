"""Projections onto the sets of small models: pure functions of tensors.

The two quantizers, `zero_kmeans` and `exact_zero_kmeans`, are defined in `kmeans` and `kmeans_exact`.

Legend: the *key* of a float is its bits without the sign bit, read as an integer. Keys order as magnitudes do (IEEE
754): equal keys are equal magnitudes, the key of 0 is 0, and the keys of infinities and NaN are the largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atmc.compress.kmeans import zero_kmeans
from atmc.compress.kmeans_exact import exact_zero_kmeans

__all__ = [
    "allocate_ranks",
    "exact_zero_kmeans",
    "keep_largest",
    "largest_masks",
    "zero_kmeans",
]

_INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
BLOCK_SIZE = 2**14  # entries at a time on a CPU: they stay in cache, and PyTorch starts no threads for so few
SAMPLE_SIZE = 2**18  # entries from which the threshold is first estimated


class _Keys:
    """The keys of a sequence of tensors, computed block by block and never all at once."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        dtype = tensors[0].dtype if tensors else torch.float32
        for tensor in tensors:
            dtype = torch.promote_types(dtype, tensor.dtype)
        if dtype not in _INTEGERS:
            raise ValueError(f"expected tensors of floating point numbers, got {dtype}")
        self.dtype = dtype
        self.unsigned = torch.iinfo(_INTEGERS[dtype]).max
        self.infinity = int(torch.tensor(math.inf, dtype=dtype).view(_INTEGERS[dtype]))
        self.flats = [tensor.detach().flatten().to(dtype).view(_INTEGERS[dtype]) for tensor in tensors]
        self.total = sum(len(flat) for flat in self.flats)

    def blocks(self, flat: Tensor) -> Iterator[Tensor]:
        """Yield the keys of one tensor in consecutive blocks; each block overwrites the one before."""
        size = min(len(flat), BLOCK_SIZE) if flat.device.type == "cpu" else len(flat)
        buffer = torch.empty(size, dtype=flat.dtype, device=flat.device)
        for block in torch.split(flat, max(size, 1)):
            yield torch.bitwise_and(block, self.unsigned, out=buffer[: len(block)])

    def sample(self, step: int) -> NDArray[Any]:
        """Return every step-th key, in descending order."""
        parts, offset = [], 0
        for flat in self.flats:
            parts.append((flat[offset::step] & self.unsigned).cpu().numpy())
            offset = (offset - len(flat)) % step
        return np.sort(np.concatenate(parts))[::-1]

    def gather(self, low: int, high: int) -> tuple[int, int, NDArray[Any]]:
        """Return the number of keys above high, the number in low..high, and the keys in low..high.

        If low = high the keys themselves are left out, since all are the same.

        Raises:
            ValueError: an entry is not finite.
        """
        above, inside, gathered = 0, 0, [np.zeros(0, dtype=f"i{self.dtype.itemsize}")]
        for index, flat in enumerate(self.flats):
            for block in self.blocks(flat) if len(flat) else ():
                largest = int(block.amax())
                if largest >= self.infinity:
                    raise ValueError(f"expected finite entries, got nan or inf in tensor {index}")
                if largest < low:
                    continue
                mask = block >= low
                if largest > high:
                    over = block > high
                    above += int(over.count_nonzero())
                    mask ^= over
                inside += int(mask.count_nonzero())
                if low < high:
                    gathered.append(block.masked_select(mask).cpu().numpy())
        return above, inside, np.concatenate(gathered)

    def search(self, k: int) -> tuple[int, int]:
        """Return the k-th largest key (1 if fewer than k are nonzero) and the number of keys at least as large.

        A sample brackets the key, one pass counts the keys above the bracket and gathers those inside; if the bracket
        misses the key, it widens until it holds everything.
        """
        if k == 0 or k > self.total:
            self.gather(self.infinity, self.infinity)  # raises if an entry is not finite
            return (1, 0) if k else (self.infinity, 0)
        step = self.total // SAMPLE_SIZE | 1  # odd, so that it does not walk down one column of a matrix
        sample, rank, slack = self.sample(step), k / step, 5.0 if step > 1 else 0.0
        while True:
            margin = slack * (math.sqrt(rank) + 1)
            last, first = math.ceil(rank + margin), math.floor(rank - margin)
            low = max(int(sample[last - 1]), 1) if last <= len(sample) else 1
            high = int(sample[first - 1]) if first >= 1 else self.infinity
            above, inside, band = self.gather(low, high)
            if above < k and (low == 1 or k <= above + inside):
                break
            slack = 8 * slack + 5
        if low == high or k > above + inside:
            return low, above + inside
        place = inside - (k - above)
        key = int(np.partition(band, place)[place])
        return key, above + int((band >= key).sum())

    def mask_at_least(self, flat: Tensor, key: int) -> Tensor:
        """Return a flat mask of the entries of one tensor whose keys are at least this one."""
        mask = torch.empty(len(flat), dtype=torch.bool, device=flat.device)
        start = 0
        for block in self.blocks(flat):
            torch.ge(block, key, out=mask[start : start + len(block)])
            start += len(block)
        return mask


@torch.no_grad()
def largest_masks(tensors: Sequence[Tensor], k: int) -> list[Tensor]:
    """Argmax over supports of at most k entries, all tensors together, of the sum of squares inside the support.

    The result is exact. Of equal magnitudes at the threshold the first stay, in the order of the tensors and then of
    the flat index, so that never more than k are marked; zeros are never marked.

    Args:
        tensors: any shapes, of one or several floating point types, finite.
        k: the number of entries to mark.

    Returns:
        bool masks shaped like the tensors, with min(k, number of nonzeros) entries True.

    Raises:
        ValueError: k < 0, nan or inf among the entries, or tensors that do not hold floating point numbers.

    >>> largest_masks([torch.tensor([1.0, -3.0]), torch.tensor([2.0, 2.0])], 2)
    [tensor([False,  True]), tensor([ True, False])]
    """
    if k < 0:
        raise ValueError(f"expected k >= 0, got {k}")
    keys = _Keys(tensors)
    key, marked = keys.search(k)
    masks = [keys.mask_at_least(flat, key) for flat in keys.flats]
    excess = marked - k
    for flat, mask in zip(reversed(keys.flats), reversed(masks), strict=True):
        if excess <= 0:
            break  # nearly always at once; otherwise the last ones of several equal magnitudes are dropped
        above = keys.mask_at_least(flat, key + 1)
        ties = mask ^ above
        count = int(ties.count_nonzero())
        if count <= excess:
            mask.copy_(above)
        else:
            mask[ties.nonzero()[count - excess :, 0]] = False
        excess -= min(count, excess)
    return [mask.view(tensor.shape) for mask, tensor in zip(masks, tensors, strict=True)]


@torch.no_grad()
def keep_largest(tensors: Sequence[Tensor], k: int) -> list[Tensor]:
    """Argmin over z of sum (x - z)^2 such that at most k entries of z, all tensors together, differ from 0.

    The k entries of largest magnitude stay as they are, the others become 0; ties, arguments and errors are those of
    `largest_masks`. The result shares no memory with the input.

    >>> keep_largest([torch.tensor([1.0, -3.0]), torch.tensor([2.0, 2.0])], 2)
    [tensor([ 0., -3.]), tensor([2., 0.])]
    """
    return [tensor.masked_fill(~mask, 0) for tensor, mask in zip(tensors, largest_masks(tensors, k), strict=True)]


def _check_layers(singular_values: Sequence[Tensor], costs: Sequence[int]) -> None:
    if len(singular_values) != len(costs):
        raise ValueError(f"expected one cost per layer, got {len(costs)} for {len(singular_values)} layers")
    if any(cost < 1 for cost in costs):
        raise ValueError(f"expected costs >= 1, got {list(costs)}")
    for layer, values in enumerate(singular_values):
        if values.dim() != 1 or len(values) == 0 or not bool(((values >= 0) & values.isfinite()).all()):
            raise ValueError(f"expected finite singular values >= 0, at least one, for layer {layer}")


def allocate_ranks(singular_values: Sequence[Tensor], costs: Sequence[int], budget: int) -> list[int]:
    """Near argmax over ranks r_l >= 1 with sum r_l costs_l <= budget of the sum of the kept squared singular values.

    Greedy, global over the layers: after one rank each, the largest singular values come first, as for the nonzeros of
    `keep_largest`. A value that no longer fits is skipped, and with it the rest of its layer, so that cheaper layers
    may use what remains of the budget: in the end no layer could have one rank more. Values of zero get no rank; of
    equal values the first layer's comes first.

    Args:
        singular_values: one (n,) tensor per layer, n >= 1, none negative, in any order.
        costs: cost of one rank of each layer, out + in * kh * kw numbers.
        budget: the largest total cost.

    Returns:
        One rank per layer.

    Raises:
        ValueError: the budget is below sum(costs), one rank per layer, or the arguments do not fit together.

    >>> allocate_ranks([torch.tensor([9.0, 5.0, 1.0]), torch.tensor([4.0, 3.0])], [10, 2], 24)
    [2, 2]
    """
    _check_layers(singular_values, costs)
    left = budget - sum(costs)
    if left < 0:
        raise ValueError(f"expected a budget of at least {sum(costs)} (one rank per layer), got {budget}")
    ranks = [1] * len(costs)
    rest = [(-s, layer) for layer, values in enumerate(singular_values) for s in sorted(values.tolist())[:-1] if s > 0]
    for _, layer in sorted(rest):
        if costs[layer] <= left:
            left -= costs[layer]
            ranks[layer] += 1
    return ranks
