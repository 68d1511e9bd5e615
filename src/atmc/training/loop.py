"""fit(): projected stochastic gradient descent on an adversarial loss, with an optional ADMM pull towards a codebook.

Each step attacks a batch, takes one gradient step, projects on the constraint and takes ADMM's proximal step; every
`interval` steps ADMM's copy and dual are refreshed (Gui et al. 2019, algorithm 1). This module reads neither
configuration nor disk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from atmc.compress.admm import Admm
from atmc.compress.constraints import NO_METRIC, Codebook, Constraint
from atmc.compress.factorize import cached_weights
from atmc.compress.metric import Metric, Moments, measure_metric
from atmc.core.rng import Noise, derived_seed
from atmc.core.torch_state import seeded_generators
from atmc.data import Batch, Images, batch_count, batches
from atmc.robust.objectives import Objective, TrainingAttack
from atmc.training.settings import Recipe

Schedule = Callable[[float], float]


class TrainingDiverged(RuntimeError):
    """The loss is not a finite number."""


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """The progress of training after a step.

    Args:
        epoch, step: of `epochs` and `steps`, counted from 1.
        loss: the epoch's mean so far.
        seconds: since the epoch began.
        admm: the state of ADMM after the step, if there is one.
        phase: the name of the phase; `fit` leaves it empty, and `Runner` fills it in.
        fraction: the part of all the run's epochs that is done; likewise.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    seconds: float
    admm: Admm | None
    phase: str = ""
    fraction: float = 0.0

    @property
    def epoch_done(self) -> bool:
        """Whether this was the epoch's last step."""
        return self.step == self.steps


@dataclass(frozen=True)
class Loop:
    """How one phase goes through the data.

    Args:
        recipe: the settings of the run.
        learning_rate: fraction of the phase that is done, in [0, 1) -> learning rate.
        eps_ramp: epochs in which the training attack's ball grows to full size; 0 outside the dense phase.
        seed: keys every random draw of the phase, together with epoch and example.
    """

    recipe: Recipe
    learning_rate: Schedule
    eps_ramp: float = 0.0
    seed: int = 0

    def batches(self, train: Images, epoch: int) -> Iterator[Batch]:
        """Yield one epoch's batches, with the images in the memory layout of the run."""
        recipe = self.recipe
        for batch in batches(train, recipe.batch_size, seed=self.seed, epoch=epoch, augment=recipe.augment):
            if recipe.channels_last:
                yield replace(batch, x=batch.x.contiguous(memory_format=torch.channels_last))
            else:
                yield batch


def fit(
    model: nn.Module,
    train: Images,
    loop: Loop,
    *,
    objective: Objective,
    attack: TrainingAttack,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, nn.Parameter],
    epochs: int,
    start: int = 0,
    moments: Moments,
    constraint: Callable[[float], Constraint] | None = None,
    admm: Admm | None = None,
    straight_through: Codebook | None = None,
    held: float = 0.0,
) -> Iterator[StepDone]:
    """Train the model in place, from epoch `start` (counted from 0) on; yield after every step.

    Args:
        model: in any mode; it is in training mode during the steps.
        objective: the loss.
        attack: makes the adversarial images that the loss asks for.
        tensors: the constrained parameters, name -> parameter.
        epochs: of the phase, those before `start` included.
        moments: mean squared gradients of the tensors, updated in place.
        constraint: fraction of the phase done -> what the tensors must satisfy after the step.
        admm: the state to start from; the current state comes with every `StepDone`.
        straight_through: the loss and its gradient are those of the tensors rounded to this codebook.
        held: fraction of the phase in which entries of the tensors that are zero stay zero.

    Raises:
        TrainingDiverged: the loss is not finite.
    """
    steps = batch_count(len(train), loop.recipe.batch_size)
    recipe = loop.recipe
    for epoch in range(start, epochs):
        began, total = time.perf_counter(), 0.0
        model.train()
        for step, batch in enumerate(loop.batches(train, epoch)):
            done = (epoch + step / steps) / epochs
            for group in optimizer.param_groups:
                group["lr"] = loop.learning_rate(done)
            # attack, which the objective calls
            ramp = min(1.0, (epoch + (step + 1) / steps) / loop.eps_ramp) if loop.eps_ramp else 1.0
            noise = Noise(batch.index, seed=loop.seed, purpose="attack", epoch=epoch)
            perturb = attack.on(model, noise, eps_scale=ramp)
            # gradient step
            optimizer.zero_grad(set_to_none=True)
            metric = current_metric(model, tensors, moments, recipe) if straight_through else NO_METRIC
            seeded = seeded_generators(derived_seed(loop.seed, epoch, step), batch.x.device)
            with seeded, rounded(tensors, straight_through, metric), cached_weights(model):
                with autocast(batch.x.device, recipe.bf16):
                    loss = objective(model, batch.x, batch.y, perturb)
                loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            if not math.isfinite(total):
                raise TrainingDiverged(f"the loss became {total} in epoch {epoch + 1}; try a lower learning rate")
            if recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            allowed = constraint(done) if constraint is not None else None
            if allowed is not None and not allowed.linear:
                moments.update(tensors)
            if admm is not None and recipe.quantization == "gradient":
                admm.add_penalty_gradient(tensors)
            if allowed is not None and allowed.linear:  # before Adam, which would take another step for every entry
                gradients = {name: t.grad for name, t in tensors.items() if t.grad is not None}
                assign(gradients, allowed.project(gradients))
            support = {name: t.detach() != 0 for name, t in tensors.items()} if done < held else {}
            optimizer.step()
            # projection
            for name, mask in support.items():
                tensors[name].detach().mul_(mask)
            if allowed is not None:
                metric = current_metric(model, tensors, moments, recipe)
                assign(tensors, allowed.project({name: t.detach() for name, t in tensors.items()}, metric))
            # ADMM
            if admm is not None:
                if recipe.quantization == "proximal":
                    admm.pull(tensors, loop.learning_rate(done))
                if (epoch * steps + step) % recipe.interval == 0:
                    admm = admm.step(tensors, metric.rounding)
            yield StepDone(
                epoch=epoch + 1,
                epochs=epochs,
                step=step + 1,
                steps=steps,
                loss=total / (step + 1),
                seconds=time.perf_counter() - began,
                admm=admm,
            )


def current_metric(model: nn.Module, tensors: Mapping[str, Tensor], moments: Moments, recipe: Recipe) -> Metric:
    """Return the metric of projections and codebooks as the recipe asks for it."""
    return measure_metric(
        model,
        tensors,
        moments,
        sensitivity=recipe.sensitivity,
        effects=recipe.rank_by == "effect",
        weighted=recipe.weighted,
    )


@contextmanager
def rounded(tensors: Mapping[str, nn.Parameter], codebook: Codebook | None, metric: Metric) -> Iterator[None]:
    """Round the tensors to a codebook within the context; without one do nothing."""
    if codebook is None:
        yield
        return
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    assign(tensors, codebook.project(values, metric))
    try:
        yield
    finally:
        assign(tensors, values)


@torch.no_grad()
def assign(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into the tensors of the same names."""
    for name, value in values.items():
        tensors[name].copy_(value)


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """Return bfloat16 autocast for a device, without its cache: a weight cast under no_grad would lose its gradient."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def cosine(peak: float, warmup: float = 0.0, *, power: int = 1) -> Schedule:
    """Return a schedule: a rise to peak in the first `warmup` of the phase, then half a cosine down to 1 %.

    Args:
        power: of the rise; 3 stays low for long, as fits a budget that falls along a cubic.
    """

    def rate(done: float) -> float:
        if done < warmup:
            return peak * max((done / warmup) ** power, 0.01)
        return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2)

    return rate
