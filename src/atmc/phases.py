"""Run the phases of a method one after the other, resumable after every epoch.

A method is a list of phases. Each starts from the best feasible model of the one before, trains, and after every epoch
is judged on the validation split by the model that satisfies all of the phase's constraints (`Phase.feasible`).
The state between two epochs is one value, `State`, made of tensors and numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, nn

from atmc.augment import AUGMENTATIONS
from atmc.compress.admm import Admm
from atmc.compress.budget import nominal_bits
from atmc.compress.constraints import Constraint
from atmc.compress.factorize import built_once, compressible, fold, restructure, structure
from atmc.data import Images
from atmc.numerics import full_float32
from atmc.rng import check_seed, derived_seed
from atmc.robust.evaluate import clean_accuracy, robust_accuracy
from atmc.robust.figures import Accuracy
from atmc.robust.objectives import OBJECTIVES, TrainingAttack
from atmc.robust.threats import Threat
from atmc.train import Loop, Progress, assign, cosine, fit, reestimate_batch_norm

Tensors = Mapping[str, Tensor]
CHOICES: dict[str, Collection[str]] = {
    "objective": OBJECTIVES,
    "augment": AUGMENTATIONS,
    "optimizer": ("adamw", "sgd"),
    "factor_start": ("identity", "svd"),
}


@dataclass(frozen=True)
class Recipe:
    """How to train; every field is a setting of the command line's configuration file.

    These are the values for a model without batch norm; `api.default_recipe` chooses by the model.

    Args:
        epochs: phase name -> epochs; phases not named do not train.
        learning_rate: phase name -> peak rate.
        objective: a name in `OBJECTIVES`.
        attack_steps, relative_step, random_start, batch_statistics: the training attack, see `TrainingAttack`.
        optimizer: ``adamw`` or ``sgd`` (Nesterov momentum 0.9).
        warmup: share of the dense phase in which the rate rises.
        eps_ramp: epochs of the dense phase in which the ball grows to full size.
        gradual: share of the l0 and admm phases in which the nonzeros shrink to the budget (Zhu and Gupta 2018).
        regrow: the admm phase begins with so many times the budget, so that factors starting at zero can take part.
        rho, interval, balance: ADMM's penalty, steps between refreshes, residual balancing.
        factor_start: ``identity`` or ``svd``.
        exclude: patterns of weights that stay as they are.
        bf16: train in bfloat16; validation is in float32 always.
        channels_last: memory layout of images and kernels in training; False where a model cannot take it.
        val_n, val_clean_n: validation images each epoch, the first so many under attack and of clean ones (None: all).
    """

    epochs: Mapping[str, int]
    learning_rate: Mapping[str, float]
    objective: str = "mixed"
    attack_steps: int = 7
    relative_step: float = 2.0
    random_start: bool = True
    batch_statistics: bool = False
    optimizer: str = "adamw"
    weight_decay: float = 1e-4
    batch_size: int = 128
    warmup: float = 0.15
    eps_ramp: float = 0.0
    gradual: float = 0.5
    regrow: float = 4.0
    rho: float = 0.1
    interval: int = 10
    balance: bool = False
    factor_start: Literal["identity", "svd"] = "identity"
    exclude: tuple[str, ...] = ()
    augment: str = "none"
    bf16: bool = False
    channels_last: bool = True
    val_n: int = 1000
    val_clean_n: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """ValueError for a setting that makes no sense."""
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: expected one of {', '.join(known)}")
        for name in ("attack_steps", "batch_size", "interval", "val_n", "seed"):
            if not isinstance(getattr(self, name), Integral):
                raise ValueError(f"expected {name} to be an integer, got {getattr(self, name)!r}")
        check_seed(self.seed)
        if self.val_clean_n is not None and not (isinstance(self.val_clean_n, Integral) and self.val_clean_n > 0):
            raise ValueError(f"expected val_clean_n > 0 or none for the whole split, got {self.val_clean_n!r}")
        for name in ("attack_steps", "batch_size", "interval", "val_n", "relative_step", "rho"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"expected {name} > 0, got {getattr(self, name)}")
        for name in ("weight_decay", "eps_ramp"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}")
        if not (0 <= self.warmup < 1 and 0 <= self.gradual <= 1 and 1 <= self.regrow < math.inf):
            raise ValueError(
                f"expected 0 <= warmup < 1, 0 <= gradual <= 1 and regrow >= 1, "
                f"got {self.warmup}, {self.gradual} and {self.regrow}"
            )


@dataclass(frozen=True)
class Phase:
    """One stage of a method.

    Args:
        name: key of its epochs and learning rate in the recipe.
        enter: changes the model on entry (factorize it, cut ranks, prune once).
        constraint: tensors at entry -> (fraction done -> constraint of each step).
        feasible: what a validated, chosen and written model satisfies; None if the steps' constraint already is it.
        admm: whether, and with which codebook, ADMM pulls the tensors.
        keeps_start: the model on entry is itself a candidate.
    """

    name: str
    enter: Callable[[nn.Module], object] | None = None
    constraint: Callable[[Tensors], Callable[[float], Constraint]] | None = None
    feasible: Constraint | None = None
    admm: Admm | None = None
    keeps_start: bool = False


@dataclass
class State:
    """Everything between two epochs; `tensors()` of it goes into a checkpoint."""

    phase: int = 0
    epoch: int = 0
    structure: dict[str, tuple[str, int]] = field(default_factory=dict)
    model: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    admm: dict[str, Any] | None = None
    start: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_score: float = -math.inf


@dataclass(frozen=True)
class Record:
    """One line of log.jsonl: an epoch (0 for a phase's start) and its feasible model's figures.

    Accuracies are of the first clean_n and robust_n validation images.
    """

    phase: str
    epoch: int
    loss: float | None
    clean: float
    clean_n: int
    robust: float
    robust_n: int
    nonzeros: int
    nominal_bits: int
    primal: float | None
    dual: float | None
    seconds: float


@dataclass(frozen=True)
class EpochEnd:
    """An epoch is over: its record, and the state to save."""

    record: Record
    state: State


class Runner:
    """The phases of one method on one model; iterate `run` to the end, then `finish`.

    Args:
        model: plain, trained in place (its structure changes as phases demand).
        bits: codebook bits for the nominal size, None for 32-bit values.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Images,
        val: Images,
        threat: Threat,
        phases: list[Phase],
        recipe: Recipe,
        *,
        bits: int | None = None,
    ) -> None:
        self.model = model
        self.phases = [
            phase for phase in phases if recipe.epochs.get(phase.name, 0) > 0 or phase.enter or phase.feasible
        ]
        self._train, self._val, self._threat, self._recipe, self._bits = train, val, threat, recipe, bits
        self._attack = TrainingAttack(
            threat, recipe.attack_steps, recipe.relative_step, recipe.random_start, recipe.batch_statistics
        )
        self._objective = OBJECTIVES[recipe.objective]

    def run(self, state: State | None = None) -> Iterator[Progress | EpochEnd]:
        """Train from a state (by default from the start); yields every step and every epoch's end."""
        state = state or State()
        if state.model and not structure(self.model):
            restructure(self.model, state.structure)
        for index in range(state.phase, len(self.phases)):
            if index != state.phase:
                state = State(phase=index)
            yield from self._phase(self.phases[index], state)

    def _phase(self, phase: Phase, state: State) -> Iterator[Progress | EpochEnd]:
        resumed = bool(state.model)
        device = next(self.model.parameters()).device
        state.start = {name: value.to(device) for name, value in state.start.items()}
        state.admm = _moved(state.admm, device)
        if resumed:
            self.model.load_state_dict(state.model)
        elif phase.enter:
            phase.enter(self.model)
        tensors = compressible(self.model, exclude=self._recipe.exclude)
        if not resumed:
            state.start = {name: t.detach().clone() for name, t in tensors.items()} if phase.constraint else {}
        optimizer = self._optimizer()
        if state.optimizer:
            optimizer.load_state_dict(state.optimizer)
        admm = phase.admm.restored(state.admm) if phase.admm and state.admm else phase.admm
        epochs = self._recipe.epochs.get(phase.name, 0)
        if not resumed and (phase.keeps_start or not epochs):
            yield self._judge(phase, state, tensors, None, admm, optimizer)
        for progress in fit(
            self.model,
            self._train,
            self._loop(phase, state.phase),
            objective=self._objective,
            attack=self._attack,
            optimizer=optimizer,
            tensors=tensors,
            epochs=epochs,
            start=state.epoch,
            constraint=phase.constraint(state.start) if phase.constraint else None,
            admm=admm,
        ):
            yield replace(progress, phase=phase.name, share=self._share(state.phase, progress))
            if progress.epoch_done:
                yield self._judge(phase, state, tensors, progress, progress.admm, optimizer)
        self.model.load_state_dict(state.best)

    def _share(self, index: int, progress: Progress) -> float:
        """Epochs done over epochs of all phases."""
        epochs = [self._recipe.epochs.get(phase.name, 0) for phase in self.phases]
        return (sum(epochs[:index]) + progress.epoch - 1 + progress.step / progress.steps) / sum(epochs)

    def _judge(
        self,
        phase: Phase,
        state: State,
        tensors: Mapping[str, nn.Parameter],
        progress: Progress | None,
        admm: Admm | None,
        optimizer: torch.optim.Optimizer,
    ) -> EpochEnd:
        """Validate the feasible model, keep it if it is the best, and update the state."""
        held = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        if phase.feasible:
            assign(tensors, phase.feasible.project(held))
        clean, robust = self._validate(self.model)
        score = self._score(clean, robust)
        if score > state.best_score:
            state.best, state.best_score = _copy(self.model.state_dict()), score
        record = Record(
            phase=phase.name,
            epoch=progress.epoch if progress else 0,
            loss=progress.loss if progress else None,
            clean=clean.accuracy,
            clean_n=clean.n,
            robust=robust.accuracy,
            robust_n=robust.n,
            nonzeros=sum(int(t.count_nonzero()) for t in tensors.values()),
            nominal_bits=nominal_bits(tensors, self._bits),
            primal=_number(admm.primal) if admm else None,
            dual=_number(admm.dual) if admm else None,
            seconds=round(progress.seconds, 3) if progress else 0.0,
        )
        assign(tensors, held)
        state.epoch = record.epoch
        state.structure = dict(structure(self.model))
        state.model, state.optimizer = self.model.state_dict(), optimizer.state_dict()
        state.admm = admm.state() if admm else None
        return EpochEnd(record, state)

    def finish(self) -> tuple[nn.Module, dict[str, Any]]:
        """Batch-norm statistics anew where that raises the validation score; fp16 where neither accuracy falls.

        Validated is what the file will decode to (`factorize.fold`), so that its figures are the file's.

        Returns:
            the model (still factorized where its method is) and what was decided: {"batch_norm": bool, "fp16": bool,
            "clean": Accuracy, "robust": Accuracy} with the final validation accuracies.
        """
        clean, robust = self._validate(fold(self.model))
        decided: dict[str, Any] = {"batch_norm": False, "fp16": False}
        before = _copy(self.model.state_dict())
        loop = self._loop(None, len(self.phases))
        if reestimate_batch_norm(self.model, self._train, loop, objective=self._objective, attack=self._attack):
            now = self._validate(fold(self.model))
            if self._score(*now) > self._score(clean, robust):
                (clean, robust), before = now, _copy(self.model.state_dict())
                decided["batch_norm"] = True
            self.model.load_state_dict(before)
        rounded = {name: _to_fp16(value) for name, value in before.items()}
        if all(bool(value.isfinite().all()) for value in rounded.values()):
            self.model.load_state_dict(rounded)
            now = self._validate(fold(self.model))
            if now[0].accuracy >= clean.accuracy and now[1].accuracy >= robust.accuracy:
                (clean, robust), before = now, rounded
                decided["fp16"] = True
        self.model.load_state_dict(before)
        return self.model, {**decided, "clean": clean, "robust": robust}

    def _validate(self, model: nn.Module) -> tuple[Accuracy, Accuracy]:
        """Clean and `pgd` accuracy on the first val_clean_n and val_n images of the validation split, in float32."""
        model.eval()
        with full_float32(), built_once(model):
            clean = clean_accuracy(model, self._val, n=self._recipe.val_clean_n)
            robust = robust_accuracy(model, self._val, self._threat, "pgd", n=self._recipe.val_n)
        return clean, robust

    def _score(self, clean: Accuracy, robust: Accuracy) -> float:
        """What chooses between epochs: the mean of both accuracies, or the clean one in natural training."""
        return clean.accuracy if self._recipe.objective == "natural" else (clean.accuracy + robust.accuracy) / 2

    def _loop(self, phase: Phase | None, index: int) -> Loop:
        recipe, dense = self._recipe, phase is not None and phase.name == "dense"
        peak = recipe.learning_rate[phase.name] if phase and recipe.epochs.get(phase.name, 0) else 0.0
        return Loop(
            batch_size=recipe.batch_size,
            learning_rate=cosine(peak, recipe.warmup if dense else 0.0),
            eps_ramp=recipe.eps_ramp if dense else 0.0,
            interval=recipe.interval,
            augment=recipe.augment,
            bf16=recipe.bf16,
            channels_last=recipe.channels_last,
            seed=derived_seed(recipe.seed, index),
        )

    def _optimizer(self) -> torch.optim.Optimizer:
        decay = self._recipe.weight_decay
        if self._recipe.optimizer == "sgd":
            return torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=decay)
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=decay, fused=True)


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def _to_fp16(value: Tensor) -> Tensor:
    return value.half().to(value.dtype) if value.is_floating_point() else value


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors in nested dicts and lists, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return [_moved(item, device) for item in value] if isinstance(value, list) else value


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
