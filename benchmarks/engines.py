"""Time whole networks on the sparse engine and on every installed dense engine: one thread, batch sizes 1 and 64.

    python benchmarks/engines.py --out results/deploy [--only resnet18-uniform-99 ...]

Appends the figures of `atmc bench`, whose engines take turns, to the "sessions" of each case in engines.json. The cases
`uniform` and `layerwise` are random networks, seed 0. In `uniform` the percentage in the name is the share of zeros in
every convolution and linear layer, except in depthwise ones, which have no zeros; `layerwise` is a ResNet-34 with the
densities of the layers of the trained ResNet-18. The cases `trained` are files of results/.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import atmc
from atmc.commands.bench.bench import Benched, BenchRequest, bench
from atmc.commands.outputs import write_json

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
CIFAR, MNIST = DATA / "cifar10-jpeg", DATA / "mnist"
BATCHES = (1, 64)


@dataclass(frozen=True)
class Case:
    """A network to run; zeros: percentage of zeros among its weights."""

    network: str
    pattern: str
    zeros: float
    file: str = ""
    data: Path | None = None

    @property
    def name(self) -> str:
        """The name of the case, such as "resnet18-uniform-99"."""
        return f"{self.network}-{self.pattern}-{self.zeros:g}"


RESNETS = [Case(name, "uniform", zeros) for name in ("resnet18", "resnet34") for zeros in (90, 95, 99, 99.5)]
FILES = {
    90: "results/cifar10/brief-10/model.atmc",
    95: "results/cifar10/somebody-elses-checkpoint/model.atmc",
    99: "results/cifar10/brief-1/model.atmc",
    99.5: "results/cifar10/brief-05/model.atmc",
}
OTHERS = [Case("wrn-16-8", "uniform", zeros) for zeros in (90, 99)]
OTHERS += [Case("mobilenetv2", "uniform", zeros) for zeros in (90, 95)]  # at 99 no path from input to output is left
TRAINED = [Case("resnet18", "trained", zeros, file, CIFAR) for zeros, file in FILES.items()]
TRAINED += [Case("resnet34", "layerwise", zeros) for zeros in FILES]
TRAINED += [Case("lenet", "trained", 99.4, "results/mnist-adversarial/atmc8-006/model.atmc", MNIST)]
CASES = {case.name: case for case in [*RESNETS, *TRAINED, *OTHERS]}


@torch.no_grad()
def build_sparse(case: Case) -> nn.Module:
    """Build a network of the zoo with random zeros; its other weights are scaled, so that signals keep their size."""
    model = atmc.models.build(case.network, 10, input_shape=(3, 32, 32), seed=0).eval()
    noise, densities = torch.Generator().manual_seed(0), layer_densities(case)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "depthwise" not in name:
            density = densities[counterpart(name)] if densities else 1 - case.zeros / 100
            kept = max(1, round(parameter.numel() * density))
            mask = torch.zeros(parameter.numel())
            mask[torch.randperm(parameter.numel(), generator=noise)[:kept]] = math.sqrt(parameter.numel() / kept)
            parameter.mul_(mask.view(parameter.shape))
    return model


def layer_densities(case: Case) -> dict[str, float]:
    """Return, for `layerwise` cases, the densities of the layers of the ResNet-18 with this percentage of zeros."""
    if case.pattern != "layerwise":
        return {}
    trained = atmc.load(ROOT / FILES[case.zeros])
    return {name: float(p.count_nonzero()) / p.numel() for name, p in trained.named_parameters() if p.dim() > 1}


def counterpart(name: str) -> str:
    """Return the layer of a ResNet-18 for one of a ResNet-34: blocks after the second correspond to the second."""
    return re.sub(r"^(layer\d)\.\d+", lambda match: f"{match[1]}.{min(int(match[0][-1]), 1)}", name)


def measure(case: Case, *, reps: int, n: int) -> dict[str, Any]:
    """Run `atmc bench` on a case and return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        file = ROOT / case.file if case.file else Path(folder, "model.atmc")
        if not case.file:
            atmc.save(build_sparse(case), file)
        data = str(case.data) if case.data else None
        request = BenchRequest(
            file=file, data=data, threads=(1,), batches=BATCHES, reps=reps, n=n, unsimplified=bool(case.file)
        )
        for event in bench(request):
            if isinstance(event, Benched):
                figures = event.figures
    return figures | {"model": case.file or case.name, "data": case.data.name if case.data else None}


def read_cases(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one if the file does not exist yet."""
    cases: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return cases


def main() -> None:
    """Measure the cases that were named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "deploy")
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--reps", type=int, default=9)
    parser.add_argument("--n", type=int, default=500)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        case, figures = CASES[name], measure(CASES[name], reps=options.reps, n=options.n)
        cases = read_cases(options.out / "engines.json")
        row = {"network": case.network, "pattern": case.pattern, "zeros": case.zeros, "sessions": []}
        cases.setdefault(name, row)["sessions"].append(figures)
        write_json(options.out / "engines.json", cases)
        print(name, *figures["verdict"], sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
