"""Budgets in bytes: how many nonzeros, and how many bits for each tensor, the file has room for.

Legend: N the number of conv and linear weights of the dense model; k nonzeros; Q prune to k, then quantize.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from atmc.compress.budget import Bits
from atmc.compress.constraints import Codebook, Constraint, InOrder, NonzeroBudget
from atmc.compress.projections import keep_largest, zero_kmeans

EXACT_BELOW = 20_000  # nonzeros up to which a tensor's final codebook is the exact optimum
FILLED = 0.985  # share of the byte budget from which on a search is content
BITS_EACH = 12.0  # about what a nonzero takes, position and code
ROUNDING = 8.0  # how much dearer an error of rounding is than one of pruning, which others make up for (results/rate)
USUAL_BITS = 4
MARGINAL = 0.02  # the share of nonzeros, by magnitude, that stand for the marginal one


class BudgetTooSmall(ValueError):
    """No file of this model is that small; the message names the smallest."""


@dataclass(frozen=True)
class Allocation:
    """What a budget gives at a moment: k, and the bits of each tensor (one number for all; None without codebook)."""

    nonzeros: int
    bits: Bits = None

    def step_constraint(self, nonzeros: int) -> Constraint:
        """Return what the tensors satisfy after a training step: at most `nonzeros`, and in every layer at least one.

        A method may pass more than k, to shrink the model gradually.
        """
        return NonzeroBudget(nonzeros, keep_alive=True)

    def constraint(self) -> Constraint:
        """Return Q: prune to k, every layer keeping something, then quantize."""
        prune = self.step_constraint(self.nonzeros)
        return prune if self.bits is None else InOrder((prune, Codebook(self.bits, exact_below=EXACT_BELOW)))


@dataclass(frozen=True)
class RateControl:
    """Holds a byte budget: which k, and which bits for each tensor, the file has room for.

    As a video encoder holds its rate: the coded length of the model as it now is decides the number of nonzeros that
    training goes on with. Bits are chosen by equal slopes: the budget's marginal nonzero, of magnitude m and b bits of
    code, is worth m^2 / b of squared error a bit; each tensor takes the codebook that is best at this price, which
    solves the multiple-choice knapsack of distortion and rate up to its integrality gap (Shoham and Gersho 1988).

    Args:
        max_bytes: the budget.
        smallest: bytes of the smallest file, one nonzero a layer.
        measure: model -> bytes of the file it would end as.
        measure_exact: model whose rounding is done -> bytes of its file.
        most_bits: largest codebook, 2^most_bits values; None without codebook.
        layers: the smallest k.
        dense_weights: N.
    """

    max_bytes: int
    smallest: int
    measure: Callable[[nn.Module], int] = field(repr=False)
    measure_exact: Callable[[nn.Module], int] = field(repr=False)
    most_bits: int | None
    layers: int
    dense_weights: int

    @torch.no_grad()
    def allocate(
        self, model: nn.Module, tensors: Mapping[str, Tensor], now: Allocation, *, choose_bits: bool
    ) -> tuple[Allocation, Allocation, int]:
        """What the model's tensors must be projected to now, what training should go on with, and bytes of the first.

        The first is verified by measuring; both differ where the tensors hold fewer nonzeros than there is room for.
        The tensors are the model's own parameters; they are changed and put back.

        Raises:
            BudgetTooSmall: not even one nonzero a layer fits.
        """
        held = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        there = sum(int(tensor.count_nonzero()) for tensor in held.values())
        bits = now.bits
        if self.most_bits is not None and choose_bits:
            kept = keep_largest(list(held.values()), min(now.nonzeros, there))
            bits = self._bits(dict(zip(held, kept, strict=True)))
        elif self.most_bits is not None and bits is None:
            bits = min(USUAL_BITS, self.most_bits)  # until there is something to choose by

        def length(k: int) -> int:
            for name, value in Allocation(k, bits).constraint().project(held).items():
                tensors[name].data.copy_(value)
            return self.measure(model)

        k, size = self.largest(length, min(self.layers, there), there, start=min(now.nonzeros, there))
        for name, value in held.items():
            tensors[name].data.copy_(value)
        wanted = self._scaled(k, size) if k == there and size < FILLED * self.max_bytes else k
        return Allocation(k, bits), Allocation(min(max(wanted, k), self.dense_weights), bits), size

    def largest(self, length: Callable[[int], int], low: int, high: int, *, start: int) -> tuple[int, int]:
        """The largest number from low to high whose length fits, or one that fills FILLED of the budget; its length.

        Lengths need not rise strictly: only what was measured to fit is returned.

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
            k = min(max(self._scaled(k, size), under + 1), over - 1)
            if attempt % 3 == 2 or attempt >= 12:  # a secant that creeps is helped by halving
                k = (under + over) // 2
        assert fits is not None
        return fits

    def _scaled(self, k: int, size: int) -> int:
        """The k that would just fit, if every nonzero took as much as these do on average."""
        room = 0.993 * self.max_bytes - self.smallest
        share = room / max(size - self.smallest, 1)
        return max(int(k * min(max(share, 0.25), 2.0)), 1)

    def _bits(self, kept: Mapping[str, Tensor]) -> dict[str, int]:
        """The bits of each tensor: least error + price * length."""
        assert self.most_bits is not None
        price, chosen = _price(kept), {}
        for name, tensor in kept.items():
            nonzero = tensor[tensor != 0]
            costs = [_cost(nonzero, bits, price) for bits in range(1, self.most_bits + 1)] if len(nonzero) else []
            chosen[name] = 1 + costs.index(min(costs)) if costs else min(USUAL_BITS, self.most_bits)
        return chosen


def _price(kept: Mapping[str, Tensor]) -> float:
    """Squared error that a bit is worth: that of a small nonzero, over the bits that it takes."""
    magnitudes = torch.cat([tensor[tensor != 0].abs().flatten() for tensor in kept.values()])
    marginal = magnitudes.kthvalue(max(int(MARGINAL * len(magnitudes)), 1)).values
    return float(marginal) ** 2 / BITS_EACH / ROUNDING


def _cost(nonzero: Tensor, bits: int, price: float) -> float:
    """Squared error of a codebook + price * bits of its codes and values."""
    quantized, centers = zero_kmeans(nonzero, 2**bits, iterations=10)
    error = float((nonzero - quantized).double().square().sum())
    counts = torch.unique(quantized, return_counts=True)[1].double()
    codes = float(-(counts * (counts / counts.sum()).log2()).sum())
    return error + price * (codes + 10 * len(centers))
