"""What a Python user calls: compress(), evaluate(), load(), save()."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from atmc.compress.budget import Budget
from atmc.compress.factorize import fold, refuse_unfit, sites, use_channels_last
from atmc.compress.rate import Allocation, BudgetTooSmall, RateControl
from atmc.data import Images, as_images, mixed_order
from atmc.files import write_beside
from atmc.finish import Decided, smallest_model, to_final
from atmc.idle import probe_images
from atmc.inputs import as_device, as_threat, expect_budget, expect_module
from atmc.judge import EvaluationWarning, Options, Report, check_model, evaluate, evaluation, takes_channels_last
from atmc.methods import CODEBOOK_METHODS, Plan, floor_of, objective_of, phases_of
from atmc.numerics import deterministic
from atmc.pack import artifact
from atmc.pack.artifact import load, save
from atmc.phases import EpochEnd, Record, Runner, State
from atmc.recipe import Recipe
from atmc.robust.threats import Threat, check_threat
from atmc.train import Progress, restore_batch_norm

__all__ = [
    "EvaluationWarning",
    "Job",
    "Options",
    "Report",
    "Result",
    "compress",
    "default_recipe",
    "evaluate",
    "evaluation",
    "load",
    "save",
]

DEFAULT_EPOCHS = {"dense": 20, "l0": 10, "admm": 10, "tune": 5}
LEARNING_RATES = {
    "adamw": {"dense": 2e-3, "l0": 1e-3, "admm": 1e-3, "tune": 5e-4},
    "sgd": {"dense": 0.1, "l0": 0.02, "admm": 0.01, "tune": 0.005},
}


@dataclass(frozen=True)
class Result:
    """A compressed model.

    Args:
        model: plain module in evaluation mode, decoded from `data`.
        data: the bytes of the model file.
        records: one an epoch, as in log.jsonl.
        decided: what the last validation decided, see `finish.Decided`.
    """

    model: nn.Module
    data: bytes
    records: list[Record]
    decided: Decided

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the model file; its size in bytes."""
        return write_beside(Path(path), self.data)


def default_recipe(model: nn.Module, **settings: Any) -> Recipe:
    """A recipe whose optimizer suits the model, unless the settings say otherwise.

    SGD where there is batch norm, as adversarial training is usually done; AdamW without, where SGD with the same
    rate often does not get going against large perturbations. epochs and learning_rate may be one number for every
    phase or a dict of some phases.
    """
    normed = _normed(model)
    optimizer = settings.setdefault("optimizer", "sgd" if normed else "adamw")
    if optimizer not in LEARNING_RATES:
        raise ValueError(f"unknown optimizer {optimizer!r}: expected one of {', '.join(LEARNING_RATES)}")
    settings.setdefault("weight_decay", 5e-4 if normed else 1e-4)
    unknown = [key for key in settings if key not in Recipe.__dataclass_fields__]
    if unknown:
        near = get_close_matches(unknown[0], Recipe.__dataclass_fields__, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown setting {unknown[0]!r}{hint}")
    settings["epochs"] = by_phase(settings.get("epochs"), DEFAULT_EPOCHS, "epochs")
    settings["learning_rate"] = by_phase(settings.get("learning_rate"), LEARNING_RATES[optimizer], "learning_rate")
    return Recipe(**settings)


def _normed(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def by_phase(given: Any, defaults: dict[str, Any], what: str) -> dict[str, Any]:
    """One number for every phase, or a dict of some, filled up with the defaults. ValueError if it makes no sense."""
    if given is None:
        return dict(defaults)
    kind: Any = Integral if what == "epochs" else Real
    values = dict(given) if isinstance(given, dict) else dict.fromkeys(defaults, given)
    for phase, value in values.items():
        if phase not in defaults:
            near = get_close_matches(phase, defaults, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown phase {phase!r} in {what}: expected {', '.join(defaults)}{hint}")
        if not (isinstance(value, kind) and 0 <= value < math.inf):
            raise ValueError(f"expected {what} >= 0 in phase {phase}, got {value!r}")
    return {**defaults, **values}


class Job:
    """One compression, step by step: iterate `run`, then take `result`. `compress` does both.

    Everything a user gave is checked here, before any training; see `compress` for the arguments and errors.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Images,
        val: Images,
        *,
        threat: Threat,
        budget: Budget,
        method: str,
        recipe: Recipe,
        device: torch.device,
        classes: int | None = None,
    ) -> None:
        shape = cast(tuple[int, int, int], tuple(train.pixels.shape[1:]))
        check_threat(threat, train.pixels[0].numel())
        classes = check_model(model, train, classes)
        check_model(model, val, classes)
        refuse_unfit(model, exclude=recipe.exclude)
        if _normed(model) and min(len(train), recipe.batch_size) == 1:
            raise ValueError(
                f"expected at least 2 images a step, since the model has batch norm; got {len(train)} training images "
                f"in batches of {recipe.batch_size}"
            )
        self.dense_weights = sum(
            getattr(site.module, site.parameter).numel() for site in sites(model, exclude=recipe.exclude)
        )
        self._plain = fold(model).cpu()
        self._about: dict[str, Any] = {
            "input_shape": shape,
            "classes": classes,
            "threat": str(threat),
            "method": method,
        }
        self._refuse_unwritable(model)
        floor = floor_of(method, model, recipe.exclude)
        self.nonzeros = budget.resolve(self.dense_weights, floor=floor) if method != "da" else self.dense_weights
        rate = self._rate(model, budget, method, recipe, train) if budget.max_bytes is not None else None
        plan = Plan(
            self.nonzeros,
            self.dense_weights,
            budget.bits,
            recipe.gradual,
            recipe.regrow,
            recipe.rho,
            recipe.balance,
            recipe.factor_start,
            recipe.exclude,
            rate,
        )
        phases = phases_of(method, plan)
        working = copy.deepcopy(model).to(device)
        train, val = train.to(device), mixed_order(val).to(device)
        restore_batch_norm(working, train)
        recipe = replace(
            recipe,
            objective=objective_of(method, recipe.objective),
            channels_last=recipe.channels_last and takes_channels_last(working, train),
        )
        if recipe.channels_last:
            use_channels_last(working)
        self.recipe = recipe
        self.records: list[Record] = []
        start = Allocation(self.nonzeros, budget.bits)
        self.runner = Runner(working, train, val, threat, phases, recipe, start=start, rate=rate)

    def _refuse_unwritable(self, model: nn.Module) -> None:
        """ValueError now, not after training, for a model that a file cannot hold, or not be read from."""
        for name, value in model.state_dict().items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(f"tensor {name}: expected finite values, got nan or infinity")
        empty = fold(model).cpu()
        for value in empty.state_dict().values():
            if value.dim() >= 2:
                value.zero_()
        artifact.from_bytes(artifact.to_bytes(empty, **self._about), factory=self._plain_copy)

    def _rate(self, model: nn.Module, budget: Budget, method: str, recipe: Recipe, train: Images) -> RateControl:
        """Rate control for a budget in bytes. BudgetTooSmall if no file of the model is that small."""
        if method == "da":
            raise ValueError("method 'da' keeps every weight: leave out max_bytes")
        assert budget.max_bytes is not None

        probe = probe_images(train)

        def measure(trained: nn.Module) -> int:
            return len(artifact.to_bytes(to_final(trained, probe), **self._about))

        def measure_exact(rounded: nn.Module) -> int:
            return len(artifact.to_bytes(rounded, **self._about))

        smallest = measure_exact(smallest_model(method, model, recipe.exclude))
        if budget.max_bytes < smallest:
            raise BudgetTooSmall(
                f"a budget of {budget.max_bytes:,} bytes is below the smallest file of this model and method, "
                f"{smallest:,} bytes"
            )
        most_bits = (budget.bits or 8) if method in CODEBOOK_METHODS else None
        layers = len(sites(model, exclude=recipe.exclude))
        return RateControl(budget.max_bytes, smallest, measure, measure_exact, most_bits, layers, self.dense_weights)

    def _plain_copy(self, num_classes: int) -> nn.Module:
        return copy.deepcopy(self._plain)

    def run(self, state: State | None = None) -> Iterator[Progress | EpochEnd]:
        """Train, from a saved state if there is one; yields every step and every epoch's end."""
        for event in self.runner.run(state):
            if isinstance(event, EpochEnd):
                self.records.append(event.record)
            yield event

    def result(self) -> Result:
        """The final choices, the file, and the model decoded from it."""
        model, decided = self.runner.finish()
        data = artifact.to_bytes(model, **self._about)
        decoded = artifact.from_bytes(data, factory=self._plain_copy)
        return Result(decoded, data, self.records, decided)


def compress(
    model: nn.Module,
    train: Any,
    val: Any,
    *,
    threat: Threat | str,
    budget: Budget,
    method: str = "atmc",
    recipe: Recipe | None = None,
    device: str | torch.device = "cpu",
    on_event: Callable[[Progress | EpochEnd], None] | None = None,
    **settings: Any,
) -> Result:
    """The most robust model of this architecture that fits the budget.

    Args:
        model: any module that maps images (n, c, h, w) in [0, 1] to logits; normalization belongs inside. If it is
            trained already, pass epochs={"dense": 0}. It is not changed.
        train, val: a DataLoader, a dataset of (image, label) pairs, or a pair of tensors; images in [0, 1].
        threat: what the adversary may do, ``Linf(8 / 255)`` or "linf:8/255".
        budget: what the result may hold.
        method: ``atmc`` or one of its rivals, see `methods.METHODS`.
        recipe: how to train; by default `default_recipe` of the model with the given settings (epochs=..., seed=...).
        on_event: called after every step and epoch.

    >>> import atmc
    >>> x, y = torch.rand(64, 1, 28, 28), torch.arange(64) % 10
    >>> result = atmc.compress(atmc.models.build("lenet", 10), (x, y), (x, y), threat=atmc.Linf(0.1),
    ...                        budget=atmc.Budget(ratio=0.01, bits=4), epochs=1)
    >>> result.records[-1].nonzeros <= 4305
    True

    Raises:
        ValueError: images, labels, model, threat, budget or settings that make no sense; nothing was trained.
        TrainingDiverged: the loss is not finite.
    """
    if recipe is not None and settings:
        raise ValueError(f"expected a recipe or settings, got both: {', '.join(settings)}")
    place = as_device(device)
    expect_module(model)
    expect_budget(budget)
    job = Job(
        model,
        as_images(train),
        as_images(val),
        threat=as_threat(threat),
        budget=budget,
        method=method,
        recipe=recipe or default_recipe(model, **settings),
        device=place,
    )
    with deterministic(place):
        for event in job.run():
            if on_event:
                on_event(event)
        return job.result()
