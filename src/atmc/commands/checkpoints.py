"""Read checkpoints: weights from .atmc, .safetensors or .pt files, and the state of an unfinished run.

A .pt file is read with ``weights_only=True``, which unpickles no objects.
"""

from __future__ import annotations

import copy
import pickle
import struct
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from atmc.commands.outputs import CHECKPOINT, LOG
from atmc.compress.factorize import apply_structure, assign_factors
from atmc.core.files import write_beside
from atmc.pack import artifact
from atmc.training.runner import State

STATE_VERSION = 2  # of a run's state; a run goes on only with code that gives its fields the same meaning
UNREADABLE = (  # the errors of torch.load on bytes that are no checkpoint
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
        factorized: keep the factors of an .atmc file, if it has any, so that the model is factorized again.

    Raises:
        ValueError: the file is missing, damaged, holds no state dict, or is of another model.
    """
    if not Path(path).is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    if path.endswith(".atmc"):
        try:
            loaded = artifact.open(path, factory=lambda num_classes: copy.deepcopy(model))
        except artifact.ModelMismatch as error:  # its text advises on the factory, which here is not the user's
            raise ValueError(f"checkpoint {path} is of another model: {error.__cause__ or error}") from error
        _fill(model, loaded.model.state_dict(), path)
        if factorized:
            weights = loaded.factors.items()
            apply_structure(model, {path: (weight.form, weight.rank) for path, weight in weights})
            assign_factors(
                model, {f"{path}.{part}": values for path, weight in weights for part, values in weight.parts.items()}
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
    """Load a state dict into a model; raise ValueError if names or shapes differ."""
    own = model.state_dict()
    renamed = {name.removeprefix("module."): value for name, value in state.items()}
    for name, value in own.items():
        if name not in renamed and name.startswith("normalize."):
            renamed[name] = value
    problems = [f"{name} is missing" for name in own if name not in renamed]
    problems += [f"{name} is not in the model" for name in renamed if name not in own]
    problems += [
        f"{name} has shape {tuple(renamed[name].shape)}, not {tuple(value.shape)}"
        for name, value in own.items()
        if name in renamed and renamed[name].shape != value.shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"checkpoint {path} is of another model: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(renamed)


def _read_torch_file(path: str) -> dict[str, Tensor]:
    """Return the state dict of a .pt file, as it is or under a usual key; raise ValueError if there is none."""
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


def write_run_state(folder: Path, state: State, seconds: float) -> None:
    """Write a run's state after an epoch, with the number of lines that its log has and the seconds spent so far."""
    buffer = BytesIO()
    lines = len((folder / LOG).read_text().splitlines())
    torch.save({"version": STATE_VERSION, "state": vars(state), "log_lines": lines, "seconds": seconds}, buffer)
    (folder / CHECKPOINT).mkdir(exist_ok=True)
    write_beside(_state_path(folder), buffer.getvalue())


def read_run_state(folder: Path) -> tuple[State | None, float]:
    """Return a run's saved state (None if there is none) and the seconds spent; cut its log back to the state's epoch.

    Raises:
        ValueError: the checkpoint is damaged, or was written by code of another `STATE_VERSION`.
    """
    path, log = _state_path(folder), folder / LOG
    if not path.exists():
        log.unlink(missing_ok=True)
        return None, 0.0
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        version, lines, seconds = int(saved.get("version", 1)), int(saved["log_lines"]), float(saved["seconds"])
        state = State(**saved["state"]) if version == STATE_VERSION else None
    except UNREADABLE as error:
        raise ValueError(f"the run's own checkpoint {path} is damaged: start again with --overwrite") from error
    if state is None:
        age = "an older" if version < STATE_VERSION else "a newer"
        raise ValueError(
            f"{folder} was begun by {age} version of atmc: finish it with that one, or start again with --overwrite"
        )
    kept = log.read_text().splitlines(keepends=True)[:lines] if log.exists() else []
    write_beside(log, "".join(kept).encode())
    return state, seconds


def _state_path(folder: Path) -> Path:
    return folder / CHECKPOINT / "state.pt"
