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


def drop_unread(model: nn.Module, probe: Tensor) -> int:
    """Zero every parameter from which no path leads on, or to which none leads; in place. How many they are.

    A copy of the network is given random positive values wherever it has nonzeros, and bright images: nothing cancels
    and every unit wakes, so that a gradient of exactly zero means that there is no path. Should the model's logits on
    the probe (n, c, h, w) change all the same, nothing is done. No weight is emptied altogether.
    """
    parameters = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    bright = copy.deepcopy(model).double()
    noise = torch.Generator().manual_seed(0)
    copies = [p for p in bright.parameters() if p.requires_grad and p.is_floating_point()]
    with torch.no_grad():
        for parameter in copies:
            there = (parameter != 0).double()
            fan = there.flatten(1).sum(1).clamp_min(1).view(-1, *[1] * (there.dim() - 1)) if there.dim() > 1 else 1.0
            parameter.copy_(there * (0.5 + torch.rand(there.shape, generator=noise).to(there)) / fan)
    images = 0.9 + 0.1 * torch.rand(probe[:4].shape, generator=noise).to(probe)
    grads = _gradients(bright, copies, images.double())
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        logits = model(probe)
        dropped = 0
        for parameter, grad in zip(parameters, grads, strict=True):
            idle = (grad == 0) & (parameter != 0)
            if parameter.dim() > 1 and bool((idle == (parameter != 0)).all()):
                continue
            dropped += int(idle.sum())
            parameter.masked_fill_(idle, 0.0)
        if dropped and float((model(probe) - logits).abs().max()) > AGREEMENT * float(logits.abs().max()):
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
            return 0
    return dropped


def drop_asleep(model: nn.Module, probe: Tensor) -> int:
    """Zero the biases, scales and shifts that no image of the probe (n, c, h, w) feels; in place. How many they are.

    They belong to channels that never wake, or whose weights were all pruned: their gradient is exactly zero. Other
    images may feel them, hence the caller judges.
    """
    vectors = [p for p in model.parameters() if p.dim() == 1 and p.requires_grad]
    dropped = 0
    for vector, grad in zip(vectors, _gradients(model, vectors, probe), strict=True):
        idle = (grad == 0) & (vector != 0)
        dropped += int(idle.sum())
        with torch.no_grad():
            vector.masked_fill_(idle, 0.0)
    return dropped


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
