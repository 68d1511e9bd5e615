"""Hold a budget in bytes: choose the number of nonzeros, and the bits of each tensor, so that the file fits.

Legend: N the number of conv and linear weights of the dense model; k the number of nonzeros; Q prune to k, then
quantize.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from atmc.compress.budget import Bits
from atmc.compress.constraints import NO_METRIC, Codebook, Constraint, InOrder, NonzeroBudget
from atmc.compress.metric import Metric
from atmc.compress.projections import zero_kmeans

EXACT_BELOW = 20_000  # nonzeros up to which a tensor's final codebook is the exact optimum
FILLED = 0.985  # a search ends if the file takes this part of the budget or more
BITS_PER_NONZERO = 12.0  # about what a nonzero takes in the file, position and code
ROUNDING = 8.0  # weight of a squared error of rounding; pruning, which other weights make up for, has 1 (results/rate)
BITS_PER_CENTER = 10  # about what a value of a codebook takes in the file
DEFAULT_BITS = 4  # until bits are chosen, and of a tensor without nonzeros
MARGINAL = 0.02  # quantile of the nonzeros' magnitudes that is taken as the magnitude of the marginal nonzero


class BudgetTooSmall(ValueError):
    """The budget is below the smallest file of the model; the message names that size."""


@dataclass(frozen=True)
class Allocation:
    """What a budget allows at one time: k, and the bits of each tensor (one number for all; None: no codebook)."""

    nonzeros: int
    bits: Bits = None

    def step_constraint(self, nonzeros: int) -> Constraint:
        """Return what the tensors satisfy after a training step: at most `nonzeros`, and in every layer at least one.

        A method may pass more than k, to shrink the model gradually.
        """
        return NonzeroBudget(nonzeros, keep_alive=True)

    def constraint(self) -> Constraint:
        """Return Q: prune to k, keeping a nonzero in every layer, then quantize."""
        prune = self.step_constraint(self.nonzeros)
        return prune if self.bits is None else InOrder((prune, Codebook(self.bits, exact_below=EXACT_BELOW)))


@dataclass(frozen=True, kw_only=True)
class RateControl:
    """Choose k and the bits of each tensor so that the model's file fits a budget in bytes.

    The coded length of the model as it is now decides k, as a video encoder controls its rate. Bits are chosen by equal
    slopes: a bit is worth m^2 / BITS_PER_NONZERO / ROUNDING of squared error, m being the magnitude of the marginal
    nonzero. Each tensor takes the codebook that is best at this price, which solves the multiple-choice knapsack of
    distortion and rate up to its integrality gap (Shoham and Gersho 1988).

    Args:
        max_bytes: the budget.
        smallest: bytes of the smallest file, one nonzero per layer.
        projected_bytes: model -> bytes of the file that it would end as, were it finalized now.
        file_bytes: finalized model -> bytes of its file.
        most_bits: largest codebook, 2^most_bits values; None without codebook.
        layers: the smallest k.
        dense_weights: N.
    """

    max_bytes: int
    smallest: int
    projected_bytes: Callable[[nn.Module], int] = field(repr=False)
    file_bytes: Callable[[nn.Module], int] = field(repr=False)
    most_bits: int | None
    layers: int
    dense_weights: int

    @torch.no_grad()
    def allocate(
        self,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        now: Allocation,
        *,
        choose_bits: bool,
        metric: Metric = NO_METRIC,
    ) -> tuple[Allocation, Allocation, int]:
        """Return the allocation that fits now, the one to continue training with, and the bytes of the first.

        The first is verified by coding the model. The second has a larger k if the tensors hold fewer nonzeros than
        the file has room for.

        Args:
            model: its parameters are changed for the measurement, and set back.
            tensors: the model's own parameters, name -> tensor.
            now: the allocation so far, where the search starts.
            choose_bits: choose the bits of each tensor; otherwise those of `now` stay.
            metric: how much single entries matter.

        Raises:
            BudgetTooSmall: not even one nonzero per layer fits.
        """
        values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        nonzeros = sum(int(tensor.count_nonzero()) for tensor in values.values())
        bits = now.bits
        if self.most_bits is not None and choose_bits:
            kept = NonzeroBudget(min(now.nonzeros, nonzeros)).project(values, metric)
            bits = self._choose_bits(kept, metric)
        elif self.most_bits is not None and bits is None:
            bits = min(DEFAULT_BITS, self.most_bits)  # until `admm` begins

        def length(k: int) -> int:
            for name, value in Allocation(k, bits).constraint().project(values, metric).items():
                tensors[name].data.copy_(value)
            return self.projected_bytes(model)

        start = min(now.nonzeros, nonzeros)
        k, size = self.largest_that_fits(length, min(self.layers, nonzeros), nonzeros, start=start)
        for name, value in values.items():
            tensors[name].data.copy_(value)
        wanted = self._extrapolate(k, size) if k == nonzeros and size < FILLED * self.max_bytes else k
        return Allocation(k, bits), Allocation(min(max(wanted, k), self.dense_weights), bits), size

    def largest_that_fits(self, length: Callable[[int], int], low: int, high: int, *, start: int) -> tuple[int, int]:
        """Search the largest k from low to high whose length fits the budget; return it with its length.

        The search also ends at a k that fills the part FILLED of the budget. Lengths need not rise strictly: only a k
        that was measured to fit is returned.

        Args:
            length: k -> bytes.
            start: the k that is tried first.

        Raises:
            BudgetTooSmall: not even low fits.
        """
        fits: tuple[int, int] | None = None
        misses: tuple[int, int] | None = None
        k = min(max(start, low), high)
        for attempt in range(40):
            size = length(k)
            if size <= self.max_bytes:
                fits = (k, size)
                if k == high or size >= FILLED * self.max_bytes:
                    break
            else:
                misses = (k, size)
                if k == low:
                    raise BudgetTooSmall(
                        f"a budget of {self.max_bytes:,} bytes is below the smallest file here, {size:,} bytes"
                    )
            under, over = fits[0] if fits else low - 1, misses[0] if misses else high + 1
            if over - under <= 1:
                break
            k = min(max(self._extrapolate(k, size), under + 1), over - 1)
            if attempt % 3 == 2 or attempt >= 12:  # bisect at times, since the extrapolation may creep
                k = (under + over) // 2
        assert fits is not None
        return fits

    def _extrapolate(self, k: int, size: int) -> int:
        """Estimate the k that would just fit if every nonzero took the mean number of bytes that these k take."""
        room = 0.993 * self.max_bytes - self.smallest
        factor = room / max(size - self.smallest, 1)
        return max(int(k * min(max(factor, 0.25), 2.0)), 1)

    def _choose_bits(self, kept: Mapping[str, Tensor], metric: Metric) -> dict[str, int]:
        """Choose the bits of each tensor: those with the least error + price * length."""
        assert self.most_bits is not None
        price, chosen = _bit_price(kept, metric), {}
        for name, tensor in kept.items():
            nonzero = tensor[tensor != 0]
            widths = range(1, self.most_bits + 1) if len(nonzero) else ()
            costs = [_codebook_cost(nonzero, bits, price) for bits in widths]
            chosen[name] = 1 + costs.index(min(costs)) if costs else min(DEFAULT_BITS, self.most_bits)
        return chosen


def _bit_price(kept: Mapping[str, Tensor], metric: Metric = NO_METRIC) -> float:
    """Return the squared error that a bit is worth, from that of pruning the marginal nonzero; see `RateControl`.

    The marginal nonzero is the one that ranks lowest. Its magnitude is that of an entry of median sensitivity with its
    score: small entries that the loss depends on rank higher, and say nothing about the margin. Nor do silent ones.
    """
    scores = metric.scores(kept)
    magnitudes = torch.cat([tensor[tensor != 0].abs() for tensor in kept.values()])
    ranked = torch.cat([scores[name][tensor != 0] for name, tensor in kept.items()])
    factors = ranked / magnitudes
    live = factors > 1e-6 * factors.max()  # not silent
    ranked, factors = ranked[live], factors[live]
    marginal = ranked.kthvalue(max(int(MARGINAL * len(ranked)), 1)).values / factors.median()
    return float(marginal) ** 2 / BITS_PER_NONZERO / ROUNDING


def _codebook_cost(nonzero: Tensor, bits: int, price: float) -> float:
    """Return the squared error of a codebook + price * the bits of its codes and values."""
    quantized, centers = zero_kmeans(nonzero, 2**bits, iterations=10)
    error = float((nonzero - quantized).double().square().sum())
    counts = torch.unique(quantized, return_counts=True)[1].double()
    codes = float(-(counts * (counts / counts.sum()).log2()).sum())
    return error + price * (codes + BITS_PER_CENTER * len(centers))
