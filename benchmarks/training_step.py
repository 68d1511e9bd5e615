"""Compare a training step of ATMC with a plain PGD-AT step of the same dense model: time and peak memory.

Both have the same batch size, attack, precision and optimizer. The ATMC step has the factors, the projection on the
nonzero budget, ADMM's penalty and, every tenth step, its update. Time: blocks of ten steps of either kind in turn,
medians of --repeats blocks. Memory: each kind in a process of its own, the increase of the peak resident set from the
moment before the model is built.

    python benchmarks/training_step.py --models lenet resnet18 --threads 2 --repeats 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from atmc import Linf, models
from atmc.commands.bench.figures import processor_name
from atmc.compress.admm import Admm
from atmc.compress.constraints import Codebook, NonzeroBudget
from atmc.compress.factorize import compressible_parameters, factorize
from atmc.compress.metric import Moments
from atmc.data import Images
from atmc.robust.objectives import TrainingAttack, pgd_at
from atmc.training.loop import Loop, StepDone, assign, cosine, fit
from atmc.training.settings import default_recipe

STEPS = 10  # per block; one update of ADMM each


def run_steps(kind: str, name: str, batch: int, attack_steps: int, bf16: bool) -> Iterator[StepDone]:
    """Yield training steps of one kind on random images, without end."""
    model = models.build(name, 10, seed=0).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    constraint, admm = None, None
    if kind == "atmc":
        dense = models.conv_linear_weights(model)
        factorize(model)
        budget = NonzeroBudget(dense // 100)
        tensors = compressible_parameters(model)
        assign(tensors, budget.project({key: value.detach() for key, value in tensors.items()}))
        constraint, admm = (lambda _: budget), Admm(Codebook(8))
    shape = (1, 28, 28) if name == "lenet" else (3, 32, 32)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch * STEPS, *shape), generator=generator).byte()
    images = Images(pixels, torch.arange(len(pixels)) % 10)
    optimizer: torch.optim.Optimizer
    if name == "lenet":
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    recipe = default_recipe(model, batch_size=batch, interval=STEPS, bf16=bf16)
    attack = TrainingAttack(Linf(0.3 if name == "lenet" else 8 / 255), attack_steps)
    yield from fit(
        model,
        images,
        Loop(recipe, cosine(1e-4)),
        objective=pgd_at,
        attack=attack,
        optimizer=optimizer,
        tensors=compressible_parameters(model),
        epochs=10**6,
        moments=Moments(),
        constraint=constraint,
        admm=admm,
    )


def time_block(run: Iterator[StepDone]) -> float:
    """Return the seconds per step of one block."""
    began = time.perf_counter()
    for _ in range(STEPS):
        next(run)
    return (time.perf_counter() - began) / STEPS


def measure_memory(kind: str, arguments: list[str]) -> int:
    """Return the peak bytes of one kind, measured in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", kind, *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_memory() -> int:
    """Return the peak resident set of this process in bytes (Linux; getrusage would include the parent)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Compare both kinds of step for one model."""
    bf16 = options.precision == "bf16"
    runs = {kind: run_steps(kind, name, options.batch, options.attack_steps, bf16) for kind in ("dense", "atmc")}
    for run in runs.values():
        time_block(run)
    blocks = [{kind: time_block(run) for kind, run in runs.items()} for _ in range(options.repeats)]
    ratios = [block["atmc"] / block["dense"] for block in blocks]
    arguments = ["--models", name, "--batch", str(options.batch), "--attack-steps", str(options.attack_steps)]
    arguments += ["--threads", str(options.threads), "--precision", options.precision]
    used = {kind: measure_memory(kind, arguments) for kind in ("dense", "atmc")}
    return {
        "model": name,
        "seconds_a_step": {k: round(statistics.median(b[k] for b in blocks), 4) for k in ("dense", "atmc")},
        "time_ratio": round(statistics.median(ratios), 3),
        "time_ratios": [round(ratio, 3) for ratio in ratios],
        "peak_memory_mb": {kind: round(value / 1e6) for kind, value in used.items()},
        "memory_ratio": round(used["atmc"] / used["dense"], 3),
    }


def main() -> None:
    """Compare the steps of each model, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["lenet", "resnet18"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--attack-steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--memory-of", choices=["dense", "atmc"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        before = peak_memory()
        bf16 = options.precision == "bf16"
        run = run_steps(options.memory_of, options.models[0], options.batch, options.attack_steps, bf16)
        for _ in range(3):
            next(run)
        print(peak_memory() - before)
        return
    machine = {
        "cpu": processor_name(),
        "threads": options.threads,
        "torch": torch.__version__,
        "precision": options.precision,
    }
    results = [compare(name, options) for name in options.models]
    report = {"machine": machine, "batch": options.batch, "attack_steps": options.attack_steps, "results": results}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
