"""ATMC and the methods it is compared with: each a short composition of the same phases.

Sources: Gui et al. 2019, section 4 (all but `al0q`, which the paper leaves out); docs/method.md says what each shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

import torch
from torch import nn

from atmc.compress.admm import Admm
from atmc.compress.constraints import Codebook, Constraint, Each, FixedCodes, FixedMask, NonzeroBudget
from atmc.compress.factorize import Site, compressible, cut_ranks, factorize, sites, structure
from atmc.compress.projections import allocate_ranks
from atmc.phases import Phase, Tensors
from atmc.train import assign

EXACT_BELOW = 20_000  # nonzeros up to which a tensor's final codebook is the exact optimum


@dataclass(frozen=True)
class Plan:
    """What a method needs to know.

    Args:
        nonzeros: k, the budget over all compressed tensors.
        dense_weights: N, the entries of those tensors in the dense model.
        bits: codebook bits, None for 32-bit values.
        gradual: share of the l0 (and admm) phase in which the nonzeros shrink to k.
        regrow: the admm phase begins with so many times k, so that factors which start at zero can take part.
        rho, balance: ADMM's penalty and whether it adapts.
        factor_start: ``identity`` or ``svd``.
        exclude: patterns of weights that stay as they are.
    """

    nonzeros: int
    dense_weights: int
    bits: int | None = None
    gradual: float = 0.5
    regrow: float = 1.0
    rho: float = 0.1
    balance: bool = False
    factor_start: Literal["identity", "svd"] = "identity"
    exclude: tuple[str, ...] = ()


def atmc(plan: Plan) -> list[Phase]:
    """The whole method: l0 on W, then W = U V + C under the budget with ADMM's codebook, then the codebook's values.

    Without bits the middle stage is projected descent on the factors, the paper's ATMC-32bit.
    """
    return [_dense(), _l0(plan), _held(plan, factored=True), _tune(plan.bits)]


def al0(plan: Plan) -> list[Phase]:
    """l0 projection on W with a support free to move: no factors, no codebook."""
    return [_dense(), _l0(plan), _tune(None)]


def al0q(plan: Plan) -> list[Phase]:
    """`al0` with the codebook constraint on W: `atmc` without its factors."""
    return [_dense(), _l0(plan), _held(plan, factored=False), _tune(plan.bits)]


def ap(plan: Plan) -> list[Phase]:
    """One-shot magnitude pruning of the robust dense model, then fine-tuning on that support."""

    def prune(model: nn.Module) -> None:
        tensors = compressible(model, exclude=plan.exclude)
        assign(tensors, NonzeroBudget(plan.nonzeros).project({name: t.detach() for name, t in tensors.items()}))

    return [_dense(), Phase("tune", enter=prune, constraint=_support, keeps_start=True)]


def alr(plan: Plan) -> list[Phase]:
    """Low rank: the largest singular values of all weights that fit the budget, then fine-tuning of the factors."""

    def cut(model: nn.Module) -> None:
        paths, values, costs = [], [], []
        for site in _rank_sites(model, plan.exclude):
            weight = getattr(site.module, site.parameter).detach()
            matrix = weight.reshape(weight.shape[0], -1).double()
            paths.append(site.path)
            values.append(torch.linalg.svdvals(matrix))
            costs.append(sum(matrix.shape))
        ranks = allocate_ranks(values, costs, plan.nonzeros - _unfactored(model, plan.exclude))
        cut_ranks(model, dict(zip(paths, ranks, strict=True)))

    return [_dense(), Phase("tune", enter=cut, keeps_start=True)]


def da(plan: Plan) -> list[Phase]:
    """Dense adversarial training: defense without compression."""
    return [_dense()]


METHODS: dict[str, Callable[[Plan], list[Phase]]] = {
    "atmc": atmc,
    "al0": al0,
    "al0q": al0q,
    "alr": alr,
    "ap": ap,
    "nap": al0,  # the same phases under the natural objective (see `objective_of`)
    "da": da,
}
CODEBOOK_METHODS = ("atmc", "al0q")


def phases_of(method: str, plan: Plan) -> list[Phase]:
    """The phases of a method by name. Raises ValueError as `check_method`."""
    check_method(method, plan.bits)
    return METHODS[method](plan)


def check_method(method: str, bits: int | None) -> None:
    """ValueError for an unknown method (the nearest is named), bits without a codebook, or `al0q` without bits."""
    if method not in METHODS:
        near = get_close_matches(method, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}{hint}")
    if bits is not None and method not in CODEBOOK_METHODS:
        raise ValueError(
            f"method {method!r} has no codebook: leave out bits, or use one of {', '.join(CODEBOOK_METHODS)}"
        )
    if bits is None and method == "al0q":
        raise ValueError("method 'al0q' is al0 with a codebook: give bits")


def objective_of(method: str, objective: str) -> str:
    """`nap` trains on clean images whatever the objective; every other method takes the one it is given."""
    return "natural" if method == "nap" else objective


def floor_of(method: str, model: nn.Module, exclude: tuple[str, ...] = ()) -> int:
    """The smallest k with which a method leaves every layer something: one nonzero, or one rank, a layer."""
    if method == "alr":
        shapes: list[torch.Size] = [getattr(site.module, site.parameter).shape for site in _rank_sites(model, exclude)]
        return sum(shape[0] + shape[1:].numel() for shape in shapes) + _unfactored(model, exclude)
    return 1 if method == "da" else len(sites(model, exclude=exclude))


def _rank_sites(model: nn.Module, exclude: tuple[str, ...]) -> list[Site]:
    return [site for site in sites(model, exclude=exclude) if site.factorable]


def _unfactored(model: nn.Module, exclude: tuple[str, ...]) -> int:
    """Entries of the weights that have no matrix to factor (grouped convolutions) and stay dense."""
    left = [site for site in sites(model, exclude=exclude) if not site.factorable]
    counts: list[int] = [getattr(site.module, site.parameter).numel() for site in left]
    return sum(counts)


def _dense() -> Phase:
    return Phase("dense")


def _l0(plan: Plan) -> Phase:
    """Projection on a number of nonzeros that falls from N to k over the first part of the phase."""
    return Phase("l0", constraint=_shrinking(plan, plan.dense_weights), feasible=NonzeroBudget(plan.nonzeros))


def _held(plan: Plan, *, factored: bool) -> Phase:
    """The budget, with bits ADMM beside it, and a validated model that satisfies both."""
    feasible: Constraint = NonzeroBudget(plan.nonzeros)
    admm = None
    if plan.bits is not None:
        feasible = Each((feasible, Codebook(plan.bits, exact_below=EXACT_BELOW)))
        admm = Admm(Codebook(plan.bits), rho=plan.rho, balance=plan.balance)

    def enter(model: nn.Module) -> None:
        if factored:  # a checkpoint's factors stay as they are
            factorize(model, start=plan.factor_start, exclude=(*plan.exclude, *structure(model)))

    start = max(plan.nonzeros, min(int(plan.regrow * plan.nonzeros), plan.dense_weights))
    return Phase("admm", enter, _shrinking(plan, start), feasible, admm)


def _shrinking(plan: Plan, start: int) -> Callable[[Tensors], Callable[[float], Constraint]]:
    """A budget that falls cubically from start to k while `gradual` of the phase goes by (Zhu and Gupta 2018)."""
    final = NonzeroBudget(plan.nonzeros)

    def at(done: float) -> Constraint:
        if done >= plan.gradual:
            return final
        left = (1 - done / plan.gradual) ** 3
        return NonzeroBudget(plan.nonzeros + int((start - plan.nonzeros) * left))

    return lambda _: at


def _tune(bits: int | None) -> Phase:
    """Positions fixed; with bits codes too, so that only the codebook's values, biases and norms are learned."""
    return Phase("tune", constraint=_support if bits is None else _codes, keeps_start=True)


def _support(start: Tensors) -> Callable[[float], Constraint]:
    mask = FixedMask.support(start)
    return lambda _: mask


def _codes(start: Tensors) -> Callable[[float], Constraint]:
    codes = FixedCodes.of(start)
    return lambda _: codes
