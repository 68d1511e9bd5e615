"""What the scripts of this folder share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

import atmc

HERE = Path(__file__).parent
RUNS = ["dense", "atmc32-0015", "atmc8-0015", "atmc32-006", "atmc8-006", "atmc4-006", "atmc32-01", "atmc8-01"]
RUNS += ["atmc32-05", "atmc8-05", "bytes-1528", "bytes-4519"]


def lenet(folder: Path) -> nn.Module:
    """The LeNet of a run folder."""
    return atmc.load(folder / "model.atmc")


def write(name: str, found: Any) -> None:
    """JSON beside this file."""
    path = HERE / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
