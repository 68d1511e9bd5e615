"""The functions of the Python interface: compress(), evaluate(), verify(), load(), save()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from atmc.compress.budget import Budget, check_budget
from atmc.core.arguments import parse_device
from atmc.core.torch_state import prepared_torch
from atmc.data import as_images
from atmc.evaluation.evaluate import evaluate
from atmc.evaluation.user_model import accept_model
from atmc.evaluation.verify.verify import verify
from atmc.pack.artifact import load, save
from atmc.robust.threats import Threat, as_threat
from atmc.training.job import Job, Result
from atmc.training.loop import StepDone
from atmc.training.methods import METHODS
from atmc.training.runner import EpochDone
from atmc.training.settings import PHASES, Recipe, choose_batch_size, choose_objective, default_recipe

__all__ = ["compress", "evaluate", "load", "save", "verify"]


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
    on_event: Callable[[StepDone | EpochDone], None] | None = None,
    **settings: Any,
) -> Result:
    """Train a model to be robust within a budget (Gui et al. 2019), and return it as its file will hold it.

    Args:
        model: any module that maps images (n, c, h, w) in [0, 1] to logits; normalization belongs inside. If it is
            trained already, pass epochs={"dense": 0}. It is not changed.
        train, val: a DataLoader, a dataset of (image, label) pairs, or a pair of tensors; images in [0, 1].
        threat: what the adversary may do, ``Linf(8 / 255)`` or "linf:8/255".
        budget: how many nonzeros or bytes the result may have, and bits per nonzero.
        method: ``atmc`` or one of its baselines, see docs/method.md.
        recipe: how to train; by default made of `settings` and defaults that suit the model and the threat.
        device: where to train.
        on_event: called after every step and epoch.
        settings: fields of `Recipe`, such as epochs=5, objective="trades", objective_options={"beta": 3.0}, seed=1.
            Without an objective the threat and the model decide: see `atmc.training.settings.choose_objective`; without
            a batch size the number of images: see `choose_batch_size` there.

    >>> import atmc
    >>> x, y = torch.rand(64, 1, 28, 28), torch.arange(64) % 10
    >>> result = atmc.compress(atmc.models.build("lenet", 10), (x, y), (x, y), threat=atmc.Linf(0.1),
    ...                        budget=atmc.Budget(ratio=0.01, bits=4), epochs=1)
    >>> result.records[-1].nonzeros <= 4305
    True

    Raises:
        ValueError: images, labels, model, threat, budget or settings are wrong; nothing was trained.
        TrainingDiverged: the loss is not finite.
    """
    if recipe is not None and settings:
        raise ValueError(f"expected a recipe or settings, got both: {', '.join(settings)}")
    device = parse_device(device)
    check_budget(budget)
    threat = as_threat(threat)
    with prepared_torch(device):
        train, val = as_images(train), as_images(val)
        model = accept_model(model, train)
        if recipe is None:
            settings.setdefault("batch_size", choose_batch_size(model, len(train)))
            if "objective" not in settings:
                natural = method in METHODS and METHODS[method].natural
                given = {key: settings[key] for key in ("epochs", "batch_size") if key in settings}
                settings["objective"] = choose_objective(model, train, threat, **given, natural=natural).name
            phases = METHODS[method].phases if method in METHODS else PHASES
            recipe = default_recipe(model, phases=phases, **settings)
        job = Job(model, train, val, threat=threat, budget=budget, method=method, recipe=recipe, device=device)
        for event in job.run():
            if on_event:
                on_event(event)
        return job.result()
