"""What the compressed parameters must satisfy: small objects with one method, `project`.

A solver knows nothing else about a constraint. Tensors are passed and returned as a dict, name -> tensor, with the
names of `factorize.compressible_parameters`; a projection never changes its input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from atmc.compress.projections import exact_zero_kmeans, keep_largest, zero_kmeans

Tensors = Mapping[str, Tensor]
WARM_ITERATIONS = 10  # of ZeroKmeans if it starts from known centers; more gain little (benchmarks/projections.py)


class Constraint(Protocol):
    """A set of allowed values."""

    def project(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return the point of the set that is nearest to the tensors (for a codebook: a near point)."""


@dataclass(frozen=True)
class NonzeroBudget:
    """At most `nonzeros` entries differ from zero, over all tensors together (Gui et al. 2019, eq. 4).

    With keep_alive every layer that has a nonzero keeps at least its largest one, so that no layer becomes constant. It
    is kept in the tensor without which W would be zero: a plain weight, or the factor that starts as W.

    >>> NonzeroBudget(1).project({"a": torch.tensor([1.0, -3.0]), "b": torch.tensor([2.0])})["a"].tolist()
    [0.0, -3.0]
    """

    nonzeros: int
    keep_alive: bool = False

    def __post_init__(self) -> None:
        if self.nonzeros < 1:
            raise ValueError(f"expected a budget of at least 1 nonzero, got {self.nonzeros}")

    def project(self, tensors: Tensors) -> dict[str, Tensor]:
        """Keep the entries of largest magnitude; of equal ones the first stay, so that the budget is never exceeded."""
        kept = dict(zip(tensors, keep_largest(list(tensors.values()), self.nonzeros), strict=True))
        vital = _vital_tensors(tensors) if self.keep_alive else []
        if all(kept[name].any() for name in vital):
            return kept
        if len(vital) > self.nonzeros:
            raise ValueError(f"expected a budget of at least {len(vital)} nonzeros, one per layer, got {self.nonzeros}")
        rest, largest = {name: tensor.clone() for name, tensor in tensors.items()}, {}
        for name in vital:
            largest[name] = tuple(torch.unravel_index(tensors[name].abs().argmax(), tensors[name].shape))
            rest[name][largest[name]] = 0
        others = keep_largest(list(rest.values()), self.nonzeros - len(vital))
        kept = dict(zip(tensors, others, strict=True))
        for name, index in largest.items():
            kept[name][index] = tensors[name][index]
        return kept


def _vital_tensors(tensors: Tensors) -> list[str]:
    """Name for each layer the tensor that `NonzeroBudget` keeps alive, unless that tensor is all zero.

    It is the plain W, or with U, V and C the one of U and V that starts as W. Layers of U and V alone have none.
    """
    vital = []
    for name, tensor in tensors.items():
        path, _, factor = name.rpartition(".")
        if factor in ("U", "V", "C") and f"{path}.V" in tensors:
            if factor == "C" or f"{path}.C" not in tensors:
                continue
            wide = tensors[f"{path}.U"].shape[0] <= tensors[f"{path}.V"].shape[1]
            if (factor == "V") != wide:
                continue
        if tensor.any():
            vital.append(name)
    return vital


@dataclass(frozen=True)
class FixedMask:
    """Entries outside a mask are zero.

    Args:
        masks: name -> bool tensor, True for the entries that may differ from zero.
    """

    masks: Tensors

    @classmethod
    def support(cls, tensors: Tensors) -> FixedMask:
        """Return the constraint that the present zeros stay zero."""
        return cls({name: tensor != 0 for name, tensor in tensors.items()})

    def project(self, tensors: Tensors) -> dict[str, Tensor]:
        """Set the entries outside the mask to zero."""
        return {name: tensor.masked_fill(~self.masks[name], 0.0) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class FixedCodes:
    """Zeros stay zero, and entries with the same code share one value: only the codebook can be learned.

    Args:
        codes: name -> (positions (m,) int64 of the nonzeros in the flat tensor, codes (m,) int64 from 0).
    """

    codes: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, tensors: Tensors) -> FixedCodes:
        """Return the codes of tensors that hold few distinct values: equal values get equal codes."""
        return cls({name: _codes(tensor.detach().flatten()) for name, tensor in tensors.items()})

    def project(self, tensors: Tensors) -> dict[str, Tensor]:
        """Replace every entry by the mean over its code: the nearest point of a linear subspace."""
        return {name: _average_per_code(tensor, *self.codes[name]) for name, tensor in tensors.items()}


def _codes(flat: Tensor) -> tuple[Tensor, Tensor]:
    positions = flat.nonzero()[:, 0]
    return positions, torch.unique(flat[positions], return_inverse=True)[1]


def _average_per_code(tensor: Tensor, positions: Tensor, codes: Tensor) -> Tensor:
    averaged = torch.zeros_like(tensor).flatten()
    if len(codes):
        values = tensor.flatten()[positions].double()
        counts = torch.bincount(codes)
        total = torch.zeros(len(counts), dtype=torch.float64, device=tensor.device).index_add_(0, codes, values)
        averaged[positions] = (total / counts).to(tensor.dtype)[codes]
    return averaged.view_as(tensor)


@dataclass(frozen=True)
class Codebook:
    """Each tensor has at most 2^bits distinct nonzero values (Gui et al. 2019, eq. 5).

    Args:
        bits: 1 to 8, for every tensor, or name -> bits.
        exact_below: tensors with at most this number of nonzeros are quantized optimally, not by Lloyd's iterations.
    """

    bits: int | Mapping[str, int]
    exact_below: int = 0

    def __post_init__(self) -> None:
        for bits in self.bits.values() if isinstance(self.bits, Mapping) else [self.bits]:
            if not 1 <= bits <= 8:
                raise ValueError(f"expected 1 to 8 bits, got {bits}")

    def project(self, tensors: Tensors) -> dict[str, Tensor]:
        """Quantize each tensor by ZeroKmeans, without known centers."""
        return self.quantize(tensors, {})[0]

    def quantize(self, tensors: Tensors, centers: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Quantize each tensor by ZeroKmeans, starting from its centers if they are given; return both by name."""
        quantized, new_centers = {}, {}
        for name, tensor in tensors.items():
            levels = 2 ** (self.bits[name] if isinstance(self.bits, Mapping) else self.bits)
            if 0 < int(tensor.count_nonzero()) <= self.exact_below:
                quantized[name], new_centers[name] = exact_zero_kmeans(tensor, levels)
            else:
                start = centers.get(name)
                iterations = 100 if start is None else WARM_ITERATIONS
                quantized[name], new_centers[name] = zero_kmeans(tensor, levels, centers=start, iterations=iterations)
        return quantized, new_centers


@dataclass(frozen=True)
class InOrder:
    """Several constraints that are projected on in turn: each projection must keep the constraints before it.

    A nonzero budget and then a codebook give Q(theta): ZeroKmeans keeps zeros zero, so that both hold.
    """

    parts: tuple[Constraint, ...]

    def project(self, tensors: Tensors) -> dict[str, Tensor]:
        """Project on each part, in order."""
        current = dict(tensors)
        for part in self.parts:
            current = part.project(current)
        return current
