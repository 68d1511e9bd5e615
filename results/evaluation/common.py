"""What the scripts of this folder share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

import atmc
from atmc.experiment.weights import load_weights

HERE = Path(__file__).parent
RUNS = ["dense", "atmc32-0015", "atmc8-0015", "atmc32-006", "atmc8-006", "atmc4-006", "atmc32-01", "atmc8-01"]
RUNS += ["atmc32-05", "atmc8-05"]


def lenet(folder: Path) -> nn.Module:
    """The LeNet of a run folder: model.atmc, or its decoded values in model.safetensors (an older format's)."""
    values = folder / "model.safetensors"
    if not values.exists():
        return atmc.load(folder / "model.atmc")
    normalized = "digits" in folder.name
    model = atmc.models.build("lenet", 10, **({"mean": [0.5], "std": [0.5]} if normalized else {}))
    load_weights(model, str(values))
    return model.eval()


def write(name: str, found: Any) -> None:
    """JSON beside this file."""
    path = HERE / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
