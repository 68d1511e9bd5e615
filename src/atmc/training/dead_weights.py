"""What of a network has no effect, found without knowing its graph; zeros cost next to nothing in a file.

In a network pruned to a few nonzeros many of them serve nobody: the weights of a unit that no later layer reads, and
those that read a unit without inputs. At 0.15 % of a LeNet that is a third of its largest layer.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from atmc.data import Images

AGREEMENT = 1e-5  # of the largest logit: what rounding may change


def probe_images(images: Images, n: int = 64) -> Tensor:
    """The first n training images, (n, c, h, w) float32 in [0, 1]."""
    return images.float_pixels(torch.arange(min(n, len(images)), device=images.labels.device))


def zero_dead_weights(model: nn.Module, probe: Tensor) -> int:
    """Zero every parameter that has no effect on any image; in place. How many they are.

    The model is in evaluation mode, its batch norms affine (`pack.norms`). Should its logits on the probe (n, c, h, w)
    change all the same, nothing is done. No weight is emptied altogether.
    """
    parameters = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        logits = model(probe)
    dropped = _drop_unread(model, parameters, probe) + _drop_asleep(model, probe)
    with torch.no_grad():
        if dropped and float((model(probe) - logits).abs().max()) > AGREEMENT * float(logits.abs().max()):
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
            return 0
    return dropped


def _drop_unread(model: nn.Module, parameters: list[nn.Parameter], probe: Tensor) -> int:
    """Parameters from which no path leads to a logit, or to which none leads from an image.

    A copy of the network is given random positive values wherever it has nonzeros, and bright images: nothing cancels
    and every unit wakes, so that a gradient of exactly zero means that there is no path.
    """
    bright = copy.deepcopy(model).double()
    noise = torch.Generator().manual_seed(0)
    copies = [p for p in bright.parameters() if p.requires_grad and p.is_floating_point()]
    with torch.no_grad():
        for parameter in copies:
            there = (parameter != 0).double()
            fan = there.flatten(1).sum(1).clamp_min(1).view(-1, *[1] * (there.dim() - 1)) if there.dim() > 1 else 1.0
            parameter.copy_(there * (0.5 + torch.rand(there.shape, generator=noise).to(there)) / fan)
    images = 0.9 + 0.1 * torch.rand(probe[:4].shape, generator=noise).to(probe)
    dropped = 0
    for parameter, grad in zip(parameters, _gradients(bright, copies, images.double()), strict=True):
        dropped += _zero(parameter, grad == 0)
    return dropped


def _drop_asleep(model: nn.Module, probe: Tensor) -> int:
    """Biases of units that have no weights left and never wake: constant, and without effect as they are."""
    biases, weights = [], []
    for module in model.modules():
        bias, weight = getattr(module, "bias", None), getattr(module, "weight", None)
        if (
            isinstance(bias, nn.Parameter)
            and isinstance(weight, Tensor)
            and weight.dim() > 1
            and len(bias) == len(weight)
        ):
            biases.append(bias)
            weights.append(weight.detach().flatten(1))
    found = zip(biases, weights, _gradients(model, biases, probe), strict=True)
    return sum(_zero(bias, (grad == 0) & ~weight.any(1)) for bias, weight, grad in found)


@torch.no_grad()
def _zero(parameter: nn.Parameter, idle: Tensor) -> int:
    idle = idle & (parameter != 0)
    if parameter.dim() > 1 and bool((idle == (parameter != 0)).all()):
        return 0
    parameter.masked_fill_(idle, 0.0)
    return int(idle.sum())


def _gradients(model: nn.Module, parameters: list[nn.Parameter], images: Tensor) -> list[Tensor]:
    """Of a random positive combination of all logits; zeros where there is no path at all."""
    if not parameters:
        return []
    noise = torch.Generator().manual_seed(1)
    with torch.enable_grad():
        logits = model(images)
        weights = (0.5 + torch.rand(logits.shape, generator=noise)).to(logits)
        grads = torch.autograd.grad((logits * weights).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, grads, strict=True)]
