"""ATMC and the methods it is compared with: each a short composition of the same phases.

Sources: Gui et al. 2019, section 4 (all but `al0q`, which the paper leaves out); docs/method.md says what each shows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from atmc.compress.admm import Admm
from atmc.compress.constraints import Codebook, Constraint, FixedCodes, FixedMask, NonzeroBudget
from atmc.compress.factorize import Site, cut_ranks, factorize, sites, structure
from atmc.compress.projections import allocate_ranks
from atmc.compress.rate_control import Allocation, RateControl
from atmc.core.errors import unknown
from atmc.training.runner import Phase, Tensors
from atmc.training.settings import Recipe


@dataclass(frozen=True)
class Plan:
    """What a method needs to know.

    Args:
        nonzeros: k, the budget over all compressed tensors; where it is in bytes, a first guess.
        dense_weights: N, the entries of those tensors in the dense model.
        bits: bits per code, None for 32-bit values.
        recipe: the settings of the run.
        rate: holds a budget in bytes; None if the budget is a number of nonzeros.
    """

    nonzeros: int
    dense_weights: int
    bits: int | None
    recipe: Recipe
    rate: RateControl | None = field(default=None, repr=False)

    @property
    def codebook(self) -> bool:
        """Whether values are quantized, by a method that can: as many bits as given, or as rate control chooses."""
        return self.bits is not None or self.rate is not None


def atmc(plan: Plan) -> list[Phase]:
    """The whole method: l0 on W, then W = U V + C under the budget with ADMM's codebook, then the codebook's values.

    Without bits the middle stage is projected descent on the factors, the paper's ATMC-32bit; under a budget in bytes
    rate control chooses the bits of each tensor.
    """
    return [_dense(), _l0(plan), _held(plan, factored=True), _tune(plan.codebook)]


def al0(plan: Plan) -> list[Phase]:
    """l0 projection on W with a support free to move: no factors, no codebook."""
    return [_dense(), _l0(plan), _tune(False)]


def al0q(plan: Plan) -> list[Phase]:
    """`al0` with the codebook constraint on W: `atmc` without its factors."""
    return [_dense(), _l0(plan), _held(plan, factored=False), _tune(plan.codebook)]


def ap(plan: Plan) -> list[Phase]:
    """One-shot magnitude pruning of the robust dense model, then fine-tuning on that support."""

    return [_dense(), Phase("tune", constraint=_support, feasible=_pruned, starts_feasible=True, keeps_start=True)]


def alr(plan: Plan) -> list[Phase]:
    """Low rank: the largest singular values of all weights that fit the budget, then fine-tuning of the factors."""

    def cut(model: nn.Module) -> None:
        paths, values, costs = [], [], []
        for site in _rank_sites(model, plan.recipe.exclude):
            weight = getattr(site.module, site.parameter).detach()
            matrix = weight.reshape(weight.shape[0], -1).double()
            paths.append(site.path)
            values.append(torch.linalg.svdvals(matrix))
            costs.append(sum(matrix.shape))

        def cut_to(target: nn.Module, entries: int) -> nn.Module:
            ranks = allocate_ranks(values, costs, entries - _unfactored(model, plan.recipe.exclude))
            return cut_ranks(target, dict(zip(paths, ranks, strict=True)))

        entries = plan.nonzeros
        if plan.rate:
            measure, least = plan.rate.measure, floor_of("alr", model, plan.recipe.exclude)
            entries, _ = plan.rate.largest(
                lambda k: measure(cut_to(copy.deepcopy(model), k)), least, plan.dense_weights, start=max(entries, least)
            )
        cut_to(model, entries)

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
    "nap": al0,  # the same phases under the natural objective (see `recipe_of`)
    "da": da,
}
CODEBOOK_METHODS = ("atmc", "al0q")


def phases_of(method: str, plan: Plan) -> list[Phase]:
    """The phases of a method by name. Raises ValueError as `check_method`."""
    check_method(method, plan.bits, max_bytes=plan.rate is not None)
    return METHODS[method](plan)


def check_method(method: str, bits: int | None, *, max_bytes: bool = False) -> None:
    """ValueError for an unknown method (the nearest is named), bits without a codebook, or `al0q` without bits."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if bits is not None and method not in CODEBOOK_METHODS:
        raise ValueError(
            f"method {method!r} has no codebook: leave out bits, or use one of {', '.join(CODEBOOK_METHODS)}"
        )
    if bits is None and not max_bytes and method == "al0q":
        raise ValueError("method 'al0q' is al0 with a codebook: give bits")


def recipe_of(method: str, recipe: Recipe) -> Recipe:
    """Return the recipe that a method trains with: `nap` takes clean images, whatever the objective."""
    return replace(recipe, objective="natural", objective_options={}) if method == "nap" else recipe


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
    constraint = _shrinking(plan, lambda k: plan.dense_weights)
    return Phase("l0", constraint=constraint, feasible=_pruned)


def _pruned(given: Allocation) -> Constraint:
    return Allocation(given.nonzeros).constraint()


def _held(plan: Plan, *, factored: bool) -> Phase:
    """The budget, with a codebook ADMM beside it, and a validated model that satisfies both."""

    def enter(model: nn.Module) -> None:
        if factored:  # a checkpoint's factors stay as they are
            factorize(model, start=plan.recipe.factor_start, exclude=(*plan.recipe.exclude, *structure(model)))

    def admm(given: Allocation) -> Admm:
        assert given.bits is not None
        return Admm(Codebook(given.bits), rho=plan.recipe.rho, balance=plan.recipe.balance)

    constraint = _shrinking(plan, lambda k: max(k, min(int(plan.recipe.regrow * k), plan.dense_weights)))
    return Phase("admm", enter, constraint, Allocation.constraint, admm=admm if plan.codebook else None)


def _shrinking(
    plan: Plan, start: Callable[[int], int]
) -> Callable[[Tensors], Callable[[float, Allocation], Constraint]]:
    """A budget that falls cubically from start(k) to k while `gradual` of the phase goes by (Zhu and Gupta 2018)."""

    def at(done: float, given: Allocation) -> Constraint:
        k = given.nonzeros
        if done < plan.recipe.gradual:
            k += int((start(k) - k) * (1 - done / plan.recipe.gradual) ** 3)
        return NonzeroBudget(k, keep_alive=True)

    return lambda _: at


def _tune(codebook: bool) -> Phase:
    """Positions fixed; with a codebook codes too, so that only its values, biases and norms are learned."""
    return Phase("tune", constraint=_codes if codebook else _support, keeps_start=True)


def _support(start: Tensors) -> Callable[[float, Allocation], Constraint]:
    mask = FixedMask.support(start)
    return lambda _, __: mask


def _codes(start: Tensors) -> Callable[[float, Allocation], Constraint]:
    codes = FixedCodes.of(start)
    return lambda _, __: codes
