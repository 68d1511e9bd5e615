"""Time the stages of a verification, one thread, and measure what the margin for rounding costs.

    python benchmarks/verify.py results/mnist-adversarial/atmc4-006/model.atmc --data DATA --out verify.json [--n 1000]

For each radius it writes the verdicts and the images per second of every stage, and how many images interval bounds
certify with the margin, without it (which proves nothing), and for PyTorch alone. It also writes how much wider the
margin makes the bounds of a single image, relative to the largest logit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import atmc
from atmc.commands.outputs import write_json
from atmc.data import mix_classes
from atmc.evaluation.verify.bounds import Box, Rounding, bound_logits
from atmc.evaluation.verify.executions import Execution, list_executions, prove_executions
from atmc.evaluation.verify.verify import verify
from atmc.pack import artifact
from atmc.robust.threats import Threat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--radii", nargs="+", default=["2/255", "8/255", "16/255", "76/255"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loaded = artifact.open(arguments.file)
    images = mix_classes(atmc.load_data(arguments.data).test).take(slice(0, arguments.n))
    x, labels = images.float_pixels(slice(None)), images.labels
    executions = list_executions(loaded.model, tuple(x.shape[1:]), loaded.factors)
    figures: dict[str, Any] = {"file": str(arguments.file), "data": Path(arguments.data).name, "n": len(images)}
    figures |= {"executions": len(executions), "margin": measure_margin(executions, x[:100]), "radii": []}
    for radius in arguments.radii:
        threat = atmc.parse_threat(f"linf:{radius}")
        result = verify(loaded.model, images, threat=threat, factors=loaded.factors)
        rates = {name: result.taken[name] / result.seconds[name] for name in result.stages if result.taken[name]}
        without = [replace(one, rounding=Rounding(outward=False)) for one in executions]
        compared = {"with_margin": executions, "without_margin": without, "pytorch_only": executions[:1]}
        certified = {name: count_certified(those, x, labels, threat) for name, those in compared.items()}
        rates = {name: round(rate, 1) for name, rate in rates.items()}
        row = {"threat": str(threat), "by_stage": result.by_stage, "undecided": result.verdicts.count("undecided")}
        figures["radii"].append({**row, "images_per_second": rates, "certified": certified})
        print(figures["radii"][-1])
    write_json(arguments.out, figures)


@torch.no_grad()
def count_certified(executions: Sequence[Execution], x: Tensor, labels: Tensor, threat: Threat) -> int:
    """Count the images that interval bounds certify."""
    batches = zip(torch.split(x, 100), torch.split(labels, 100), strict=True)
    return sum(int(prove_executions(executions, *batch, threat).sum()) for batch in batches)


@torch.no_grad()
def measure_margin(executions: Sequence[Execution], x: Tensor) -> list[float]:
    """Return, per execution, the largest half width of the bounds of single images over the largest logit."""
    shares = []
    for execution in executions:
        box = bound_logits(execution.graph, Box(x.double(), x.double()), execution.rounding)
        shares.append(float((box.upper - box.lower).max() / 2 / box.magnitude().max()))
    return shares


if __name__ == "__main__":
    main()
