"""Bring batch norm into the form that a file stores: one scale and one shift per channel.

In evaluation mode batch norm is x * scale + shift, with scale = weight / sqrt(var + eps) and shift = bias - mean *
scale. `make_affine` moves the running statistics into weight and bias, so that they need not be stored. The scale is
not multiplied into the convolution before it, since that would destroy the convolution's codebook, and a batch norm
before a convolution has none to be multiplied into.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def _batch_norms(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Yield path and module of every batch norm that has running statistics and a scale and shift."""
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.affine:
            yield path, module


def _affine_form(norm: _BatchNorm) -> dict[str, Tensor]:
    """Return the statistics under which a batch norm is x * weight + bias: mean 0 and variance 1 - eps."""
    assert norm.running_mean is not None
    zero = torch.zeros(norm.running_mean.shape)
    return {
        "running_mean": zero,
        "running_var": zero + (1 - norm.eps),
        "num_batches_tracked": torch.tensor(0, dtype=torch.long),
    }


@torch.no_grad()
def make_affine(model: nn.Module) -> nn.Module:
    """Move the running statistics into weight and bias, in float64 and rounded once; in place, return the model.

    The model computes the same in evaluation mode, up to rounding. It must not be trained further before
    `training.batch_norm.restore_batch_norm` has measured the statistics again.
    """
    for _, norm in _batch_norms(model):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        shift = norm.bias.double() - norm.running_mean.double() * scale
        norm.weight.copy_(scale)
        norm.bias.copy_(shift)
        for name, value in _affine_form(norm).items():
            getattr(norm, name).copy_(value)
    return model


def is_affine(model: nn.Module) -> bool:
    """Return whether the model has batch norm, all of it in the form that `make_affine` gives it."""
    norms = [norm for _, norm in _batch_norms(model)]
    return bool(norms) and all(
        torch.equal(getattr(norm, name).cpu(), value) for norm in norms for name, value in _affine_form(norm).items()
    )


def affine_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the entries of the state dict that need not be stored if all batch norm is affine, path -> value."""
    return {
        f"{path}.{name}".lstrip("."): value
        for path, norm in _batch_norms(model)
        for name, value in _affine_form(norm).items()
    }
