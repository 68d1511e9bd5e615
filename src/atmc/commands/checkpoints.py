"""Somebody's weights into a model: .atmc, .safetensors, or a .pt read without unpickling objects."""

from __future__ import annotations

import copy
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from atmc.compress.factorize import assign_factors, restructure
from atmc.pack import artifact

UNREADABLE = (  # what torch.load raises on bytes that are no checkpoint, depending on where it stumbles
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    struct.error,
)


def load_weights(model: nn.Module, path: str, *, factorized: bool = False) -> None:
    """Fill a plain model from a checkpoint file, in place.

    Names may carry a leading ``module.``, as DataParallel leaves it. Normalization that the checkpoint does not hold
    stays the model's own.

    Args:
        factorized: where an .atmc file holds factors, keep them: the model becomes factorized as it was.

    Raises:
        ValueError: the file is missing, damaged, no state dict, or of another model.
    """
    if not Path(path).is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    if path.endswith(".atmc"):
        try:
            loaded = artifact.open(path, factory=lambda num_classes: copy.deepcopy(model))
        except artifact.ModelMismatch as error:  # without what it says of the factory, which is ours
            raise ValueError(f"checkpoint {path} is of another model: {error.__cause__ or error}") from error
        _fill(model, loaded.model.state_dict(), path)
        if factorized:
            factors = loaded.factors
            restructure(model, {name: (weight.form, weight.rank) for name, weight in factors.items()})
            assign_factors(
                model, {f"{n}.{part}": x for n, weight in factors.items() for part, x in weight.parts.items()}
            )
    elif path.endswith(".safetensors"):
        try:
            state = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"checkpoint {path} is damaged or not a safetensors file: {error}") from error
        _fill(model, state, path)
    else:
        _fill(model, _read_torch_file(path), path)


def _fill(model: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    wanted = model.state_dict()
    renamed = {name.removeprefix("module."): value for name, value in state.items()}
    for name, value in wanted.items():
        if name not in renamed and name.startswith("normalize."):
            renamed[name] = value
    problems = [f"{name} is missing" for name in wanted if name not in renamed]
    problems += [f"{name} is not in the model" for name in renamed if name not in wanted]
    problems += [
        f"{name} has shape {tuple(renamed[name].shape)}, not {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in renamed and renamed[name].shape != value.shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"checkpoint {path} is of another model: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(renamed)


def _read_torch_file(path: str) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint {path} is damaged or holds more than weights: {reason}") from error
    for key in ("state_dict", "model", "net"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not (isinstance(loaded, dict) and loaded and all(isinstance(value, Tensor) for value in loaded.values())):
        raise ValueError(f"checkpoint {path} holds no state dict of tensors")
    return loaded
