"""Whole networks on our engine and on every dense engine installed: one thread, batch 1 and 64, medians.

    python benchmarks/engines.py --out results/deploy [--only resnet18-uniform-99 ...]

Adds a session to each case in engines.json: the figures of `atmc bench`, whose engines take turns. Random networks,
seed 0, have exactly that share of zeros in every convolution and linear layer; the others are files of results/.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import atmc
from atmc.experiment.bench import Benched, Request, bench
from atmc.files import write_beside

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
CIFAR, MNIST = DATA / "cifar10-jpeg", DATA / "mnist"
BATCHES = (1, 64)


@dataclass(frozen=True)
class Case:
    """A network to run. zeros: their share, in percent."""

    network: str
    pattern: str
    zeros: float
    file: str = ""
    data: Path | None = None

    @property
    def name(self) -> str:
        """'resnet18-uniform-99'."""
        return f"{self.network}-{self.pattern}-{self.zeros:g}"


RESNETS = [Case(name, "uniform", zeros) for name in ("resnet18", "resnet34") for zeros in (90, 95, 99, 99.5)]
OTHERS = [Case(name, "uniform", zeros) for name in ("wrn-16-8", "mobilenetv2") for zeros in (90, 99)]
TRAINED = [
    Case("resnet18", "trained", 90, "results/cifar10/brief-10/model.atmc", CIFAR),
    Case("resnet18", "trained", 95, "results/cifar10/somebody-elses-checkpoint/model.atmc", CIFAR),
    Case("resnet18", "trained", 99, "results/cifar10/brief-1/model.atmc", CIFAR),
    Case("resnet18", "trained", 99.5, "results/cifar10/brief-05/model.atmc", CIFAR),
    Case("resnet34", "trained", 99, "results/cifar10/proof-resnet34/model.atmc", CIFAR),
    Case("lenet", "trained", 99.4, "results/mnist/atmc8-006/model.atmc", MNIST),
]
CASES = {case.name: case for case in [*RESNETS, *TRAINED, *OTHERS]}


@torch.no_grad()
def sparse(name: str, zeros: float) -> nn.Module:
    """A zoo network with that share of zeros, in percent, placed at random; the others scaled, so that signals live."""
    model = atmc.models.build(name, 10, input_shape=(3, 32, 32), seed=0).eval()
    noise = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            kept = max(1, round(parameter.numel() * (1 - zeros / 100)))
            mask = torch.zeros(parameter.numel())
            mask[torch.randperm(parameter.numel(), generator=noise)[:kept]] = math.sqrt(parameter.numel() / kept)
            parameter.mul_(mask.view(parameter.shape))
    return model


def measured(case: Case, *, reps: int, n: int) -> dict[str, Any]:
    """The figures of one session."""
    with tempfile.TemporaryDirectory() as folder:
        file = ROOT / case.file if case.file else Path(folder, "model.atmc")
        if not case.file:
            atmc.save(sparse(case.network, case.zeros), file)
        data = str(case.data) if case.data else None
        request = Request(file, data, threads=(1,), batches=BATCHES, reps=reps, n=n)
        for event in bench(request):
            if isinstance(event, Benched):
                figures = event.figures
    return figures | {"model": case.file or case.name, "data": case.data.name if case.data else None}


def update(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Read a JSON object, which may not be there yet, change it and write it."""
    found = json.loads(path.read_text()) if path.exists() else {}
    change(found)
    write_beside(path, (json.dumps(found, indent=1) + "\n").encode())


def main() -> None:
    """Measure every case that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "deploy")
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--reps", type=int, default=9)
    parser.add_argument("--n", type=int, default=500)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.only:
        case, figures = CASES[name], measured(CASES[name], reps=given.reps, n=given.n)
        about = {"network": case.network, "pattern": case.pattern, "zeros": case.zeros}

        def add(found: dict[str, Any], name: str = name, about: dict[str, Any] = about, new: Any = figures) -> None:
            found.setdefault(name, {**about, "sessions": []})["sessions"].append(new)

        update(given.out / "engines.json", add)
        print(name, *figures["verdict"], sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
