"""Take a user's model for a run or an evaluation: what it is made of, what it returns, and in which layout it works."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from atmc.compress.factorize import use_channels_last
from atmc.core.arguments import check_module
from atmc.core.modules import copy_module, protect_input, unwrap
from atmc.data import Images
from atmc.evaluation.checks import looks_like_probabilities
from atmc.models.factory import USER_CODE_ERRORS, first_line
from atmc.robust.attacks import attack_mode


def accept_model(model: nn.Module, images: Images) -> nn.Module:
    """Return the module to work with: the user's own, or a copy of it if something about it must differ.

    A wrapper such as torch.compile's is removed. A copy is made of a model that changes its input (it then works on a
    copy of the input), that is in half or double precision, or that was made in inference mode.

    Raises:
        ValueError: no module, one whose weights do not exist yet, or one that cannot be copied.
    """
    check_module(model)
    model = unwrap(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        if is_lazy(tensor):
            raise ValueError(f"the model's {name} has no shape yet: call the model once, on one image")
        if tensor.is_meta:
            raise ValueError(f"the model's {name} has no values (device meta): load its weights first")
    floating = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    if any(tensor.dtype != torch.float32 or tensor.is_inference() for tensor in floating):
        model = copy_module(model).float()
    return protect_input(copy_module(model)) if _changes_input(model, images) else model


@torch.no_grad()
def _changes_input(model: nn.Module, images: Images) -> bool:
    """Return whether the model writes into the images that it is given; False if it does not take them at all."""
    x = _first_images(model, images)
    given = x.clone()
    try:
        with attack_mode(model):
            model(given)
    except USER_CODE_ERRORS:
        return False  # `check_model` says what is wrong
    return not torch.equal(given, x)


def _first_images(model: nn.Module, images: Images, n: int = 8) -> Tensor:
    """Return the first n images, (n, c, h, w) float32, on the model's device."""
    return images.float_pixels(torch.arange(min(n, len(images)), device=images.labels.device)).to(device_of(model))


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's parameters; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def prepare(model: nn.Module, images: Images) -> tuple[nn.Module, Images]:
    """Return the model in the fastest layout, copied if it changes, and the images on its device."""
    images = images.to(device_of(model))
    return (use_channels_last(copy_module(model)) if takes_channels_last(model, images) else model), images


@torch.no_grad()
def check_model(model: nn.Module, images: Images, classes: int | None, *, probabilities: bool = False) -> int:
    """Return the number of classes of a model that takes these images.

    Args:
        classes: the number of outputs that is expected; if None, there must be one for each label.
        probabilities: accept outputs that look like probabilities (the check `logits` reports them).

    Raises:
        ValueError: the model does not map such images to one finite logit per class.
    """
    x = _first_images(model, images)
    try:
        with attack_mode(model):
            output = model(x)
            alone = model(x[:1])
    except USER_CODE_ERRORS as error:
        raise ValueError(
            f"the model does not take images of shape {tuple(x.shape[1:])}: {first_line(error)}"
        ) from error
    for logits, count in ((output, len(x)), (alone, 1)):
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != count:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"expected logits of shape ({count}, classes) from the model, got {got}")
    if classes is not None and output.shape[1] != classes:
        raise ValueError(f"the model has {output.shape[1]} outputs, the data {classes} classes")
    if classes is None and output.shape[1] <= int(images.labels.max()):
        raise ValueError(f"the model has {output.shape[1]} outputs, the labels go up to {int(images.labels.max())}")
    if not bool(output.isfinite().all()):
        raise ValueError("the model's outputs are not finite numbers")
    if not probabilities and looks_like_probabilities(output):
        raise ValueError("the model's outputs look like probabilities: give logits, without a softmax at the end")
    return int(output.shape[1])


def takes_channels_last(model: nn.Module, images: Images) -> bool:
    """Return whether a forward and a backward pass work in channels_last, in which a model's ``x.view`` fails."""
    x = _first_images(model, images, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    try:
        trial = use_channels_last(copy_module(model))
        with attack_mode(trial), torch.enable_grad():
            torch.autograd.grad(trial(x).sum(), x)
    except (RuntimeError, ValueError):  # ValueError: it cannot be copied
        return False
    return True
