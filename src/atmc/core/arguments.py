"""What a Python user hands over, made into what is meant, or refused in one sentence."""

from __future__ import annotations

import torch
from torch import nn


def as_device(device: str | torch.device) -> torch.device:
    """A device that is here. ValueError otherwise.

    >>> as_device("cpu")
    device(type='cpu')
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"expected a device such as 'cpu' or 'cuda', got {device!r}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {found} was asked for, but torch sees no such CUDA device here; use cpu")
    return found


def expect_module(model: object) -> None:
    """ValueError for what is no module."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch.nn.Module, such as atmc.models.build makes, got {model!r:.80}")
