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

from atmc.compress.metric import Metric
from atmc.compress.projections import exact_zero_kmeans, largest_masks, zero_kmeans

Tensors = Mapping[str, Tensor]
NO_METRIC = Metric()
NO_WEIGHTS: Tensors = {}
WARM_ITERATIONS = 10  # of ZeroKmeans if it starts from known centers; more gain little (benchmarks/projections.py)


class Constraint(Protocol):
    """A set of allowed values.

    `linear` says whether it is a linear subspace, in which gradients and steps may be projected like values.
    """

    @property
    def linear(self) -> bool:
        """Whether the set is a linear subspace."""

    def project(self, tensors: Tensors, metric: Metric = NO_METRIC) -> dict[str, Tensor]:
        """Return the point of the set that is nearest to the tensors (for a codebook: a near point).

        Args:
            metric: how much single entries matter; by default all alike.
        """


@dataclass(frozen=True)
class NonzeroBudget:
    """At most `nonzeros` entries differ from zero, over all tensors together (Gui et al. 2019, eq. 4).

    With keep_alive every layer whose W is not zero keeps a W that is not zero, so that no layer becomes constant: its
    largest entry of W or C, or the entries of U and V that make up the largest product.

    >>> NonzeroBudget(1).project({"a": torch.tensor([1.0, -3.0]), "b": torch.tensor([2.0])})["a"].tolist()
    [0.0, -3.0]
    """

    nonzeros: int
    keep_alive: bool = False

    def __post_init__(self) -> None:
        if self.nonzeros < 1:
            raise ValueError(f"expected a budget of at least 1 nonzero, got {self.nonzeros}")

    @property
    def linear(self) -> bool:
        """Return False: sums of sparse tensors are less sparse."""
        return False

    def project(self, tensors: Tensors, metric: Metric = NO_METRIC) -> dict[str, Tensor]:
        """Keep the entries that rank highest, by magnitude unless the metric says otherwise.

        Of equal ones the first stay, so that the budget is never exceeded.

        Raises:
            ValueError: the budget is below what keep_alive asks for.
        """
        scores = metric.scores(tensors)
        kept = self._keep(scores, self.nonzeros)
        if self.keep_alive:
            groups = _layers(tensors)
            if not all(_stays_alive(group, kept, tensors) for group in groups if _is_alive(group, tensors)):
                kept = self._keep_layers_alive(groups, tensors, scores)
        return {name: tensor.masked_fill(~kept[name], 0) for name, tensor in tensors.items()}

    def _keep(self, scores: Tensors, nonzeros: int) -> dict[str, Tensor]:
        """Return masks of the entries that rank highest."""
        return dict(zip(scores, largest_masks(list(scores.values()), nonzeros), strict=True))

    def _keep_layers_alive(self, groups: list[Layer], tensors: Tensors, scores: Tensors) -> dict[str, Tensor]:
        """Return masks like `_keep`, of which one entry or product per layer is reserved."""
        reserved = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in tensors.items()}
        for group in groups:
            if _is_alive(group, tensors):
                for name, index in _vital_entries(group, tensors):
                    reserved[name][torch.unravel_index(torch.tensor(index), tensors[name].shape)] = True
        count = sum(int(mask.sum()) for mask in reserved.values())
        if count > self.nonzeros:
            raise ValueError(f"expected a budget of at least {count} nonzeros, one per layer, got {self.nonzeros}")
        others = {name: score.masked_fill(reserved[name], 0) for name, score in scores.items()}
        return {name: mask | reserved[name] for name, mask in self._keep(others, self.nonzeros - count).items()}


@dataclass(frozen=True)
class Layer:
    """The names of the tensors that make up one W: `weight` alone, or U and V and, unless it has none, C."""

    weight: str | None = None
    u: str | None = None
    v: str | None = None
    c: str | None = None


def _layers(tensors: Tensors) -> list[Layer]:
    """Group names of tensors by the W that they make up."""
    layers = []
    for name in tensors:
        path, _, factor = name.rpartition(".")
        factored = f"{path}.U" in tensors and f"{path}.V" in tensors
        if factored and factor == "U":
            layers.append(Layer(u=name, v=f"{path}.V", c=f"{path}.C" if f"{path}.C" in tensors else None))
        elif not (factored and factor in ("V", "C")):
            layers.append(Layer(weight=name))
    return layers


def _is_alive(layer: Layer, tensors: Tensors) -> bool:
    """Return whether a layer's W has a nonzero, up to cancellation. If U (or V) and C are zero, V (or U) counts.

    Then the form is one of those with an identity, W = (U + I) V or U (V + I), unless W is zero anyway.
    """
    if layer.weight:
        return bool(tensors[layer.weight].any())
    assert layer.u is not None
    assert layer.v is not None
    u, v = tensors[layer.u], tensors[layer.v]
    if layer.c and tensors[layer.c].any():
        return True
    if layer.c and not (u.any() and v.any()):
        return bool(u.any() or v.any())
    return bool((u.any(0) & v.any(1)).any())


def _stays_alive(layer: Layer, kept: Tensors, tensors: Tensors) -> bool:
    """Return whether a layer that is alive in the tensors is so where only the kept entries differ from zero.

    A factor that lost its partner does not count, whatever the form: without an identity W would be zero.

    Args:
        kept: masks of the entries.
    """
    lost = (layer.u, layer.v) if layer.c and not kept[layer.c].any() else ()
    if any(name and tensors[name].any() and not kept[name].any() for name in lost):
        return False
    return _is_alive(layer, kept)


def _vital_entries(layer: Layer, tensors: Tensors) -> list[tuple[str, int]]:
    """Return the fewest entries, by tensor and flat index, that keep a live layer's W from being zero."""
    if layer.weight:
        return [(layer.weight, int(tensors[layer.weight].abs().argmax()))]
    assert layer.u is not None
    assert layer.v is not None
    u, v = tensors[layer.u].abs(), tensors[layer.v].abs()
    products = u.amax(0) * v.amax(1)
    rest = tensors[layer.c].abs().flatten() if layer.c else products.new_zeros(1)
    if layer.c and float(rest.amax()) >= float(products.amax()) and bool(rest.any()):
        return [(layer.c, int(rest.argmax()))]
    if not products.any():  # a form with an identity
        name, tensor = (layer.u, u) if u.any() else (layer.v, v)
        return [(name, int(tensor.argmax()))]
    j = int(products.argmax())
    return [
        (layer.u, int(u[:, j].argmax()) * u.shape[1] + j),
        (layer.v, j * v.shape[1] + int(v[j].argmax())),
    ]


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

    @property
    def linear(self) -> bool:
        """Return True."""
        return True

    def project(self, tensors: Tensors, metric: Metric = NO_METRIC) -> dict[str, Tensor]:
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

    @property
    def linear(self) -> bool:
        """Return True."""
        return True

    def project(self, tensors: Tensors, metric: Metric = NO_METRIC) -> dict[str, Tensor]:
        """Replace every entry by the mean over its code: the nearest point of a linear subspace.

        The metric has no say, so that the projection of a gradient is the mean gradient of the entries that share a
        value.
        """
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

    @property
    def linear(self) -> bool:
        """Return False: the values that entries share are free."""
        return False

    def project(self, tensors: Tensors, metric: Metric = NO_METRIC) -> dict[str, Tensor]:
        """Quantize each tensor by ZeroKmeans, without known centers, with the metric's weights of errors."""
        return self.quantize(tensors, {}, metric.rounding)[0]

    def quantize(
        self, tensors: Tensors, centers: Tensors, weights: Tensors = NO_WEIGHTS
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Quantize each tensor by ZeroKmeans, starting from its centers if they are given; return both by name.

        Args:
            weights: name -> weights of the squared errors, shaped like the tensor; 1 if missing.
        """
        quantized, new_centers = {}, {}
        for name, tensor in tensors.items():
            levels = 2 ** (self.bits[name] if isinstance(self.bits, Mapping) else self.bits)
            weight = weights.get(name)
            if 0 < int(tensor.count_nonzero()) <= self.exact_below:
                quantized[name], new_centers[name] = exact_zero_kmeans(tensor, levels, weights=weight)
            else:
                start = centers.get(name)
                iterations = 100 if start is None else WARM_ITERATIONS
                quantized[name], new_centers[name] = zero_kmeans(
                    tensor, levels, centers=start, iterations=iterations, weights=weight
                )
        return quantized, new_centers


@dataclass(frozen=True)
class InOrder:
    """Several constraints that are projected on in turn: each projection must keep the constraints before it.

    A nonzero budget and then a codebook give Q(theta): ZeroKmeans keeps zeros zero, so that both hold.
    """

    parts: tuple[Constraint, ...]

    @property
    def linear(self) -> bool:
        """Whether all parts are linear subspaces."""
        return all(part.linear for part in self.parts)

    def project(self, tensors: Tensors, metric: Metric = NO_METRIC) -> dict[str, Tensor]:
        """Project on each part, in order."""
        current = dict(tensors)
        for part in self.parts:
            current = part.project(current, metric)
        return current
