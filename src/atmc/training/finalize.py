"""After the last phase: choose what the file will hold, then validate the model for the last time.

All rounding is done here, so that saving is a pure function of the values: batch norm becomes a scale and a shift, each
weight takes the form of fewest bytes, dead weights become zero, floats become float16 unless that costs accuracy, and a
budget in bytes is met.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from atmc.compress.budget import Bits, distinct_nonzero, mean_bits, nominal_bits
from atmc.compress.factorize import compressible_parameters, compressible_weights, cut_ranks, fold
from atmc.compress.rate_control import Allocation, RateControl
from atmc.core.modules import copy_module, copy_state
from atmc.evaluation.statistics import Accuracy, compare
from atmc.models.batch_norm import make_affine
from atmc.pack.weight_forms import choose_shortest_forms
from atmc.training.dead_weights import zero_dead_weights
from atmc.training.loop import assign

CHANCE = 0.05  # the level of a test on validation images

Validate = Callable[[nn.Module], tuple[Accuracy, Accuracy]]


@dataclass(frozen=True)
class Size:
    """The size of the tensors under the budget.

    Args:
        nonzeros: over all tensors.
        nominal_bits: see `compress.budget.nominal_bits`.
        bits: per nonzero, the mean over nonzeros if tensors differ; None without a codebook.
    """

    nonzeros: int
    nominal_bits: int
    bits: float | None


@dataclass(frozen=True, kw_only=True)
class FinalChoices:
    """What `finalize` chose.

    Args:
        batch_norm: whether batch norm statistics were re-estimated.
        fp16: whether floating point values, codebooks included, were rounded to float16.
        clean, robust: validation accuracies of the model that is written.
        unrounded: clean and robust validation accuracy before rounding.
        size: of the model as it was trained, before the file's forms were chosen.
        dead_weights: number of weights and biases without effect that were set to zero.
        pruned: number of nonzeros that were removed at the end to meet a budget in bytes.
    """

    batch_norm: bool
    fp16: bool
    clean: Accuracy
    robust: Accuracy
    unrounded: tuple[Accuracy, Accuracy]
    size: Size
    dead_weights: int
    pruned: int = 0


def finalize(
    model: nn.Module,
    *,
    exclude: tuple[str, ...],
    bits: int | None,
    validate: Validate,
    score: Callable[[Accuracy, Accuracy], float],
    reestimate: Callable[[nn.Module], bool],
    rate: RateControl | None,
    probe: Tensor,
) -> tuple[nn.Module, FinalChoices]:
    """Turn the model into what will be written, in place; return it and the choices made.

    Batch norm is re-estimated if that raises the validation score. Values become float16 unless a validation accuracy
    falls by more than chance (`_costs_accuracy`), or if a budget in bytes leaves no room for float32. The model that is
    validated is what the file decodes to (`factorize.fold`), so that its accuracies are the file's.

    Args:
        model: trained; it stays factorized if that is shorter.
        exclude: shell patterns of weights that are not compressed.
        bits: of the codebooks, if they are given.
        validate: model -> clean and robust validation accuracy.
        score: clean and robust accuracy -> the number by which models are compared.
        reestimate: gives a model new batch norm statistics, in place; returns False if it has no batch norm.
        rate: the rate control of a budget in bytes; None if the budget is a number of nonzeros.
        probe: training images (n, c, h, w) for `zero_dead_weights`.

    Raises:
        RuntimeError: the values overflow float16 while the file is over its budget in float32.
    """
    reestimated = _reestimate_if_better(model, validate, score, reestimate)
    size = _measure_size(compressible_parameters(model, exclude=exclude), bits, rate)
    dead_weights = _simplify(model, probe)
    exact = validate(fold(model))
    choices = partial(FinalChoices, batch_norm=reestimated, unrounded=exact, size=size, dead_weights=dead_weights)
    unrounded = partial(choices, fp16=False, clean=exact[0], robust=exact[1])
    unrounded_values = copy_state(model.state_dict())
    rounded = copy_state(unrounded_values, _round_to_fp16)
    fits = rate is None or rate.file_bytes(model) <= rate.max_bytes
    if not all(bool(value.isfinite().all()) for value in rounded.values()):
        if not fits:
            raise RuntimeError("values are too large for float16, and in float32 the file is over its budget")
        return model, unrounded()
    model.load_state_dict(rounded)
    pruned = _prune_to_fit(model, exclude, rate) if rate else 0
    half = validate(fold(model))
    if fits and any(_costs_accuracy(before, after) for before, after in zip(exact, half, strict=True)):
        model.load_state_dict(unrounded_values)
        return model, unrounded()
    return model, choices(fp16=True, clean=half[0], robust=half[1], pruned=pruned)


def _costs_accuracy(before: Accuracy, after: Accuracy) -> bool:
    """Return whether fewer images are right after rounding, and by more than chance (McNemar's exact test, 5 %).

    Rounding turns a few images either way: if a single one decided, many files would hold float32 for nothing.
    """
    return before.accuracy > after.accuracy and compare(before.right, after.right).p < CHANCE


def _measure_size(tensors: Mapping[str, Tensor], bits: int | None, rate: RateControl | None) -> Size:
    """Return the size of the tensors; if rate control chose the bits, they are those that the values need."""
    code_bits: Bits = bits
    if rate and rate.most_bits is not None:
        code_bits = {name: max((distinct_nonzero(tensor) - 1).bit_length(), 1) for name, tensor in tensors.items()}
    nonzeros = sum(int(tensor.count_nonzero()) for tensor in tensors.values())
    return Size(nonzeros, nominal_bits(tensors, code_bits), mean_bits(tensors, code_bits))


def finalize_copy(model: nn.Module, probe: Tensor) -> nn.Module:
    """Return a copy of the model as `finalize` would leave it with float16: what rate control measures.

    Args:
        probe: training images (n, c, h, w) for `zero_dead_weights`.
    """
    final = copy_module(model).cpu()
    _simplify(final, probe.cpu())
    final.load_state_dict(copy_state(final.state_dict(), _round_to_fp16))
    return final


def _simplify(model: nn.Module, probe: Tensor) -> int:
    """Make norms affine, zero dead weights, give each weight its shortest form; return how many weights were dead."""
    make_affine(model).eval()
    dead = zero_dead_weights(model, probe)
    choose_shortest_forms(model)
    # once more: a row of W may be dead while V's row, which other rows share, is not
    return dead + zero_dead_weights(model, probe)


@torch.no_grad()
def smallest_model(model: nn.Module, exclude: tuple[str, ...], *, low_rank: bool = False) -> nn.Module:
    """Return a model whose file is about the longest among the smallest that a method can reach.

    Every layer has one nonzero, or one rank if the method prunes ranks; all other parameters are noise that no coder
    shortens.
    """
    small = make_affine(fold(model).cpu())
    weights = compressible_weights(small, exclude=exclude)
    if low_rank:
        cut_ranks(small, {weight.path: 1 for weight in weights if weight.factorable})
        weights = [weight for weight in weights if not weight.factorable]
    noise = torch.Generator().manual_seed(0)
    for parameter in small.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=noise).half())
    if not low_rank:
        for weight in weights:
            entries = weight.tensor.view(-1)
            last = float(entries[-1])
            entries.zero_()
            entries[-1] = last
    return small


def _reestimate_if_better(
    model: nn.Module,
    validate: Validate,
    score: Callable[[Accuracy, Accuracy], float],
    reestimate: Callable[[nn.Module], bool],
) -> bool:
    """Re-estimate batch norm, and undo it unless the validation score rises; return whether it was kept."""
    before = copy_state(model.state_dict())
    unchanged = copy_module(model)
    if not reestimate(model):
        return False
    if score(*validate(fold(model))) > score(*validate(fold(unchanged))):
        return True
    model.load_state_dict(before)
    return False


@torch.no_grad()
def _prune_to_fit(model: nn.Module, exclude: tuple[str, ...], rate: RateControl) -> int:
    """Prune the smallest values until the file fits; return how many were removed, which is nearly always none."""
    if rate.file_bytes(model) <= rate.max_bytes:
        return 0
    tensors = compressible_parameters(model, exclude=exclude)
    values: Mapping[str, Tensor] = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    nonzeros = sum(int(tensor.count_nonzero()) for tensor in values.values())

    def file_bytes(k: int) -> int:
        assign(tensors, Allocation(k).constraint().project(values))
        return rate.file_bytes(model)

    kept, _ = rate.largest_that_fits(file_bytes, min(rate.layers, nonzeros), nonzeros, start=nonzeros - 1)
    file_bytes(kept)
    return nonzeros - kept


def _round_to_fp16(value: Tensor) -> Tensor:
    """Round floating point values to float16; the dtype stays."""
    return value.half().to(value.dtype) if value.is_floating_point() else value
