"""Time the stages of a verification, one thread, and measure what the margin for rounding costs.

    python benchmarks/verify.py FILE.atmc [FILE.atmc ...] --data DATA --out verify.json [--n 1000] [--searched 5]

For each file and radius it writes how many of the first n test images interval bounds certify with the margin, without
it (which proves nothing), and for PyTorch alone; and the images per second. It also writes how much wider the margin
makes the bounds of a single image, relative to the largest logit. At the largest radius, the first images that neither
intervals nor PGD decide go through the stages linear and complete; what these decide and their rates are of few images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import atmc
from atmc.commands.bench.figures import processor_name
from atmc.commands.outputs import write_json
from atmc.data import Images, mix_classes
from atmc.evaluation.verify.bounds import Box, Rounding, bound_logits
from atmc.evaluation.verify.executions import Execution, list_executions, prove_executions
from atmc.evaluation.verify.stages import UNDECIDED
from atmc.evaluation.verify.verify import Verification, verify
from atmc.pack import artifact
from atmc.pack.artifact import LoadedModel
from atmc.robust.threats import Threat

SEARCHED_AMONG = 200  # images that go through intervals and PGD, to find those for the stages after these


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--radii", nargs="+", default=["8/255", "76/255"])
    parser.add_argument("--searched", type=int, default=5, help="images for the stages linear and complete")
    parser.add_argument("--time-per-image", type=float, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = mix_classes(atmc.load_data(arguments.data).test).take(slice(0, arguments.n))
    threats = [atmc.parse_threat(f"linf:{radius}") for radius in arguments.radii]
    rows = []
    for path in arguments.files:
        loaded = artifact.open(path)
        row = {"file": str(path), **measure_intervals(loaded, images, threats)}
        row |= measure_searches(loaded, images, threats[-1], arguments.searched, arguments.time_per_image)
        print(row)
        rows.append(row)
    machine = {"processor": processor_name(), "threads": 1}
    write_json(arguments.out, {"data": Path(arguments.data).name, "n": len(images), "machine": machine, "files": rows})


def measure_intervals(loaded: LoadedModel, images: Images, threats: Sequence[Threat]) -> dict[str, Any]:
    """Return, for each radius, what interval bounds certify and how fast, and what the margin is."""
    x, labels = images.float_pixels(slice(None)), images.labels
    executions = list_executions(loaded.model, tuple(x.shape[1:]), loaded.factors)
    exact = [replace(execution, rounding=Rounding(outward=False)) for execution in executions]
    radii = []
    for threat in threats:
        began = time.monotonic()
        certified = {"with_margin": count_certified(executions, x, labels, threat)}
        rate = len(images) / (time.monotonic() - began)
        certified["without_margin"] = count_certified(exact, x, labels, threat)
        certified["pytorch_only"] = count_certified(executions[:1], x, labels, threat)
        radii.append({"threat": str(threat), "certified": certified, "images_per_second": round(rate, 1)})
    return {"executions": len(executions), "margin": measure_margin(executions, x[:100]), "interval": radii}


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


def measure_searches(
    loaded: LoadedModel, images: Images, threat: Threat, searched: int, time_per_image: float
) -> dict[str, Any]:
    """Return what each stage decides, and its images per second; linear and complete take `searched` images."""
    first = verify(loaded.model, images.take(slice(0, SEARCHED_AMONG)), threat=threat, factors=loaded.factors)
    rows = [row for row, verdict in enumerate(first.verdicts) if verdict == UNDECIDED][:searched]
    stages = describe_stages(first, first.stages)
    if rows:
        second = verify(
            loaded.model, images.take(rows), threat=threat, time_per_image=time_per_image, factors=loaded.factors
        )
        stages |= describe_stages(second, [name for name in second.stages if name not in first.stages])
    return {"threat": str(threat), "time_per_image": time_per_image, "stages": stages}


def describe_stages(result: Verification, names: Sequence[str]) -> dict[str, Any]:
    """Return for each stage that took images how many it took and decided, and its images per second."""
    return {
        name: {
            "images": result.taken[name],
            "decided": result.by_stage[name],
            "images_per_second": float(f"{result.taken[name] / result.seconds[name]:.3g}"),
        }
        for name in names
        if result.taken[name]
    }


if __name__ == "__main__":
    main()
