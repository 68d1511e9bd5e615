"""Copy a user's module, take it out of its wrappers, and keep it from changing its input."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_UNCOPYABLE = (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError, pickle.PicklingError)
_DEPTH = 4  # of containers and objects in which a module's attribute may keep tensors


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside torch.compile's, (Distributed)DataParallel's and AveragedModel's wrappers.

    >>> inner = nn.Linear(2, 2)
    >>> unwrap(nn.DataParallel(inner)) is inner
    True
    """
    while True:
        if isinstance(model, nn.DataParallel | DistributedDataParallel | AveragedModel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def copy_module(model: nn.Module) -> nn.Module:
    """Return a deep copy of a module, without the history of tensors that it keeps as attributes.

    A module that stores activations cannot be copied by `copy.deepcopy` after a training pass. Tensors that were made
    in inference mode become ordinary ones, which can be trained.

    Raises:
        ValueError: something in the module cannot be copied.
    """
    memo: dict[int, Any] = {}
    with torch.inference_mode(False), torch.no_grad():
        for tensor in _kept_tensors(model):
            if tensor.grad_fn is not None:
                memo[id(tensor)] = tensor.detach().clone()
            elif tensor.is_inference():
                memo[id(tensor)] = _make_ordinary(tensor)
        try:
            return copy.deepcopy(model, memo)
        except _UNCOPYABLE as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"the model cannot be copied: {reason}; keep locks, open files and the like out of the module"
            ) from error


def copy_state(state: Mapping[str, Tensor], change: Callable[[Tensor], Tensor] = torch.clone) -> dict[str, Tensor]:
    """Copy a state dict with its modules' versions, which torch keeps beside the tensors.

    Args:
        change: tensor -> new tensor.
    """
    copied = OrderedDict((name, change(value.detach())) for name, value in state.items())
    if hasattr(state, "_metadata"):
        copied._metadata = state._metadata  # type: ignore[attr-defined]
    return copied


def protect_input(model: nn.Module) -> nn.Module:
    """Let a module work on a copy of its input, in place; return the module.

    Normalization in place, ``x.sub_(mean)``, would change the caller's images.
    """
    model.register_forward_pre_hook(_copy_inputs)
    return model


def _copy_inputs(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)


def _make_ordinary(tensor: Tensor) -> Tensor:
    """Return a tensor that was made in inference mode as an ordinary one, a parameter as a parameter."""
    ordinary = tensor.clone()
    return nn.Parameter(ordinary, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else ordinary


def _kept_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that a module holds: parameters, buffers and attributes, in containers too."""
    seen: set[int] = set()
    todo: list[tuple[Any, int]] = [(vars(module), 0) for module in model.modules()]
    while todo:
        value, depth = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif depth < _DEPTH:
            todo += [(inside, depth + 1) for inside in _contents(value)]


def _contents(value: object) -> list[Any]:
    """Return what a container or a plain object holds; nothing for a module, which is visited by itself."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set):
        return list(value)
    return list(vars(value).values()) if hasattr(value, "__dict__") and not isinstance(value, nn.Module | type) else []
