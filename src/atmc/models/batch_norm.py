"""Batch norm in a file: one scale and one shift a channel, beside the weights.

In evaluation mode batch norm is x * scale + shift, with scale = weight / sqrt(var + eps) and shift = bias - mean *
scale. `to_affine` moves the running statistics into weight and bias, so that they need not be stored. Multiplied into
the convolution before it, the scale would destroy its codebook; before an activation there is no convolution to take
it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _norms(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Batch norms that have both running statistics and a scale and shift."""
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.affine:
            yield path, module


def _implied(norm: _BatchNorm) -> dict[str, Tensor]:
    """The statistics of a norm that is affine: mean 0, and a variance that eps makes 1."""
    assert norm.running_mean is not None
    zero = torch.zeros(norm.running_mean.shape)
    return {
        "running_mean": zero,
        "running_var": zero + (1 - norm.eps),
        "num_batches_tracked": torch.tensor(0, dtype=torch.long),
    }


@torch.no_grad()
def to_affine(model: nn.Module) -> nn.Module:
    """Running statistics moved into weight and bias, in float64 and rounded once; in place, and returned.

    The model computes the same in evaluation mode, up to rounding. It is no longer fit for training: see
    `train.restore_batch_norm`.
    """
    for _, norm in _norms(model):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        shift = norm.bias.double() - norm.running_mean.double() * scale
        norm.weight.copy_(scale)
        norm.bias.copy_(shift)
        for name, value in _implied(norm).items():
            getattr(norm, name).copy_(value)
    return model


def is_affine(model: nn.Module) -> bool:
    """Whether there is batch norm, and all of it is as `to_affine` leaves it."""
    norms = [norm for _, norm in _norms(model)]
    return bool(norms) and all(
        torch.equal(getattr(norm, name).cpu(), value) for norm in norms for name, value in _implied(norm).items()
    )


def implied_statistics(model: nn.Module) -> dict[str, Tensor]:
    """State dict entries that need not be stored of a model whose norms are affine."""
    return {
        f"{path}.{name}".lstrip("."): value for path, norm in _norms(model) for name, value in _implied(norm).items()
    }
