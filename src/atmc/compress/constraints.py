"""What the compressed parameters must satisfy: small objects with one method, `project`.

A solver knows nothing else about a constraint. Tensors come and go as a dict, name -> tensor, the flat view of
`factorize.compressible`; a projection never changes its input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from atmc.compress.projections import exact_zero_kmeans, keep_largest, zero_kmeans

Tensors = Mapping[str, Tensor]
WARM_ITERATIONS = 10  # of ZeroKmeans where the last centers are known; more gain little (benchmarks/projections.py)


class Constraint(Protocol):
    """A set of allowed values."""

    def project(self, tensors: Tensors) -> dict[str, Tensor]:
        """The point of the set that is nearest to the tensors (for a codebook: a near one)."""


@dataclass(frozen=True)
class NonzeroBudget:
    """At most `nonzeros` entries differ from zero, over all tensors together (Gui et al. 2019, eq. 4).

    With keep_alive every layer that has a nonzero keeps its largest one, so that none becomes constant: in the names of
    `factorize.compressible`, a layer's plain weight, or the factor that starts as W.

    >>> NonzeroBudget(1).project({"a": torch.tensor([1.0, -3.0]), "b": torch.tensor([2.0])})["a"].tolist()
    [0.0, -3.0]
    """

    nonzeros: int
    keep_alive: bool = False

    def __post_init__(self) -> None:
        if self.nonzeros < 1:
            raise ValueError(f"expected a budget of at least 1 nonzero, got {self.nonzeros}")

    def project(self, tensors: Tensors) -> dict[str, Tensor]:
        """The largest magnitudes stay; ties keep the first, so that never more than the budget remains."""
        kept = dict(zip(tensors, keep_largest(list(tensors.values()), self.nonzeros), strict=True))
        leads = _leads(tensors) if self.keep_alive else []
        if all(kept[name].any() for name in leads):
            return kept
        if len(leads) > self.nonzeros:
            raise ValueError(f"expected a budget of at least {len(leads)} nonzeros, one a layer, got {self.nonzeros}")
        rest, first = {name: tensor.clone() for name, tensor in tensors.items()}, {}
        for name in leads:
            first[name] = tuple(torch.unravel_index(tensors[name].abs().argmax(), tensors[name].shape))
            rest[name][first[name]] = 0
        others = keep_largest(list(rest.values()), self.nonzeros - len(leads))
        kept = dict(zip(tensors, others, strict=True))
        for name, place in first.items():
            kept[name][place] = tensors[name][place]
        return kept


def _leads(tensors: Tensors) -> list[str]:
    """Per layer the tensor without which W is zero: a plain W; of factors with C the V or U that holds W; no zeros."""
    found = []
    for name, tensor in tensors.items():
        path, _, factor = name.rpartition(".")
        if factor in ("U", "V", "C") and f"{path}.V" in tensors:
            if factor == "C" or f"{path}.C" not in tensors:
                continue
            wide = tensors[f"{path}.U"].shape[0] <= tensors[f"{path}.V"].shape[1]
            if (factor == "V") != wide:
                continue
        if tensor.any():
            found.append(name)
    return found


@dataclass(frozen=True)
class FixedMask:
    """Entries outside a mask are zero. Args: masks: name -> bool tensor, True where a value may be."""

    masks: Tensors

    @classmethod
    def support(cls, tensors: Tensors) -> FixedMask:
        """The mask of what is nonzero now."""
        return cls({name: tensor != 0 for name, tensor in tensors.items()})

    def project(self, tensors: Tensors) -> dict[str, Tensor]:
        """Zero outside the mask."""
        return {name: tensor.masked_fill(~self.masks[name], 0.0) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class FixedCodes:
    """Zeros stay, and entries with the same code share one value: what is left to learn is the codebook.

    Args:
        codes: name -> (positions (m,) int64 of the nonzeros in the flat tensor, codes (m,) int64 from 0).
    """

    codes: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, tensors: Tensors) -> FixedCodes:
        """The codes of tensors that hold few distinct values: equal values get equal codes."""
        return cls({name: _codes(tensor.detach().flatten()) for name, tensor in tensors.items()})

    def project(self, tensors: Tensors) -> dict[str, Tensor]:
        """Every entry becomes the mean of its code's entries: the nearest point of a linear subspace."""
        return {name: _tie(tensor, *self.codes[name]) for name, tensor in tensors.items()}


def _codes(flat: Tensor) -> tuple[Tensor, Tensor]:
    positions = flat.nonzero()[:, 0]
    return positions, torch.unique(flat[positions], return_inverse=True)[1]


def _tie(tensor: Tensor, positions: Tensor, codes: Tensor) -> Tensor:
    tied = torch.zeros_like(tensor).flatten()
    if len(codes):
        values = tensor.flatten()[positions].double()
        counts = torch.bincount(codes)
        total = torch.zeros(len(counts), dtype=torch.float64, device=tensor.device).index_add_(0, codes, values)
        tied[positions] = (total / counts).to(tensor.dtype)[codes]
    return tied.view_as(tensor)


@dataclass(frozen=True)
class Codebook:
    """Each tensor has at most 2^bits distinct nonzero values (Gui et al. 2019, eq. 5).

    Args:
        bits: 1 to 8, for every tensor, or name -> bits.
        exact_below: tensors with at most so many nonzeros are quantized optimally instead of by Lloyd's iterations.
    """

    bits: int | Mapping[str, int]
    exact_below: int = 0

    def __post_init__(self) -> None:
        for bits in self.bits.values() if isinstance(self.bits, Mapping) else [self.bits]:
            if not 1 <= bits <= 8:
                raise ValueError(f"expected 1 to 8 bits, got {bits}")

    def project(self, tensors: Tensors) -> dict[str, Tensor]:
        """ZeroKmeans of each tensor, from a cold start."""
        return self.quantize(tensors, {})[0]

    def quantize(self, tensors: Tensors, centers: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """ZeroKmeans of each tensor, warm where centers are given; (quantized, the centers found)."""
        quantized, found = {}, {}
        for name, tensor in tensors.items():
            levels = 2 ** (self.bits[name] if isinstance(self.bits, Mapping) else self.bits)
            if 0 < int(tensor.count_nonzero()) <= self.exact_below:
                quantized[name], found[name] = exact_zero_kmeans(tensor, levels)
            else:
                warm = centers.get(name)
                iterations = 100 if warm is None else WARM_ITERATIONS
                quantized[name], found[name] = zero_kmeans(tensor, levels, centers=warm, iterations=iterations)
        return quantized, found


@dataclass(frozen=True)
class Each:
    """Several constraints, projected on one after the other; meant for sets whose later projections keep the earlier.

    A codebook after a nonzero budget is Q(theta): ZeroKmeans keeps zeros zero, so both hold.
    """

    parts: tuple[Constraint, ...]

    def project(self, tensors: Tensors) -> dict[str, Tensor]:
        """Through every part, in order."""
        current = dict(tensors)
        for part in self.parts:
            current = part.project(current)
        return current
