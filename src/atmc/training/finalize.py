"""After the last phase: what the file will hold is decided, before the model is judged for the last time.

All rounding is done here, so that saving is a pure function of the values: batch norm becomes a scale and a shift, each
weight takes the form of fewest bytes, what has no effect becomes zero, floats become float16 where that costs nothing,
and a budget in bytes is met.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atmc.compress.budget import Bits, distinct_nonzero, mean_bits, nominal_bits
from atmc.compress.factorize import compressible_parameters, compressible_weights, cut_ranks, fold
from atmc.compress.rate_control import Allocation, RateControl
from atmc.evaluation.statistics import Accuracy
from atmc.models.batch_norm import to_affine
from atmc.pack.weight_forms import shorten
from atmc.training.dead_weights import zero_dead_weights
from atmc.training.loop import assign

Validate = Callable[[nn.Module], tuple[Accuracy, Accuracy]]


@dataclass(frozen=True)
class Size:
    """Nonzeros and nominal bits of the tensors under the budget (`factorize.compressible_parameters`), and bits of a code.

    bits is the mean over nonzeros where tensors differ, and None without a codebook.
    """

    nonzeros: int
    nominal_bits: int
    bits: float | None


@dataclass(frozen=True)
class FinalChoices:
    """The last choices, with the validation accuracies of the model that they led to.

    Args:
        batch_norm: statistics were estimated anew.
        fp16: floating point values were rounded to float16, codebooks included.
        unrounded: clean and robust validation accuracy before that.
        size: of the model as it was trained, before the file's forms were chosen.
        idle: values without effect that were set to zero, see `idle.zero_dead_weights`.
        pruned: nonzeros that were given up in the end for a budget in bytes.
    """

    batch_norm: bool
    fp16: bool
    clean: Accuracy
    robust: Accuracy
    unrounded: tuple[Accuracy, Accuracy]
    size: Size
    idle: int = 0
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
    """The model as it will be written, in place (still factorized where that is shorter), and what was decided.

    Batch norm is estimated anew where that raises the validation score; float16 is taken where neither validation
    accuracy falls, and where a budget in bytes leaves no room for more. Validated is what the file will decode to
    (`factorize.fold`), so that its figures are the file's.

    Args:
        bits: of the codebooks, where they are given.
        validate: model -> clean and robust validation accuracy.
        score: what is compared of two pairs of them.
        probe: some training images, for `idle`.
        reestimate: gives a model new batch norm statistics; False where it has none.
    """
    renewed = _renew_batch_norm(model, validate, score, reestimate)
    size = _counts(compressible_parameters(model, exclude=exclude), bits, rate)
    idle = _shortened(model, probe)
    exact = validate(fold(model))
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    rounded = {name: _to_fp16(value) for name, value in before.items()}
    fits = rate is None or rate.file_bytes(model) <= rate.max_bytes
    if not all(bool(value.isfinite().all()) for value in rounded.values()):
        if not fits:
            raise RuntimeError("values are too large for float16, and in float32 the file is over its budget")
        return model, FinalChoices(renewed, False, *exact, exact, size, idle)
    model.load_state_dict(rounded)
    pruned = _fit_bytes(model, exclude, rate) if rate else 0
    half = validate(fold(model))
    if fits and (half[0].accuracy < exact[0].accuracy or half[1].accuracy < exact[1].accuracy):
        model.load_state_dict(before)
        return model, FinalChoices(renewed, False, *exact, exact, size, idle)
    return model, FinalChoices(renewed, True, *half, exact, size, idle, pruned)


def _counts(tensors: Mapping[str, Tensor], bits: int | None, rate: RateControl | None) -> Size:
    """Nonzeros, nominal bits, and bits of a code; where rate control chose these, those that the values need."""
    held: Bits = bits
    if rate and rate.most_bits is not None:
        held = {name: max((distinct_nonzero(tensor) - 1).bit_length(), 1) for name, tensor in tensors.items()}
    nonzeros = sum(int(tensor.count_nonzero()) for tensor in tensors.values())
    return Size(nonzeros, nominal_bits(tensors, held), mean_bits(tensors, held))


def finalize_copy(model: nn.Module, probe: Tensor) -> nn.Module:
    """A copy as `finalize` would leave it if float16 were taken: what rate control measures; probe: images."""
    final = copy.deepcopy(model).cpu()
    _shortened(final, probe.cpu())
    final.load_state_dict({name: _to_fp16(value) for name, value in final.state_dict().items()})
    return final


def _shortened(model: nn.Module, probe: Tensor) -> int:
    """Norms affine, each weight in its shortest form, and zeros where nothing reads; how many these are."""
    to_affine(model).eval()
    idle = zero_dead_weights(model, probe)
    shorten(model)
    return idle + zero_dead_weights(model, probe)  # W's rows may be unread where V's, which other rows share, are not


@torch.no_grad()
def smallest_model(method: str, model: nn.Module, exclude: tuple[str, ...]) -> nn.Module:
    """About the largest of the smallest: one nonzero, or one rank, a layer, all else noise that no coder shortens."""
    small = to_affine(fold(model).cpu())
    places = compressible_weights(small, exclude=exclude)
    if method == "alr":
        cut_ranks(small, {site.path: 1 for site in places if site.factorable})
        places = [site for site in places if not site.factorable]
    noise = torch.Generator().manual_seed(0)
    for parameter in small.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=noise).half())
    if method != "alr":
        for site in places:
            weight = getattr(site.module, site.parameter).view(-1)
            last = float(weight[-1])
            weight.zero_()
            weight[-1] = last
    return small


def _renew_batch_norm(
    model: nn.Module,
    validate: Validate,
    score: Callable[[Accuracy, Accuracy], float],
    reestimate: Callable[[nn.Module], bool],
) -> bool:
    """New statistics where they score higher; whether they were taken."""
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    candidate = copy.deepcopy(model)
    if not reestimate(model):
        return False
    if score(*validate(fold(model))) > score(*validate(fold(candidate))):
        return True
    model.load_state_dict(before)
    return False


@torch.no_grad()
def _fit_bytes(model: nn.Module, exclude: tuple[str, ...], rate: RateControl) -> int:
    """Prune the smallest values until the file fits; how many were given up. Nearly always none."""
    if rate.file_bytes(model) <= rate.max_bytes:
        return 0
    tensors = compressible_parameters(model, exclude=exclude)
    held: Mapping[str, Tensor] = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    there = sum(int(tensor.count_nonzero()) for tensor in held.values())

    def length(k: int) -> int:
        assign(tensors, Allocation(k).constraint().project(held))
        return rate.file_bytes(model)

    kept, _ = rate.largest_that_fits(length, min(rate.layers, there), there, start=there - 1)
    length(kept)
    return there - kept


def _to_fp16(value: Tensor) -> Tensor:
    return value.half().to(value.dtype) if value.is_floating_point() else value
