"""Check what a Python user hands over: each function returns it in the form that is used, or raises one sentence."""

from __future__ import annotations

import torch
from torch import nn


def parse_device(device: str | torch.device) -> torch.device:
    """Return the device that a name means.

    Raises:
        ValueError: no such kind of device, or torch sees no such CUDA device.

    >>> parse_device("cpu")
    device(type='cpu')
    """
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"expected a device such as 'cpu' or 'cuda', got {device!r}") from error
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {parsed} was asked for, but torch sees no such CUDA device here; use cpu")
    return parsed


def check_module(model: object) -> None:
    """Raise ValueError unless the model is a torch.nn.Module."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch.nn.Module, such as atmc.models.build makes, got {model!r:.80}")
