"""ATMC and the methods it is compared with: each is a short list of the same phases.

Source: Gui et al. 2019, section 4, which has all of them but `al0q`. docs/method.md says what each method is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from atmc.compress.admm import Admm
from atmc.compress.constraints import Codebook, Constraint, FixedCodes, FixedMask
from atmc.compress.factorize import CompressibleWeight, compressible_weights, cut_ranks, factor_structure, factorize
from atmc.compress.projections import allocate_ranks
from atmc.compress.rate_control import Allocation, RateControl
from atmc.compress.sparse_factors import factorize_if_it_pays
from atmc.core.errors import unknown
from atmc.core.modules import copy_module
from atmc.training.equalize import equalize
from atmc.training.runner import Phase, Tensors
from atmc.training.settings import PHASES, Recipe


@dataclass(frozen=True)
class Plan:
    """What a method needs to know to build its phases.

    Args:
        nonzeros: k, the budget over all compressed tensors; a first guess if the budget is in bytes.
        dense_weights: N, the entries of those tensors in the dense model.
        bits: bits per code; None for 32-bit values.
        recipe: the settings of the run.
        input_shape: (c, h, w) of the images.
        rate: the rate control of a budget in bytes; None if the budget is a number of nonzeros.
    """

    nonzeros: int
    dense_weights: int
    bits: int | None
    recipe: Recipe
    input_shape: tuple[int, int, int]
    rate: RateControl | None = field(default=None, repr=False)

    @property
    def codebook(self) -> bool:
        """Whether a method that has a codebook quantizes values: bits are given, or rate control chooses them."""
        return self.bits is not None or self.rate is not None


def atmc(plan: Plan) -> list[Phase]:
    """Build the phases of ATMC: l0, then ADMM's codebook, then the values of the codebook, on W = U V + C.

    With a sparse start the factors are there from the l0 phase on; with the identity or the SVD start they come after
    it, as in the paper. Without bits the middle phase is projected descent, the paper's ATMC-32bit; under a budget in
    bytes rate control chooses the bits of each tensor.
    """
    sparse = plan.recipe.factor_start == "sparse"
    return [
        _dense_phase(),
        _l0_phase(plan, factored=sparse),
        _admm_phase(plan, factored=not sparse),
        _tune_phase(plan.codebook),
    ]


def al0(plan: Plan) -> list[Phase]:
    """Build the phases of l0 projection on W with a support free to move: no factors, no codebook."""
    return [_dense_phase(), _l0_phase(plan), _tune_phase(False)]


def al0q(plan: Plan) -> list[Phase]:
    """Build the phases of `al0` with the codebook constraint on W: `atmc` without its factors."""
    return [_dense_phase(), _l0_phase(plan), _admm_phase(plan, factored=False), _tune_phase(plan.codebook)]


def ap(plan: Plan) -> list[Phase]:
    """Build the phases of one-shot magnitude pruning: prune the robust dense model, then fine-tune on that support."""
    prune = Phase(
        name="tune",
        enter=_equalization(plan),
        constraint=_keep_support,
        feasible=_prune,
        starts_feasible=True,
        keeps_start=True,
    )
    return [_dense_phase(), prune]


def alr(plan: Plan) -> list[Phase]:
    """Build the phases of the low-rank baseline: keep the largest singular values that fit, then fine-tune U and V."""

    def cut(model: nn.Module) -> None:
        paths, values, costs = [], [], []
        for weight in _factorable_weights(model, plan.recipe.exclude):
            matrix = weight.tensor.detach().flatten(1).double()
            paths.append(weight.path)
            values.append(torch.linalg.svdvals(matrix))
            costs.append(sum(matrix.shape))

        def cut_to(target: nn.Module, entries: int) -> nn.Module:
            ranks = allocate_ranks(values, costs, entries - _count_unfactored(model, plan.recipe.exclude))
            return cut_ranks(target, dict(zip(paths, ranks, strict=True)))

        entries = plan.nonzeros
        if plan.rate:
            projected_bytes = plan.rate.projected_bytes
            least = _entries_of_rank_one(model, plan.recipe.exclude)
            entries, _ = plan.rate.largest_that_fits(
                lambda k: projected_bytes(cut_to(copy_module(model), k)),
                least,
                plan.dense_weights,
                start=max(entries, least),
            )
        cut_to(model, entries)

    return [_dense_phase(), Phase(name="tune", enter=cut, keeps_start=True)]


def da(plan: Plan) -> list[Phase]:
    """Build the phase of adversarial training without compression."""
    return [_dense_phase()]


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """A method as users name it.

    Args:
        help: what it does, in one line.
        build: plan -> its phases.
        compresses: whether it has a budget; if not, it keeps every weight.
        codebook: whether it can quantize values.
        needs_codebook: whether it has to.
        factors: whether it trains W = U V + C, and takes the factors of a checkpoint as they are.
        low_rank: whether it prunes ranks instead of single entries.
        natural: whether it trains on clean images, whatever the objective.
        phases: the names of its phases.
    """

    help: str
    build: Callable[[Plan], list[Phase]]
    compresses: bool = True
    codebook: bool = False
    needs_codebook: bool = False
    factors: bool = False
    low_rank: bool = False
    natural: bool = False
    phases: tuple[str, ...] = PHASES

    def recipe(self, given: Recipe) -> Recipe:
        """Return the recipe that the method trains with."""
        return replace(given, objective="natural", objective_options={}) if self.natural else given

    def smallest_budget(self, model: nn.Module, exclude: tuple[str, ...] = ()) -> int:
        """Return the smallest number of nonzeros with which every layer keeps one entry, or one rank."""
        if not self.compresses:
            return 1
        if not self.low_rank:
            return len(compressible_weights(model, exclude=exclude))
        return _entries_of_rank_one(model, exclude)


METHODS: dict[str, MethodSpec] = {
    "atmc": MethodSpec(help="factors, budget and codebook", build=atmc, codebook=True, factors=True),
    "al0": MethodSpec(help="l0 projection alone", build=al0, phases=("dense", "l0", "tune")),
    "al0q": MethodSpec(help="al0 with a codebook", build=al0q, codebook=True, needs_codebook=True),
    "alr": MethodSpec(help="low rank", build=alr, low_rank=True, phases=("dense", "tune")),
    "ap": MethodSpec(help="one-shot mask", build=ap, phases=("dense", "tune")),
    "nap": MethodSpec(help="al0 on clean images", build=al0, natural=True, phases=("dense", "l0", "tune")),
    "da": MethodSpec(help="no compression", build=da, compresses=False, phases=("dense",)),
}


def keeps_every_weight(name: str) -> str:
    """Return the error for a budget that is given to a method without one."""
    return f"method {name!r} keeps every weight: leave out ratio, nonzeros, max_bytes and bits"


def find_method(name: str, bits: int | None = None, *, max_bytes: bool = False) -> MethodSpec:
    """Return a method by name.

    Args:
        bits: of the codebook that is asked for.
        max_bytes: whether the budget is in bytes, so that rate control chooses the bits.

    Raises:
        ValueError: the method is unknown, has no budget or no codebook for what is asked, or needs bits.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    spec = METHODS[name]
    if not spec.compresses and (bits is not None or max_bytes):
        raise ValueError(keeps_every_weight(name))
    if bits is not None and not spec.codebook:
        able = ", ".join(other for other, each in METHODS.items() if each.codebook)
        raise ValueError(f"method {name!r} has no codebook: leave out bits, or use one of {able}")
    if bits is None and not max_bytes and spec.needs_codebook:
        raise ValueError(f"method {name!r} is {spec.help}: give bits")
    return spec


def _entries_of_rank_one(model: nn.Module, exclude: tuple[str, ...]) -> int:
    """Return the number of entries of a model whose weights are factored with rank one, if they can be factored."""
    shapes = [weight.tensor.shape for weight in _factorable_weights(model, exclude)]
    return sum(shape[0] + shape[1:].numel() for shape in shapes) + _count_unfactored(model, exclude)


def _factorable_weights(model: nn.Module, exclude: tuple[str, ...]) -> list[CompressibleWeight]:
    """Return the weights that have a matrix to factor."""
    return [weight for weight in compressible_weights(model, exclude=exclude) if weight.factorable]


def _count_unfactored(model: nn.Module, exclude: tuple[str, ...]) -> int:
    """Count the entries of weights that have no matrix to factor (grouped convolutions) and stay dense."""
    weights = compressible_weights(model, exclude=exclude)
    return sum(weight.tensor.numel() for weight in weights if not weight.factorable)


def _dense_phase() -> Phase:
    """Build the phase that trains the plain model without a constraint."""
    return Phase(name="dense")


def _l0_phase(plan: Plan, *, factored: bool = False) -> Phase:
    """Build the phase that projects on a number of nonzeros, which falls from N to k over the first part.

    Args:
        factored: split off the sparse rank-one terms that pay before.
    """
    constraint = _shrink_budget(plan, lambda k: plan.dense_weights)

    def enter(model: nn.Module) -> None:
        if plan.recipe.equalize:
            equalize(model, plan.input_shape)
        if factored:
            profit = plan.recipe.factor_profit
            factorize_if_it_pays(model, plan.nonzeros, profit=profit, exclude=plan.recipe.exclude)

    return Phase(name="l0", enter=enter, constraint=constraint, feasible=_prune, shrinks=True)


def _equalization(plan: Plan) -> Callable[[nn.Module], object] | None:
    """Return what scales the layers to one norm before they are pruned, if the recipe asks for it."""
    return partial(equalize, input_shape=plan.input_shape) if plan.recipe.equalize else None


def _prune(allocation: Allocation) -> Constraint:
    """Return the constraint of k nonzeros, without a codebook."""
    return allocation.step_constraint(allocation.nonzeros)


def _admm_phase(plan: Plan, *, factored: bool) -> Phase:
    """Build the phase that trains under the budget while ADMM pulls towards a codebook.

    The model that is validated satisfies both constraints.
    """

    def enter(model: nn.Module) -> None:
        if factored:  # factors that came from a checkpoint stay as they are
            start = plan.recipe.factor_start
            assert start != "sparse"
            factorize(model, start=start, exclude=(*plan.recipe.exclude, *factor_structure(model)))

    def codebook(allocation: Allocation) -> Codebook:
        assert allocation.bits is not None
        return Codebook(allocation.bits)

    def admm(allocation: Allocation) -> Admm:
        return Admm(codebook(allocation), rho=plan.recipe.rho, balance=plan.recipe.balance)

    constraint = _shrink_budget(plan, lambda k: max(k, min(int(plan.recipe.regrow * k), plan.dense_weights)))
    return Phase(
        name="admm",
        enter=enter,
        constraint=constraint,
        feasible=Allocation.constraint,
        admm=admm if plan.codebook and plan.recipe.quantization != "straight-through" else None,
        straight_through=codebook if plan.codebook and plan.recipe.quantization == "straight-through" else None,
        keeps_support=not factored and plan.recipe.regrow == 1,
    )


def _shrink_budget(
    plan: Plan, start: Callable[[int], int]
) -> Callable[[Tensors], Callable[[float, Allocation], Constraint]]:
    """Return a constraint whose budget falls cubically from start(k) to k in the first `gradual` of the phase.

    The schedule is that of Zhu and Gupta 2018.
    """

    def at(done: float, allocation: Allocation) -> Constraint:
        k = allocation.nonzeros
        if done < plan.recipe.gradual:
            k += int((start(k) - k) * (1 - done / plan.recipe.gradual) ** 3)
        return allocation.step_constraint(k)

    return lambda _: at


def _tune_phase(codebook: bool) -> Phase:
    """Build the phase that trains at fixed positions, and at fixed codes if there is a codebook.

    With a codebook only its values, biases and norms are learned.
    """
    return Phase(name="tune", constraint=_keep_codes if codebook else _keep_support, keeps_start=True)


def _keep_support(start: Tensors) -> Callable[[float, Allocation], Constraint]:
    """Return the constraint that keeps the zeros with which the phase starts."""
    mask = FixedMask.support(start)
    return lambda _, __: mask


def _keep_codes(start: Tensors) -> Callable[[float, Allocation], Constraint]:
    """Return the constraint that keeps the zeros with which the phase starts, and which entries share a value."""
    codes = FixedCodes.of(start)
    return lambda _, __: codes
