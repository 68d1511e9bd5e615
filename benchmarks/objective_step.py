"""Compare a training step of each objective with one of plain training, on a model of the zoo: seconds and ratios.

The model, the batch, float32 and the optimizer are the same for all. Blocks of five steps of the objectives in turn;
medians of --repeats blocks. `pgd_at` is what the others are compared with as well: an attack of --attack-steps steps.

    python benchmarks/objective_step.py --threads 1 --repeats 5 --out results/benchmarks/objective_step.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from atmc import Linf, models
from atmc.commands.bench.figures import processor_name
from atmc.core.rng import Noise
from atmc.models.zoo import ZOO
from atmc.robust.objectives import OBJECTIVES, TrainingAttack

STEPS = 5  # per block


def main() -> None:
    """Time the blocks, and print or write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="lenet", choices=sorted(ZOO))
    parser.add_argument("--objectives", nargs="+", default=["natural", "pgd_at", "ibp", "mtl_ibp"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--attack-steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = (1, 28, 28) if args.model.startswith("lenet") else (3, 32, 32)
    blocks: dict[str, list[float]] = {name: [] for name in args.objectives}
    for _ in range(args.repeats + 1):
        for name in args.objectives:
            blocks[name].append(time_block(name, args.model, shape, args.batch, args.attack_steps))
    seconds = {name: statistics.median(times[1:]) for name, times in blocks.items()}  # the first block warms up
    figures = {
        "model": args.model,
        "batch": args.batch,
        "attack_steps": args.attack_steps,
        "threads": args.threads,
        "repeats": args.repeats,
        "processor": processor_name(),
        "torch": torch.__version__,
        "seconds_per_step": {name: round(value, 5) for name, value in seconds.items()},
        "blocks": {name: [round(value, 5) for value in times[1:]] for name, times in blocks.items()},
        "over": {
            base: {name: round(value / seconds[base], 3) for name, value in seconds.items()}
            for base in ("natural", "pgd_at")
            if base in seconds
        },
    }
    text = json.dumps(figures, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


def time_block(objective: str, name: str, shape: tuple[int, int, int], batch: int, attack_steps: int) -> float:
    """Return the seconds per step of one block, on random images, of a model that starts from the same weights."""
    model = models.build(name, 10, seed=0).train()
    loss_of = OBJECTIVES[objective].build(OBJECTIVES[objective].fill_options(objective, None))
    attack = TrainingAttack(Linf(0.3 if shape[0] == 1 else 8 / 255), attack_steps)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(batch, *shape, generator=generator), torch.arange(batch) % 10
    began = time.perf_counter()
    for step in range(STEPS):
        perturb = attack.on(model, Noise(torch.arange(batch), seed=0, purpose="attack", epoch=step))
        optimizer.zero_grad(set_to_none=True)
        loss_of(model, x, y, perturb).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    return (time.perf_counter() - began) / STEPS


if __name__ == "__main__":
    main()
