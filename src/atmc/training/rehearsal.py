"""Try on a copy of a user's model, in seconds and before a run, what the run will do with it hours later."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atmc.core.modules import copy_module, copy_state
from atmc.core.torch_state import seeded_generators
from atmc.data import Images
from atmc.evaluation.user_model import device_of
from atmc.models.factory import USER_CODE_ERRORS, first_line
from atmc.robust.attacks import attack_mode
from atmc.training.loop import autocast


def rehearse(model: nn.Module, images: Images, *, bf16: bool = False) -> None:
    """Train a copy of a model for a step per batch size, copy it again, and restore its state; the model is unchanged.

    Args:
        model: as `evaluation.user_model.accept_model` returns it; `check_model` has passed.
        images: of which the first ones are used.
        bf16: whether the run trains in bfloat16.

    Raises:
        ValueError: what would fail in the run or after it, in a sentence.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("a TorchScript model cannot be compressed: give the torch.nn.Module that it was made of")
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"the model's state has {name}, a {type(value).__name__}: a model file holds tensors only; keep it as "
                "an attribute, or as a tensor"
            )
    trial = copy_module(model)
    sizes = [size for size in (2, 3) if size <= len(images)] or [1]
    device = device_of(model)
    for size in sizes:
        index = torch.arange(size, device=images.labels.device)
        x, y = images.float_pixels(index).to(device), images.labels[index].to(device)
        with seeded_generators(0, device):
            _train(trial, x, y, bf16=bf16)
    restored = copy_module(copy_module(trial))
    try:
        restored.load_state_dict(copy_state(model.state_dict()))
    except USER_CODE_ERRORS as error:
        raise ValueError(f"the model does not take its own state dict: {first_line(error)}") from error
    if not torch.allclose(_logits(model, x), _logits(restored, x), rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ValueError(
            "the model's state dict does not hold all that its outputs depend on: what training changes must be a "
            "parameter or a buffer"
        )


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    """Return the logits (n, classes) in evaluation mode; a model that draws random numbers draws the same each time."""
    with attack_mode(model), seeded_generators(0, x.device):
        logits: Tensor = model(x)
    return logits


def _train(model: nn.Module, x: Tensor, y: Tensor, *, bf16: bool) -> None:
    """Take one step of training in place."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with torch.enable_grad(), autocast(x.device, bf16):
            logits: object = model(x)
    except USER_CODE_ERRORS as error:
        raise ValueError(f"the model fails in training mode on {len(x)} images: {first_line(error)}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(
            f"expected logits of shape ({len(x)}, classes) from the model in training mode, too, got {got}; turn "
            "auxiliary heads off"
        )
    if not parameters:
        raise ValueError("expected parameters that can be trained; all of the model's are frozen (requires_grad=False)")
    try:
        loss = F.cross_entropy(logits.float(), y)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    except USER_CODE_ERRORS as error:
        raise ValueError(f"the model has no gradient in training mode: {first_line(error)}") from error
    if all(gradient is None for gradient in gradients):
        raise ValueError("no parameter of a copy of the model takes part in its outputs: forward may use another model")
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    torch.optim.SGD(parameters, lr=1e-6).step()
