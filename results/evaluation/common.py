"""What the scripts of this folder share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import atmc
from atmc.data import Images
from atmc.evaluation import resume

BATCH = 250  # images attacked at once; AutoAttack's random numbers depend on it
NO_IMAGES = Images(torch.zeros(0, 1, 1, 1), torch.zeros(0, dtype=torch.int64))
HERE = Path(__file__).parent
RUNS = ["dense", "atmc32-0015", "atmc8-0015", "atmc32-006", "atmc8-006", "atmc4-006", "atmc32-01", "atmc8-01"]
RUNS += ["atmc32-05", "atmc8-05", "bytes-1528", "bytes-4519"]


def lenet(folder: Path) -> nn.Module:
    """The LeNet of a run folder."""
    return atmc.load(folder / "model.atmc")


def values(model: nn.Module) -> str:
    """A fingerprint of a model's values, whatever file they came from."""
    return resume.compute_fingerprint(model, NO_IMAGES, 0)[:16]


def state_path(folder: str | Path, run: Path, attack: str, *, left: bool = False) -> Path:
    """Where the state of an attack on a run lies; left: on what other attacks left."""
    return Path(folder) / f"{run.parent.name}-{run.name}-{attack}{'-left' if left else ''}.npz"


def mark_of(model: nn.Module, test: Images, n: int, threat: atmc.Threat, attack: str) -> str:
    """The fingerprint of such a state."""
    return resume.compute_fingerprint(model, test, n, threat=str(threat), attack=attack, seed=0, batch_size=BATCH)


def write(name: str, found: Any) -> None:
    """JSON beside this file."""
    path = HERE / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
