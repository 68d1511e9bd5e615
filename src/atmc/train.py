"""fit(): projected stochastic gradient descent on an adversarial loss, with an optional ADMM pull to a codebook.

Reads neither configuration nor disk. One epoch is: for each batch, attack, one gradient step, projection on the
constraint; every `interval` steps ADMM's copy and dual are refreshed (Gui et al. 2019, algorithm 1).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atmc.compress.admm import Admm
from atmc.compress.constraints import Constraint
from atmc.compress.factorize import built_once
from atmc.data import Batch, Images, batch_count, batches
from atmc.pack.norms import is_affine
from atmc.rng import Noise, derived_seed
from atmc.robust.attacks import BATCH_NORMS
from atmc.robust.objectives import Objective, TrainingAttack

Schedule = Callable[[float], float]


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True)
class Progress:
    """Where training stands after a step. Epochs and steps count from 1; loss is the epoch's mean so far.

    `phase` and `share`, of all the run's epochs that are done, are filled in by whoever runs several phases.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    seconds: float
    admm: Admm | None
    phase: str = ""
    share: float = 0.0

    @property
    def epoch_done(self) -> bool:
        """Whether this was the epoch's last step."""
        return self.step == self.steps


@dataclass(frozen=True)
class Loop:
    """How a phase steps through the data.

    Args:
        batch_size: images a step, see `data.batches`.
        learning_rate: fraction of the phase done, in [0, 1) -> learning rate.
        eps_ramp: epochs over which the training attack's ball grows to full size.
        interval: steps between two refreshes of ADMM.
        augment: a name in `data.batches`.
        bf16: autocast to bfloat16.
        channels_last: lay images out so, which convolutions on the CPU run faster on.
        seed: keys every random draw, with epoch and example.
    """

    batch_size: int
    learning_rate: Schedule
    eps_ramp: float = 0.0
    interval: int = 10
    augment: str = "none"
    bf16: bool = False
    channels_last: bool = True
    seed: int = 0

    def images(self, batch: Batch) -> Tensor:
        """The batch's images in the memory layout of the run."""
        if self.channels_last and batch.x.dim() == 4:
            return batch.x.contiguous(memory_format=torch.channels_last)
        return batch.x


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
    constraint: Callable[[float], Constraint] | None = None,
    admm: Admm | None = None,
) -> Iterator[Progress]:
    """Train in place, from epoch `start` (0-based) on; yields after every step.

    Args:
        tensors: the constrained parameters, name -> parameter.
        constraint: fraction of the phase done -> what the tensors must satisfy after the step.
        admm: state to start from; the current state comes with every `Progress`.

    Raises:
        TrainingDiverged: the loss is not finite.
    """
    steps = batch_count(len(train), loop.batch_size)
    for epoch in range(start, epochs):
        began, total = time.perf_counter(), 0.0
        model.train()
        for step, batch in enumerate(
            batches(train, loop.batch_size, seed=loop.seed, epoch=epoch, augment=loop.augment)
        ):
            done = (epoch + step / steps) / epochs
            for group in optimizer.param_groups:
                group["lr"] = loop.learning_rate(done)
            ramp = min(1.0, (epoch + (step + 1) / steps) / loop.eps_ramp) if loop.eps_ramp else 1.0
            noise = Noise(batch.index, seed=loop.seed, purpose="attack", epoch=epoch)
            perturb = attack.on(model, noise, eps_scale=ramp)
            x = loop.images(batch)
            optimizer.zero_grad(set_to_none=True)
            with seeded(derived_seed(loop.seed, epoch, step), x.device), built_once(model):
                with autocast(x.device, loop.bf16):
                    loss = objective(model, x, batch.y, perturb)
                loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            if not math.isfinite(total):
                raise TrainingDiverged(f"the loss became {total} in epoch {epoch + 1}; try a lower learning rate")
            if admm is not None:
                admm.add_penalty_gradient(tensors)
            optimizer.step()
            if constraint is not None:
                assign(tensors, constraint(done).project({name: t.detach() for name, t in tensors.items()}))
            if admm is not None and step % loop.interval == 0:
                admm = admm.step(tensors)
            seconds = time.perf_counter() - began
            yield Progress(epoch + 1, epochs, step + 1, steps, total / (step + 1), seconds, admm)


@torch.no_grad()
def assign(tensors: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copy values into the parameters of the same names."""
    for name, value in values.items():
        tensors[name].copy_(value)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within, torch's global generators start from a seed (dropout draws from them); outside they are untouched."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """bfloat16 autocast on a device, without its cache of weights: one cast under no_grad would lose their gradient."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def cosine(peak: float, warmup: float = 0.0) -> Schedule:
    """Linear rise to peak over the first `warmup` share of the phase, then half a cosine down to 1 % of it."""

    def rate(done: float) -> float:
        if done < warmup:
            return peak * max(done / warmup, 0.01)
        return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2)

    return rate


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module, train: Images, loop: Loop, *, objective: Objective, attack: TrainingAttack
) -> bool:
    """Running statistics recomputed over one epoch, in the objective's own mixture of clean and adversarial passes.

    The mean over all images that pass takes the place of the running one. The attack sees the model as it was. False,
    and nothing done, without batch norm.
    """
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS) and module.track_running_stats]
    if not norms:
        return False
    before = copy.deepcopy(model)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
    hooks = [norm.register_forward_pre_hook(_MeanOverImages()) for norm in norms]
    model.train()
    for step, batch in enumerate(batches(train, loop.batch_size, seed=loop.seed, epoch=0, augment=loop.augment)):
        noise = Noise(batch.index, seed=loop.seed, purpose="batch norm")
        x = loop.images(batch)
        with seeded(derived_seed(loop.seed, 0, step), x.device), built_once(before), autocast(x.device, loop.bf16):
            objective(model, x, batch.y, attack.on(before, noise))
    for norm, momentum, hook in zip(norms, momenta, hooks, strict=True):
        norm.momentum = momentum
        hook.remove()
    model.eval()
    return True


@torch.no_grad()
def restore_batch_norm(model: nn.Module, images: Images, *, n: int = 2000, batch_size: int = 250) -> bool:
    """Batch norms of a model file made fit for training again; False, and nothing done, where they are not affine.

    A file holds a scale and a shift (`pack.norms.to_affine`). Here every norm gets the statistics of its input over the
    first n images, and the weight and bias with which it computes the same as before in evaluation mode, up to
    rounding: without them, a first pass in training mode would normalize what was never meant to be.
    """
    if not is_affine(model):
        return False
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    sums = {norm: _Moments() for norm in norms}
    hooks = [norm.register_forward_pre_hook(sums[norm]) for norm in norms]
    model.eval()
    for start in range(0, min(n, len(images)), batch_size):
        index = torch.arange(start, min(start + batch_size, n, len(images)), device=images.labels.device)
        model(images.float_pixels(index))
    for hook in hooks:
        hook.remove()
    for norm, moments in sums.items():
        mean, var = moments.mean_and_variance()
        assert norm.running_mean is not None  # of an affine norm
        assert norm.running_var is not None
        norm.bias.copy_(norm.bias.double() + norm.weight.double() * mean)
        norm.weight.copy_(norm.weight.double() * (var + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
    return True


class _Moments:
    """A forward hook: sums of a norm's input and of its squares, per channel, in float64."""

    def __init__(self) -> None:
        self._count, self._sum, self._squares = 0, torch.zeros(()), torch.zeros(())

    def __call__(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].double().transpose(0, 1).flatten(1)
        self._count += x.shape[1]
        self._sum = self._sum.to(x) + x.sum(1)
        self._squares = self._squares.to(x) + x.square().sum(1)

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """Per channel."""
        mean = self._sum / self._count
        return mean, (self._squares / self._count - mean**2).clamp_min(0)


class _MeanOverImages:
    """Sets a batch norm's momentum before each pass so that its running statistics are the mean over all images."""

    def __init__(self) -> None:
        self._seen = 0

    def __call__(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._seen += len(inputs[0])
        norm.momentum = len(inputs[0]) / self._seen  # type: ignore[assignment]
