"""What a Python user hands over, made into what is meant, or refused in one sentence."""

from __future__ import annotations

import torch
from torch import nn

from atmc.compress.budget import Budget
from atmc.robust.threats import Threat, parse_threat


def as_threat(threat: object) -> Threat:
    """A threat, from its text too. ValueError for anything else.

    >>> str(as_threat("l2:0.5"))
    'l2:0.5'
    """
    if isinstance(threat, str):
        return parse_threat(threat)
    missing = [name for name in ("eps", "random_start", "ascent", "project") if not hasattr(threat, name)]
    if missing:
        raise ValueError(f"expected a threat such as Linf(8 / 255) or 'linf:8/255', got {threat!r:.80}")
    return threat  # type: ignore[return-value]


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


def expect_budget(budget: object) -> None:
    """ValueError for what is no budget."""
    if not isinstance(budget, Budget):
        raise ValueError(f"expected a budget such as Budget(ratio=0.01, bits=4), got {budget!r:.80}")
