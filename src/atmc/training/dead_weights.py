"""Zero the weights and biases that have no effect on any image; zeros cost next to nothing in a file.

A network that was pruned to a few nonzeros has many of them: the weights of a unit that no later layer reads, and
those that read a unit without inputs. At 0.15 % of a LeNet they are a third of its largest layer. They are detected by
their gradients, so that the network's graph need not be known.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from atmc.core.modules import copy_module
from atmc.data import Images

AGREEMENT = 1e-5  # largest change of a logit over the largest |logit| that rounding may cause


def probe_images(images: Images, n: int = 64) -> Tensor:
    """Return the first n images, (n, c, h, w) float32 in [0, 1]."""
    return images.float_pixels(torch.arange(min(n, len(images)), device=images.labels.device))


def zero_dead_weights(model: nn.Module, probe: Tensor) -> int:
    """Zero every parameter that has no effect on any image, in place; return how many nonzeros that removes.

    No weight tensor becomes zero altogether. What changes the logits of the probe is undone, weights without a path and
    biases of inactive units each by themselves.

    Args:
        model: in evaluation mode, with affine batch norms (`models.batch_norm.make_affine`).
        probe: images (n, c, h, w).
    """
    parameters = _trainable(model)
    with torch.no_grad():
        logits = model(probe)
    total = 0
    for zero in (partial(_zero_disconnected, model, parameters), partial(_zero_inactive_biases, model)):
        before = [parameter.detach().clone() for parameter in parameters]
        count = zero(probe)
        with torch.no_grad():
            if count and float((model(probe) - logits).abs().max()) > AGREEMENT * float(logits.abs().max()):
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)
                count = 0
        total += count
    return total


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    """List the parameters that training changed: those that are frozen stay as they are."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.is_floating_point()]


def _zero_disconnected(model: nn.Module, parameters: list[nn.Parameter], probe: Tensor) -> int:
    """Zero parameters from which no path leads to a logit, or to which none leads from an image; return how many.

    A copy of the network gets random positive values in place of its nonzeros, and bright images: nothing cancels
    and every unit is active, so that a gradient of exactly zero means that there is no path.
    """
    positive = copy_module(model).double()
    noise = torch.Generator().manual_seed(0)
    copies = _trainable(positive)
    with torch.no_grad():
        for parameter in copies:
            mask = (parameter != 0).double()
            fan_in = mask.flatten(1).sum(1).clamp_min(1).view(-1, *[1] * (mask.dim() - 1)) if mask.dim() > 1 else 1.0
            parameter.copy_(mask * (0.5 + torch.rand(mask.shape, generator=noise).to(mask)) / fan_in)
    images = 0.9 + 0.1 * torch.rand(probe[:4].shape, generator=noise).to(probe)
    count = 0
    for parameter, grad in zip(parameters, _gradients(positive, copies, images.double()), strict=True):
        count += _zero(parameter, grad == 0)
    return count


def _zero_inactive_biases(model: nn.Module, probe: Tensor) -> int:
    """Zero the biases of units that have no weights left and are never active; return how many.

    Such a unit is constant, and its constant has no effect on the logits. A positive constant is left alone: a ReLU
    passes it on, and even if it has no gradient it may be what keeps a later unit off.
    """
    biases, weights = [], []
    for module in model.modules():
        bias, weight = getattr(module, "bias", None), getattr(module, "weight", None)
        if (
            isinstance(bias, nn.Parameter)
            and bias.requires_grad
            and isinstance(weight, Tensor)
            and weight.dim() > 1
            and len(bias) == len(weight)
        ):
            biases.append(bias)
            weights.append(weight.detach().flatten(1))
    grads = _gradients(model, biases, probe)
    return sum(
        _zero(bias, (grad == 0) & ~weight.any(1) & (bias.detach() < 0))
        for bias, weight, grad in zip(biases, weights, grads, strict=True)
    )


@torch.no_grad()
def _zero(parameter: nn.Parameter, dead: Tensor) -> int:
    """Zero the dead entries, unless they are all nonzeros of a weight; return how many nonzeros that removes."""
    dead = dead & (parameter != 0)
    if parameter.dim() > 1 and bool((dead == (parameter != 0)).all()):
        return 0
    parameter.masked_fill_(dead, 0.0)
    return int(dead.sum())


def _gradients(model: nn.Module, parameters: list[nn.Parameter], images: Tensor) -> list[Tensor]:
    """Return the gradients of a random positive combination of all logits; zeros if no path leads to them."""
    if not parameters:
        return []
    noise = torch.Generator().manual_seed(1)
    with torch.enable_grad():
        logits = model(images)
        weights = (0.5 + torch.rand(logits.shape, generator=noise)).to(logits)
        grads = torch.autograd.grad((logits * weights).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, grads, strict=True)]
