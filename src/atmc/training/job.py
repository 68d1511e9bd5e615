"""One compression, from a model and a budget to the bytes of a file."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from atmc.compress.budget import Budget
from atmc.compress.factorize import check_compressible, compressible_weights, fold, use_channels_last
from atmc.compress.rate_control import Allocation, BudgetTooSmall, RateControl
from atmc.core.files import write_beside
from atmc.core.modules import copy_module
from atmc.data import Images, mix_classes
from atmc.evaluation.accuracy import interval_accuracy
from atmc.evaluation.user_model import accept_model, check_model, takes_channels_last
from atmc.pack import artifact
from atmc.robust.intervals import initialize_weights
from atmc.robust.objectives import OBJECTIVES
from atmc.robust.threats import Threat, check_threat
from atmc.training.batch_norm import restore_batch_norm
from atmc.training.dead_weights import probe_images
from atmc.training.finalize import FinalChoices, finalize_copy, smallest_model
from atmc.training.loop import StepDone
from atmc.training.methods import MethodSpec, Plan, find_method
from atmc.training.rehearsal import rehearse
from atmc.training.runner import EpochDone, Record, Runner, State
from atmc.training.settings import Recipe, has_batch_norm


@dataclass(frozen=True)
class Result:
    """A compressed model.

    Args:
        model: a plain module in evaluation mode, decoded from `data`.
        data: the bytes of the model file.
        records: one per epoch, as in log.jsonl.
        decided: what was chosen after the last epoch, with the validation accuracies.
    """

    model: nn.Module
    data: bytes
    records: list[Record]
    decided: FinalChoices

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the model file; return its size in bytes."""
        return write_beside(Path(path), self.data)


class Job:
    """One compression, step by step: iterate `run`, then call `result`. `atmc.compress` does both.

    The constructor checks everything that a user gave, before any training; see `atmc.compress` for arguments and
    errors.
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
        OBJECTIVES[recipe.objective].check_threat(recipe.objective, threat)
        model = accept_model(model, train)
        classes = check_model(model, train, classes)
        check_model(model, val, classes)
        recipe = replace(recipe, exclude=(*recipe.exclude, *_frozen_weights(model, recipe.exclude)))
        if OBJECTIVES[recipe.objective].certified:
            interval_accuracy(model, val.to(next(model.parameters()).device), threat, n=1)  # raises if it has no bounds
        check_compressible(model, exclude=recipe.exclude)
        if has_batch_norm(model) and min(len(train), recipe.batch_size) == 1:
            raise ValueError(
                f"expected at least 2 images per step, since the model has batch norm; got {len(train)} training "
                f"images in batches of {recipe.batch_size}"
            )
        rehearse(model, train, bf16=recipe.bf16)
        self.dense_weights = sum(
            weight.tensor.numel() for weight in compressible_weights(model, exclude=recipe.exclude)
        )
        self._plain = fold(model).cpu()
        self._metadata: dict[str, Any] = {
            "input_shape": shape,
            "classes": classes,
            "threat": str(threat),
            "method": method,
        }
        self._check_writable(model)
        spec = find_method(method, budget.bits, max_bytes=budget.max_bytes is not None)
        floor = spec.smallest_budget(model, recipe.exclude)
        self.nonzeros = budget.resolve(self.dense_weights, floor=floor) if spec.compresses else self.dense_weights
        rate = self._build_rate_control(model, budget, spec, recipe, train) if budget.max_bytes is not None else None
        plan = Plan(
            nonzeros=self.nonzeros,
            dense_weights=self.dense_weights,
            bits=budget.bits,
            recipe=recipe,
            input_shape=shape,
            rate=rate,
        )
        phases = spec.build(plan)
        working = copy_module(model)
        if recipe.initialization == "ibp":
            initialize_weights(working, recipe.seed)
        working.to(device)
        train, val = train.to(device), mix_classes(val).to(device)
        restore_batch_norm(working, train)
        recipe = replace(
            spec.recipe(recipe),
            channels_last=recipe.channels_last and takes_channels_last(working, train),
        )
        if recipe.channels_last:
            use_channels_last(working)
        self.recipe = recipe
        self.records: list[Record] = []
        start = Allocation(self.nonzeros, budget.bits)
        self.runner = Runner(working, train, val, threat, phases, recipe, start=start, rate=rate)

    def _check_writable(self, model: nn.Module) -> None:
        """Raise ValueError, before any training, for a model that cannot be written to a file and read back."""
        for name, value in model.state_dict().items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(f"tensor {name}: expected finite values, got nan or infinity")
        empty = fold(model).cpu()
        for value in empty.state_dict().values():
            if value.dim() >= 2:
                value.zero_()
        artifact.from_bytes(artifact.to_bytes(empty, **self._metadata), factory=self._plain_copy)

    def _build_rate_control(
        self, model: nn.Module, budget: Budget, method: MethodSpec, recipe: Recipe, train: Images
    ) -> RateControl:
        """Return the rate control of a budget in bytes; raise BudgetTooSmall if no file of the model is that small."""
        assert budget.max_bytes is not None
        probe = probe_images(train)

        def projected_bytes(trained: nn.Module) -> int:
            return len(artifact.to_bytes(finalize_copy(trained, probe), **self._metadata))

        def file_bytes(rounded: nn.Module) -> int:
            return len(artifact.to_bytes(rounded, **self._metadata))

        smallest = file_bytes(smallest_model(model, recipe.exclude, low_rank=method.low_rank))
        if budget.max_bytes < smallest:
            raise BudgetTooSmall(
                f"a budget of {budget.max_bytes:,} bytes is below the smallest file of this model and method, "
                f"{smallest:,} bytes"
            )
        most_bits = (budget.bits or 8) if method.codebook else None
        return RateControl(
            max_bytes=budget.max_bytes,
            smallest=smallest,
            projected_bytes=projected_bytes,
            file_bytes=file_bytes,
            most_bits=most_bits,
            layers=len(compressible_weights(model, exclude=recipe.exclude)),
            dense_weights=self.dense_weights,
        )

    def _plain_copy(self, num_classes: int) -> nn.Module:
        """Build the model that a file is decoded into: the factory of `artifact.from_bytes`."""
        return copy_module(self._plain)

    def run(self, state: State | None = None) -> Iterator[StepDone | EpochDone]:
        """Train, from a saved state if one is given; yield after every step and every epoch."""
        for event in self.runner.run(state):
            if isinstance(event, EpochDone):
                self.records.append(event.record)
            yield event

    def result(self) -> Result:
        """Finalize the trained model, encode it, and decode the file's model."""
        model, choices = self.runner.finalize()
        data = artifact.to_bytes(model, **self._metadata)
        decoded = artifact.from_bytes(data, factory=self._plain_copy)
        return Result(decoded, data, self.records, choices)


def _frozen_weights(model: nn.Module, exclude: tuple[str, ...]) -> list[str]:
    """List the weights that the user has frozen, as patterns: what is not trained is not compressed."""
    with torch.enable_grad():
        return [
            glob.escape(weight.path)
            for weight in compressible_weights(model, exclude=exclude)
            if not weight.tensor.requires_grad
        ]
