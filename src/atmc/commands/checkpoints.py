"""Read checkpoints: weights from .atmc, .safetensors or torch files, and the state of an unfinished run."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor, nn

from atmc.commands.outputs import CHECKPOINT, LOG
from atmc.commands.state_dicts import UNREADABLE, fit_names, read_state_dict
from atmc.compress.factorize import apply_structure, assign_factors
from atmc.core.files import write_beside
from atmc.core.modules import copy_module, copy_state
from atmc.pack import artifact
from atmc.training.runner import State

STATE_VERSION = 2  # of a run's state; a run goes on only with code that gives its fields the same meaning


def load_weights(model: nn.Module, path: str, *, factorized: bool = False) -> None:
    """Fill a plain model from a checkpoint file, in place.

    `state_dicts` says what is found in a file. Normalization that the checkpoint does not hold stays the model's own.

    Args:
        factorized: keep the factors of an .atmc file, if it has any, so that the model is factorized again.

    Raises:
        ValueError: the file is missing, damaged, holds no state dict, or is of another model.
    """
    if not Path(path).is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    if path.endswith(".atmc"):
        try:
            loaded = artifact.open(path, factory=lambda num_classes: copy_module(model))
        except artifact.ModelMismatch as error:  # its text advises on the factory, which here is not the user's
            raise ValueError(f"checkpoint {path} is of another model: {error.__cause__ or error}") from error
        _fill(model, loaded.model.state_dict(), path)
        if factorized:
            weights = loaded.factors.items()
            apply_structure(model, {path: (weight.form, weight.rank) for path, weight in weights})
            assign_factors(
                model, {f"{path}.{part}": values for path, weight in weights for part, values in weight.parts.items()}
            )
    else:
        _fill(model, read_state_dict(path), path)


def _fill(model: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    """Load a state dict into a model, under the model's names; raise ValueError if it is of another model."""
    fitting = copy_state(model.state_dict())
    fitting.update(fit_names(state, model, path))
    model.load_state_dict(fitting)


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
