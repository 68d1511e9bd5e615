"""Does a support that moves gain anything? (support.json)

LeNet on 20,000 MNIST images, objective `ibp`, method `al0`, 0.15 % of the weights, from results/mnist/dense, ten epochs
of `l0` and two of `tune`. The budget falls in the first half of `l0`, alike for all; the rules differ in what may enter
the support in the second half:

    fixed      nothing
    projected  what one step of Adam makes larger than the smallest survivor: the rule of `atmc compress`
    swap       every 50 steps the smallest nonzeros are exchanged for as many outsiders of largest gradient, which hold
               their places until the next exchange (RigL, Evci et al. 2020); the share falls along half a cosine to 0
    latent     dense weights are trained and pruned in every forward pass (DPF, Lin et al. 2020), over the whole phase

python results/defaults/support.py projected fixed swap-0.05 latent [--seeds 0 1] [--data ../shared/data/mnist]

With `--silent-steps 32000` no entry is silent (`compress/metric.py`), as before that rule existed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import atmc
from atmc.commands.outputs import write_json
from atmc.compress import metric as metric_module
from atmc.compress.constraints import NO_METRIC, Codebook, Constraint, NonzeroBudget
from atmc.compress.factorize import compressible_parameters
from atmc.compress.metric import Metric
from atmc.compress.rate_control import Allocation
from atmc.data import batch_count, load_data
from atmc.evaluation.accuracy import clean_accuracy, interval_accuracy
from atmc.training.methods import METHODS, Plan
from atmc.training.runner import Phase, Tensors

THREAT, RATIO, EVERY, L0_EPOCHS, BATCH = atmc.Linf(76 / 255), 0.0015, 50, 10, 128
KEY = ("rule", "seed", "silent", "rise")
DENSE = Path(__file__).parents[1] / "mnist" / "dense" / "model.atmc"


@dataclasses.dataclass
class Support:
    """The constraint of a step, with a memory: how far the phase is, what is in the support, and what ever entered it.

    Args:
        rule: one of those above; `share` is that of the nonzeros which `swap` exchanges at first.
        gradual: fraction of the phase in which the budget falls.
    """

    rule: str
    share: float
    gradual: float
    parameters: dict[str, nn.Parameter] = dataclasses.field(default_factory=dict)
    budget: NonzeroBudget = dataclasses.field(default_factory=lambda: NonzeroBudget(1))
    done: float = 0.0
    steps: int = 0
    masks: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    first: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    linear: bool = False

    def project(self, tensors: Mapping[str, Tensor], metric: Metric = NO_METRIC) -> dict[str, Tensor]:
        """Project on the budget while it falls; then as the rule says."""
        if self.done < self.gradual or self.rule == "projected":
            projected = self.budget.project(tensors, metric)
        else:
            self.steps += 1
            if self.rule == "swap" and self.steps % EVERY == 0:
                self._exchange(tensors, metric)
            projected = {name: tensor * self.masks[name] for name, tensor in tensors.items()}
        if self.rule != "swap" or self.done < self.gradual:  # entries that were let in are zero at first
            self.masks = {name: tensor != 0 for name, tensor in projected.items()}
        if self.done < self.gradual:
            self.first = self.masks
        return projected

    def _exchange(self, tensors: Mapping[str, Tensor], metric: Metric) -> None:
        """Let the smallest nonzeros go, and as many outsiders of largest gradient in."""
        k, left = self.budget.nonzeros, (1 - self.done) / (1 - self.gradual)
        count = int(self.share * k * (1 + math.cos(math.pi * (1 - left))) / 2)
        if not count:
            return
        held = {name: tensor * self.masks[name] for name, tensor in tensors.items()}
        kept = {n: t != 0 for n, t in NonzeroBudget(k - count, True).project(held, metric).items()}
        slopes = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.abs().masked_fill(kept[name], 0)
            for name, p in self.parameters.items()
        }
        grown = NonzeroBudget(k - sum(int(mask.sum()) for mask in kept.values())).project(slopes)
        self.masks = {name: kept[name] | (grown[name] != 0) for name in kept}

    def entered(self, tensors: Mapping[str, Tensor]) -> int:
        """Return how many of the present nonzeros were not there when the budget had just reached k."""
        return sum(int(((tensor != 0) & ~self.first[name]).sum()) for name, tensor in tensors.items())


def with_rule(phase: Phase, support: Support, steps: int) -> Phase:
    """Return the l0 phase, of so many steps, with the support's rule in place of its own constraint."""
    own = phase.constraint
    assert own is not None

    def enter(model: nn.Module) -> None:
        if phase.enter:
            phase.enter(model)
        support.parameters = dict(compressible_parameters(model))

    def constraint(start: Tensors) -> Callable[[float, Allocation], Constraint]:
        def at(done: float, allocation: Allocation) -> Constraint:
            support.done = done
            budget = own(start)(done, allocation)
            assert isinstance(budget, NonzeroBudget)
            support.budget = budget
            return support

        return at

    if support.rule != "latent":
        return dataclasses.replace(phase, enter=enter, constraint=constraint)

    def latent(allocation: Allocation) -> Codebook:
        return Latent(at=lambda done: own({})(done, allocation), steps=steps)

    return dataclasses.replace(phase, enter=enter, constraint=None, straight_through=latent)


@dataclasses.dataclass(frozen=True)
class Latent(Codebook):
    """Prunes to a budget that falls from call to call, as in the l0 phase, in place of rounding."""

    bits: int = 1
    at: Callable[[float], Constraint] = lambda _: NonzeroBudget(1)
    steps: int = 1
    calls: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def project(self, tensors: Mapping[str, Tensor], metric: Metric = NO_METRIC) -> dict[str, Tensor]:
        """Prune to the budget of this call."""
        return self.at(next(self.calls) / self.steps).project(tensors, metric)


def main() -> None:
    """Train with each rule, and write the accuracies on the validation images after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rules", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data", default="ylecun/mnist")
    parser.add_argument("--limit", type=int, default=20_000)
    parser.add_argument("--silent-steps", type=int, default=metric_module.SILENT_STEPS)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("support.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    metric_module.SILENT_STEPS = options.silent_steps
    data = load_data(options.data, limit=options.limit)
    plain, steps = METHODS["al0"], L0_EPOCHS * batch_count(len(data.train), BATCH)
    for name in options.rules:
        for seed in options.seeds:
            rule, _, share = name.partition("-")
            support = Support(rule, float(share or 0), gradual=0.5)

            def build(plan: Plan, support: Support = support) -> list[Phase]:
                return [
                    with_rule(phase, support, steps) if phase.name == "l0" else phase for phase in plain.build(plan)
                ]

            METHODS["al0"] = dataclasses.replace(plain, build=build)
            result = atmc.compress(
                atmc.load(DENSE),
                data.train,
                data.val,
                threat=THREAT,
                budget=atmc.Budget(ratio=RATIO),
                method="al0",
                objective="ibp",
                seed=seed,
                epochs={"dense": 0, "l0": L0_EPOCHS, "admm": 0, "tune": 2},
                learning_rate={"l0": 0.003, "tune": 0.0005},
                batch_size=BATCH,
                val_n=1000,
                eps_ramp=0.0,
            )
            tensors = compressible_parameters(result.model)
            row = {
                "rule": name,
                "seed": seed,
                "silent": "last" if options.silent_steps < steps else "kept",
                "rise": 3,
                "nonzeros": sum(int(t.count_nonzero()) for t in tensors.values()),
                "entered": support.entered(tensors) if support.first else None,
                "clean": clean_accuracy(result.model, data.val).to_json(),
                "certified": interval_accuracy(result.model, data.val, THREAT).to_json(),
            }
            rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
            rows = [old for old in rows if any(old[key] != row[key] for key in KEY)]
            write_json(options.out, {"rows": [*rows, row]})
            print(row, flush=True)


if __name__ == "__main__":
    main()
