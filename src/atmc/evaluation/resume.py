"""The progress of an evaluation in a file, so that an interrupted one continues after its last saved batch.

The file is NumPy's npz without pickle. It holds, for each attack that was begun, the fields of `Verdicts`, and a
fingerprint of all that decides them: the model's values, the images and labels, the threat, attack, settings, seed and
batch size. The evaluation refuses a file with another fingerprint. The file is written under another name and renamed,
so that a kill while it is written leaves the old one.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from atmc.core.files import write_beside
from atmc.data import Images
from atmc.evaluation.verdicts import Verdicts

TENSORS = ("right", "fooled_by", "l2", "linf", "distance", "queue", "adv")
NUMBERS = ("start", "stage", "done", "refused")
SAVE_EVERY = 20.0  # seconds between two writes of a state, this one or that of another long measurement


def compute_fingerprint(model: nn.Module, images: Images, n: int, **settings: Any) -> str:
    """Return the SHA-256 of the model's values, the first n images with labels, and settings that JSON can hold."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(_bytes(value))
    digest.update(_bytes(images.pixels[:n]))
    digest.update(_bytes(images.labels[:n]))
    return digest.hexdigest()


def _bytes(values: Tensor) -> bytes:
    return values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def write_state(path: Path, progress: Mapping[str, tuple[str, Verdicts]]) -> None:
    """Write the progress of an evaluation, attack -> (fingerprint, verdicts), to a file."""
    arrays: dict[str, Any] = {"attacks": np.array(list(progress)), "marks": np.array([m for m, _ in progress.values()])}
    for position, (_, verdicts) in enumerate(progress.values()):
        arrays[f"{position}.numbers"] = np.array([getattr(verdicts, name) for name in NUMBERS])
        for name in TENSORS:
            value = getattr(verdicts, name)
            if value is not None:
                arrays[f"{position}.{name}"] = value.numpy()
    buffer = BytesIO()
    np.savez(buffer, **arrays)
    write_beside(path, buffer.getvalue())


def read_state(path: Path) -> dict[str, tuple[str, Verdicts]]:
    """Read what `write_state` saved: attack -> (fingerprint, verdicts).

    Raises:
        ValueError: the file holds something else.
    """
    assert {field.name for field in fields(Verdicts)} == {*TENSORS, *NUMBERS}
    try:
        with np.load(path, allow_pickle=False) as saved:
            names, marks = saved["attacks"].tolist(), saved["marks"].tolist()
            progress = {}
            for position, (name, mark) in enumerate(zip(names, marks, strict=True)):
                tensors = [key for key in TENSORS if f"{position}.{key}" in saved.files]
                values: dict[str, Any] = {key: torch.from_numpy(saved[f"{position}.{key}"]) for key in tensors}
                values |= dict(zip(NUMBERS, saved[f"{position}.numbers"].tolist(), strict=True))
                progress[name] = (mark, Verdicts(**values))
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not the state of an evaluation, or is damaged: {error}") from error
    return progress
