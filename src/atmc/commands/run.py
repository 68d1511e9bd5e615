"""`atmc compress`: a configuration -> a run folder, which can be resumed after the process was killed at any moment.

A folder holds config.toml, log.jsonl and, while the run is unfinished, checkpoint/ (`commands.checkpoints`); at the end
also model.atmc, metrics.json and report.html.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atmc import models
from atmc.commands.checkpoints import load_weights, read_run_state, write_run_state
from atmc.commands.config import RunConfig, check_same, parse, read_toml
from atmc.commands.outputs import (
    CHECKPOINT,
    CONFIG,
    LOG,
    METRICS,
    MODEL,
    REPORT,
    FolderInUse,
    check_run_folder,
    clear_run_folder,
    lock_run_folder,
    write_json,
)
from atmc.compress.factorize import fold
from atmc.core.files import append_line, write_beside
from atmc.core.torch_state import prepared_torch
from atmc.core.version import __version__
from atmc.data import Data, Images, load_data
from atmc.evaluation.accuracy import predictions
from atmc.evaluation.attacks import takes_pgd_settings
from atmc.evaluation.evaluate import EvaluationOptions, Report, run_evaluation
from atmc.evaluation.user_model import accept_model
from atmc.evaluation.verify.verify import Verification, VerifyOptions, run_verification
from atmc.pack import artifact
from atmc.report.report import write_report
from atmc.robust.attacks import PgdSettings
from atmc.robust.objectives import OBJECTIVES
from atmc.training.job import Job, Result
from atmc.training.methods import METHODS
from atmc.training.runner import EpochDone
from atmc.training.settings import Recipe, choose_batch_size

VERIFIED = 1000  # test images that are verified unless eval_n is a number


@dataclass(frozen=True)
class Message:
    """A part of a run begins.

    Args:
        text: what it does, in words.
        resumable: whether the run can be resumed if it is interrupted from here on.
    """

    text: str
    resumable: bool = True


@dataclass(frozen=True)
class Finished:
    """The run is complete: its metrics, as in metrics.json."""

    metrics: dict[str, Any]


def run(config: RunConfig, folder: Path, *, resume: bool = False, overwrite: bool = False) -> Iterator[Any]:
    """Train, write, evaluate and report; yield `Message`, events of training and evaluation, at last `Finished`.

    Raises:
        ValueError: the configuration, its data, its checkpoint or the folder is wrong; nothing was overwritten.
        TrainingDiverged: the loss is not finite.
    """
    config = config.resolved()
    if config.threads:
        torch.set_num_threads(config.threads)
    resuming = check_run_folder(folder, resume=resume, overwrite=overwrite)
    yield Message(f"reading {config.data}", resumable=resuming)
    data = load_data(
        config.data, image_column=config.image_column, label_column=config.label_column, limit=config.limit
    )
    if data.unused:
        yield Message(f"not used of {config.data}: {', '.join(data.unused)}", resumable=resuming)
    model = accept_model(build_model(config, data), data.train)
    stored = parse(read_toml(folder / CONFIG), str(folder / CONFIG)) if resuming else None
    for name in ("objective", "batch_size"):  # their defaults may have been others when the run was started
        if stored and getattr(config.training, name) is None:
            config = config.with_training(**{name: getattr(stored.training, name)})
    if config.training.batch_size is None:
        config = config.with_training(batch_size=choose_batch_size(model, len(data.train)))
    if config.training.objective is None:
        choice = config.choose_objective(model, data.train)
        config = config.with_training(objective=choice.name)
        text = f"objective: {choice.name}, the default for {config.threat}, because {choice.reason}"
        yield Message(text, resumable=resuming)
    job = Job(
        model,
        data.train,
        data.val,
        threat=config.parsed_threat(),
        budget=config.budget(),
        method=config.method,
        recipe=config.recipe(model),
        device=torch.device(config.device),
        classes=data.num_classes,
    )
    config = config.completed(job.recipe)
    if stored:
        check_same(config, stored, str(folder))
        if (folder / METRICS).exists():
            # the process may have been killed between writing the metrics and this
            metrics = json.loads((folder / METRICS).read_text())
            if not (folder / REPORT).exists():
                _write_report(folder, metrics, config, data)
            shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
            yield Finished(metrics)
            return
    proving, obstacle = _decide_proofs(config, model, data)
    if obstacle:
        yield Message(f"no proofs of the test images: {obstacle}", resumable=resuming)
    with lock_run_folder(folder), prepared_torch(torch.device(config.device)):
        if resuming != check_run_folder(folder, resume=resume, overwrite=overwrite):
            raise FolderInUse(f"{folder} was changed by another run meanwhile")
        yield Message(_describe_images(data, job.recipe))
        if not resuming:
            clear_run_folder(folder)
            write_beside(folder / CONFIG, config.to_toml().encode())
        yield from _train_and_evaluate(job, config, data, folder, proving=proving)


def _decide_proofs(config: RunConfig, model: nn.Module, data: Data) -> tuple[bool, str]:
    """Return whether the file will be verified; and what prevents it, if the objective would have it so.

    Args:
        config: with its objective.

    Raises:
        ValueError: the configuration asks for proofs, and none can be given for the model or the threat.
    """
    wanted = OBJECTIVES[config.training.objective].certified if config.verify is None else config.verify
    if not wanted:
        return False, ""
    try:
        x = data.train.float_pixels([0])
        images = Images(x, predictions(model, x))  # the model is right, so that a proof is tried
        verification = run_verification(model, images, config.parsed_threat(), VerifyOptions(n=1))
        list(islice(verification, 2))  # the clean pass and the proof by intervals
    except ValueError as error:
        if config.verify:
            raise
        return False, str(error)
    return True, ""


def _describe_images(data: Data, recipe: Recipe) -> str:
    """Return 'training on 1,294 images, validating on 100 of 143, under attack on 20'; without 'of' if it is all."""
    available = len(data.val)
    clean, attacked = min(recipe.val_clean_n or available, available), min(recipe.val_n, available)
    of_all = f" of {available:,}" if clean < available else ""
    return f"training on {len(data.train):,} images, validating on {clean:,}{of_all}, under attack on {attacked:,}"


def _train_and_evaluate(job: Job, config: RunConfig, data: Data, folder: Path, *, proving: bool) -> Iterator[Any]:
    """Train, from the folder's checkpoint if there is one, evaluate, verify if asked to, and write the run's files."""
    state, spent = read_run_state(folder)
    began = time.monotonic() - spent
    for event in job.run(state):
        if isinstance(event, EpochDone):
            append_line(folder / LOG, json.dumps(asdict(event.record)))
            write_run_state(folder, event.state, time.monotonic() - began)
        yield event
    yield Message("choosing rounding and forms on the validation split")
    result = job.result()
    size = result.save(folder / MODEL)
    yield Message("evaluating the file on the test split")
    device = torch.device(config.device)
    loaded = artifact.open(folder / MODEL, factory=lambda num_classes: fold(build_model(config, data)))
    decoded, threat = accept_model(loaded.model, data.test), config.parsed_threat()
    options = EvaluationOptions(
        attacks=tuple(config.attacks),
        n=config.eval_n,
        steps=config.steps if takes_pgd_settings(config.attacks) else None,
        seed=config.seed,
        checks=config.checks,
    )
    report = None
    for measured in run_evaluation(decoded.to(device), data.test, threat, options):
        yield measured
        report = measured if isinstance(measured, Report) else None
    assert report is not None
    figures = report.to_json()
    if proving:
        figures |= yield from _verify(loaded, config, data)
    metrics = _build_metrics(job, result, config, figures, size, time.monotonic() - began)
    write_json(folder / METRICS, metrics)  # before the page, which is made of them
    _write_report(folder, metrics, config, data)
    shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
    yield Finished(metrics)


def _write_report(folder: Path, metrics: dict[str, Any], config: RunConfig, data: Data) -> None:
    """Write report.html from the folder's files."""
    loaded = artifact.open(folder / MODEL, factory=lambda num_classes: fold(build_model(config, data)))
    threat = config.parsed_threat()
    write_report(
        folder,
        metrics,
        accept_model(loaded.model, data.test),
        data.test,
        threat=threat,
        pgd=PgdSettings.paper(threat, steps=config.steps),
        config_toml=config.to_toml(),
        class_names=data.class_names,
    )


def _verify(loaded: artifact.LoadedModel, config: RunConfig, data: Data) -> Generator[Any, None, dict[str, Any]]:
    """Verify the file's model on test images by intervals; yield the events, return what metrics.json gets."""
    yield Message("verifying the file on the test split")
    n = config.eval_n if isinstance(config.eval_n, int) else VERIFIED
    options = VerifyOptions(n=n, linear=False, seed=config.seed, keep=False)
    verification = None
    for event in run_verification(loaded.model, data.test, config.parsed_threat(), options, factors=loaded.factors):
        yield event
        verification = event if isinstance(event, Verification) else None
    assert verification is not None
    figures = verification.to_json()
    return {name: figures[name] for name in ("certified", "attacked")}


def _build_metrics(
    job: Job, result: Result, config: RunConfig, figures: dict[str, Any], size: int, seconds: float
) -> dict[str, Any]:
    """Return what metrics.json holds.

    Args:
        figures: of the evaluation and the verification.
        size: of the file, in bytes.
        seconds: the time of the whole run.
    """
    choices = result.decided
    robust = "interval" if OBJECTIVES[job.recipe.objective].certified else job.recipe.val_attack
    return {
        "method": config.method,
        "objective": job.recipe.objective,
        "model": config.model,
        "data": config.data,
        "threat": config.threat,
        "seed": config.seed,
        "file_bytes": size,
        "max_bytes": config.budget().max_bytes,
        "dense_file_bytes": sum(4 * value.numel() for value in result.model.state_dict().values()),
        "nominal_bits": choices.size.nominal_bits,
        "nominal_ratio": choices.size.nominal_bits / (32 * job.dense_weights),
        "nonzeros": choices.size.nonzeros,
        "dense_weights": job.dense_weights,
        "bits": choices.size.bits,
        **figures,
        "validation": {
            "clean": choices.clean.to_json(),
            robust: choices.robust.to_json(),
            "fp16": choices.fp16,
            "batch_norm_reestimated": choices.batch_norm,
            "before_rounding": {"clean": choices.unrounded[0].to_json(), robust: choices.unrounded[1].to_json()},
            "idle_dropped": choices.dead_weights,
            "pruned_to_fit": choices.pruned,
        },
        "evaluated_on": MODEL,
        "seconds": round(seconds, 1),
        "versions": {"atmc": __version__, "torch": torch.__version__},
    }


def build_model(config: RunConfig, data: Data) -> nn.Module:
    """Build the configuration's model for its data, with a checkpoint's weights if one is named.

    Raises:
        ValueError: the model is unknown, or the checkpoint is missing, damaged or of another model.
    """
    own = ":" in config.model  # a user's factory normalizes by itself
    mean, std = (data.mean, data.std) if config.normalize and not own else (None, None)
    options = {} if config.dropout is None else {"dropout": config.dropout}
    model = models.build(
        config.model, data.num_classes, input_shape=data.input_shape, mean=mean, std=std, seed=config.seed, **options
    )
    if config.checkpoint:
        load_weights(model, config.checkpoint, factorized=METHODS[config.method].factors)
    return model
