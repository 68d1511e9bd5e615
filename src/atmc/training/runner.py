"""Run the phases of a method one after the other, resumable after every epoch.

A method is a list of phases. Each starts from the best feasible model of the phase before. After every epoch the model
that satisfies all of the phase's constraints (`Phase.feasible`) is validated, and the best one is kept. The state
between two epochs is one value, `State`, made of tensors and numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from atmc.compress.admm import Admm
from atmc.compress.budget import nominal_bits
from atmc.compress.constraints import Codebook, Constraint
from atmc.compress.factorize import apply_structure, cached_weights, compressible_parameters, factor_structure
from atmc.compress.metric import Moments
from atmc.compress.rate_control import Allocation, RateControl
from atmc.core.modules import copy_state
from atmc.core.rng import derived_seed
from atmc.core.torch_state import full_float32
from atmc.data import Images
from atmc.evaluation.accuracy import clean_accuracy, interval_accuracy, robust_accuracy
from atmc.evaluation.statistics import Accuracy
from atmc.robust.objectives import OBJECTIVES, TrainingAttack
from atmc.robust.threats import Threat
from atmc.training.batch_norm import reestimate_batch_norm
from atmc.training.dead_weights import probe_images
from atmc.training.finalize import FinalChoices, finalize
from atmc.training.loop import Loop, StepDone, assign, cosine, current_metric, fit
from atmc.training.settings import Recipe

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a method.

    Args:
        name: key of its epochs and learning rate in the recipe.
        enter: changes the model on entry (factorizes it, cuts ranks).
        constraint: tensors at entry -> a function (fraction of the phase done, allocation) -> constraint of the step.
        feasible: allocation -> the constraint of a model that is validated, chosen and written; None if the constraint
            of the steps suffices.
        starts_feasible: whether training starts from the feasible model.
        admm: allocation -> the ADMM that pulls the tensors.
        straight_through: allocation -> the codebook to which the tensors are rounded in every forward pass.
        keeps_start: whether the model on entry is itself a candidate.
        keeps_support: whether entries that are zero when the phase begins stay zero.
        shrinks: whether the phase brings a dense network down to the budget. While it does (`Recipe.gradual`), the
            learning rate rises, along a cubic like the budget's, and what was removed stays out: Adam's steps on
            hundreds of thousands of weights, and removed entries that jump back in by one such step each, throw a
            trained network off.
    """

    name: str
    enter: Callable[[nn.Module], object] | None = None
    constraint: Callable[[Tensors], Callable[[float, Allocation], Constraint]] | None = None
    feasible: Callable[[Allocation], Constraint] | None = None
    starts_feasible: bool = False
    admm: Callable[[Allocation], Admm] | None = None
    straight_through: Callable[[Allocation], Codebook] | None = None
    keeps_start: bool = False
    keeps_support: bool = False
    shrinks: bool = False


@dataclass
class State:
    """The state of training between two epochs, which suffices to continue; a checkpoint holds its fields.

    Args:
        phase: index of the phase.
        epoch: epochs of the phase that are done.
        structure: path of each factorized weight -> its form and rank.
        model, optimizer: their state dicts.
        admm: the state of ADMM, if the phase has one.
        moments: the mean squared gradients of the constrained tensors; the next phase continues with them.
        allocation: the fields of the current `Allocation`.
        start: the constrained tensors when the phase began.
        best: state dict of the best feasible model of the phase.
        best_score: its validation score.
    """

    phase: int = 0
    epoch: int = 0
    structure: dict[str, tuple[str, int]] = field(default_factory=dict)
    model: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    admm: dict[str, Any] | None = None
    moments: dict[str, Any] = field(default_factory=dict)
    allocation: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_score: float = -math.inf


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of log.jsonl: an epoch (0 for the start of a phase) and its feasible model.

    Args:
        loss: mean over the epoch; None for epoch 0.
        clean, robust: accuracies on the first clean_n and robust_n validation images, the second one under
            `val_attack`, or certified by intervals.
        nominal_bits: see `compress.budget.nominal_bits`.
        file_bytes: the projected size of the file under a budget in bytes; None otherwise.
        primal, dual: residuals of ADMM; None without ADMM.
        seconds: time of training, without validation.
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
    file_bytes: int | None
    primal: float | None
    dual: float | None
    seconds: float


@dataclass(frozen=True)
class EpochDone:
    """An epoch is done: its record, and the state to save."""

    record: Record
    state: State


class Runner:
    """Runs the phases of one method on one model: iterate `run` to the end, then call `finalize`.

    Args:
        model: trained in place; phases may factorize it.
        train, val: the images to train and to validate on.
        threat: the perturbations of training and validation.
        phases: of the method, in order; one without epochs that changes nothing on entry is skipped.
        recipe: how to train.
        start: the allocation to begin with.
        rate: the rate control of a budget in bytes; None if the budget is a number of nonzeros.
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
        start: Allocation,
        rate: RateControl | None = None,
    ) -> None:
        self.model, self.rate = model, rate
        self.phases = [
            phase for phase in phases if recipe.epochs.get(phase.name, 0) > 0 or phase.enter or phase.feasible
        ]
        self._train, self._val, self._threat, self._recipe, self._start = train, val, threat, recipe, start
        self._attack = TrainingAttack(
            threat, recipe.attack_steps, recipe.relative_step, recipe.random_start, recipe.batch_statistics
        )
        self._objective = OBJECTIVES[recipe.objective].build(recipe.objective_options)

    def run(self, state: State | None = None) -> Iterator[StepDone | EpochDone]:
        """Train from a state (by default from the start); yield after every step and every epoch."""
        state = state or State(allocation=asdict(self._start))
        if state.model:
            own = factor_structure(self.model)  # weights that a checkpoint brought are factorized already
            apply_structure(self.model, {path: form for path, form in state.structure.items() if path not in own})
        for index in range(state.phase, len(self.phases)):
            if index != state.phase:
                state = State(phase=index, allocation=state.allocation, moments=state.moments)
            yield from self._run_phase(self.phases[index], state)

    def _run_phase(self, phase: Phase, state: State) -> Iterator[StepDone | EpochDone]:
        """Train one phase from its start or from a saved state; the model ends as the best one of the phase."""
        resumed = bool(state.model)
        device = next(self.model.parameters()).device
        state.start = {name: value.to(device) for name, value in state.start.items()}
        state.admm = _to_device(state.admm, device)
        moments = Moments.restored(_to_device(state.moments, device))
        if resumed:
            self.model.load_state_dict(state.model)
        elif phase.enter:
            phase.enter(self.model)
        tensors = compressible_parameters(self.model, exclude=self._recipe.exclude)
        moments.keep(tensors)
        if not resumed:
            metric = current_metric(self.model, tensors, moments, self._recipe)
            if self.rate and phase.feasible:
                choose_bits = phase.admm is not None or phase.straight_through is not None
                _, following, _ = self.rate.allocate(
                    self.model, tensors, _allocation(state), choose_bits=choose_bits, metric=metric
                )
                state.allocation = asdict(following)
            if phase.feasible and phase.starts_feasible:
                assign(tensors, phase.feasible(_allocation(state)).project(_copy(tensors), metric))
            state.start = _copy(tensors) if phase.constraint else {}
        optimizer = self._optimizer()
        if state.optimizer:
            optimizer.load_state_dict(state.optimizer)
        admm = phase.admm(_allocation(state)) if phase.admm else None
        if admm and state.admm:
            admm = admm.restored(state.admm)
        step_constraint = phase.constraint(state.start) if phase.constraint else None
        epochs = self._recipe.epochs.get(phase.name, 0)
        if not resumed and (phase.keeps_start or not epochs):
            yield self._validate_epoch(phase, state, tensors, None, admm, optimizer, moments)
        for step in fit(
            self.model,
            self._train,
            self._loop(phase, state.phase),
            objective=self._objective,
            attack=self._attack,
            optimizer=optimizer,
            tensors=tensors,
            epochs=epochs,
            moments=moments,
            start=state.epoch,
            constraint=_bind_allocation(step_constraint, state) if step_constraint else None,
            admm=admm,
            straight_through=phase.straight_through(_allocation(state)) if phase.straight_through else None,
            held=self._recipe.gradual if phase.shrinks else 1.0 if phase.keeps_support else 0.0,
        ):
            yield replace(step, phase=phase.name, fraction=self._fraction_done(state.phase, step))
            if step.epoch_done:
                yield self._validate_epoch(phase, state, tensors, step, step.admm, optimizer, moments)
        self.model.load_state_dict(state.best)

    def _fraction_done(self, index: int, step: StepDone) -> float:
        """Return the part of the epochs of all phases that is done; index: the current phase's."""
        epochs = [self._recipe.epochs.get(phase.name, 0) for phase in self.phases]
        return (sum(epochs[:index]) + step.epoch - 1 + step.step / step.steps) / sum(epochs)

    def _validate_epoch(
        self,
        phase: Phase,
        state: State,
        tensors: Mapping[str, nn.Parameter],
        step: StepDone | None,
        admm: Admm | None,
        optimizer: torch.optim.Optimizer,
        moments: Moments,
    ) -> EpochDone:
        """Validate the feasible model, keep it if it is the best, and update the state.

        Args:
            step: the epoch's last step; None at the start of a phase.
        """
        values, now, size = _copy(tensors), _allocation(state), None
        metric = current_metric(self.model, tensors, moments, self._recipe)
        if self.rate and phase.feasible:
            now, following, size = self.rate.allocate(self.model, tensors, now, choose_bits=False, metric=metric)
            closed = (step.epoch if step else 0) >= self._recipe.gradual * self._recipe.epochs.get(phase.name, 0)
            if closed or not phase.shrinks:  # room that is filled at the full rate costs accuracy
                most = max(now.nonzeros, state.allocation["nonzeros"])
                following = replace(following, nonzeros=min(following.nonzeros, most))
            state.allocation = asdict(following)
        if phase.feasible:
            assign(tensors, phase.feasible(now).project(values, metric))
        clean, robust = self._validate(self.model)
        score = self._score(clean, robust)
        if score > state.best_score:
            state.best, state.best_score = copy_state(self.model.state_dict()), score
        record = Record(
            phase=phase.name,
            epoch=step.epoch if step else 0,
            loss=step.loss if step else None,
            clean=clean.accuracy,
            clean_n=clean.n,
            robust=robust.accuracy,
            robust_n=robust.n,
            nonzeros=sum(int(t.count_nonzero()) for t in tensors.values()),
            nominal_bits=nominal_bits(tensors, now.bits),
            file_bytes=size,
            primal=_finite(admm.primal) if admm else None,
            dual=_finite(admm.dual) if admm else None,
            seconds=round(step.seconds, 3) if step else 0.0,
        )
        assign(tensors, values)
        state.epoch = record.epoch
        state.structure = dict(factor_structure(self.model))
        state.model, state.optimizer = self.model.state_dict(), optimizer.state_dict()
        state.admm = admm.state() if admm else None
        state.moments = moments.state()
        return EpochDone(record, state)

    def finalize(self) -> tuple[nn.Module, FinalChoices]:
        """Turn the trained model into what the file will hold; see `training.finalize.finalize`."""
        loop = self._loop(None, len(self.phases))

        def reestimate(model: nn.Module) -> bool:
            return reestimate_batch_norm(model, self._train, loop, objective=self._objective, attack=self._attack)

        return finalize(
            self.model,
            exclude=self._recipe.exclude,
            bits=self._start.bits if isinstance(self._start.bits, int) else None,
            validate=self._validate,
            score=self._score,
            reestimate=reestimate,
            rate=self.rate,
            probe=probe_images(self._train),
        )

    def _validate(self, model: nn.Module) -> tuple[Accuracy, Accuracy]:
        """Return clean and robust accuracy on the first val_clean_n and val_n validation images, in float32.

        Robust means under `val_attack`, or certified by intervals if the objective trains for them.
        """
        model.eval()
        with full_float32(), cached_weights(model):
            clean = clean_accuracy(model, self._val, n=self._recipe.val_clean_n)
            if OBJECTIVES[self._recipe.objective].certified:
                robust = interval_accuracy(model, self._val, self._threat, n=self._recipe.val_n)
            else:
                robust = robust_accuracy(model, self._val, self._threat, self._recipe.val_attack, n=self._recipe.val_n)
        return clean, robust

    def _score(self, clean: Accuracy, robust: Accuracy) -> float:
        """Return the number that chooses between epochs: the mean accuracy, or the clean one in natural training."""
        adversarial = OBJECTIVES[self._recipe.objective].adversarial
        return (clean.accuracy + robust.accuracy) / 2 if adversarial else clean.accuracy

    def _loop(self, phase: Phase | None, index: int) -> Loop:
        """Return how a phase goes through the data; phase None is batch norm re-estimation, which trains nothing."""
        recipe, dense = self._recipe, phase is not None and phase.name == "dense"
        peak = recipe.learning_rate[phase.name] if phase and recipe.epochs.get(phase.name, 0) else 0.0
        warmup = recipe.gradual if phase is not None and phase.shrinks else recipe.warmup
        return Loop(
            recipe,
            learning_rate=cosine(peak, warmup, power=1 if dense else 3),
            eps_ramp=recipe.eps_ramp if dense else 0.0,
            seed=derived_seed(recipe.seed, index),
        )

    def _optimizer(self) -> torch.optim.Optimizer:
        """Return a new optimizer of all parameters; the schedule of `fit` sets its learning rate."""
        decay = self._recipe.weight_decay
        if self._recipe.optimizer == "sgd":
            return torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=decay)
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=decay, fused=True)


def _allocation(state: State) -> Allocation:
    """Return the current allocation."""
    return Allocation(**state.allocation)


def _bind_allocation(
    constraint: Callable[[float, Allocation], Constraint], state: State
) -> Callable[[float], Constraint]:
    """Return fraction done -> constraint, under the allocation of that moment: rate control changes it every epoch."""
    return lambda done: constraint(done, _allocation(state))


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors by name."""
    return {name: value.detach().clone() for name, value in state.items()}


def _to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors in nested dicts and lists to a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    return [_to_device(item, device) for item in value] if isinstance(value, list) else value


def _finite(value: float) -> float | None:
    """Return the value, or None if it is not a finite number."""
    return value if math.isfinite(value) else None
