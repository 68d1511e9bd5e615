"""One configuration -> one run folder, resumable after a kill at any moment.

A folder holds config.toml, log.jsonl, checkpoint/ while running, and in the end model.atmc, metrics.json, report.html.
The checkpoint of an epoch is written beside the old one and renamed; it says how many lines the log had.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atmc import models
from atmc.commands.checkpoints import UNREADABLE, load_weights
from atmc.commands.config import RunConfig, parse, read_toml
from atmc.commands.outputs import FolderInUse, check_run_folder, clear_run_folder, lock_run_folder, write_json
from atmc.compress.factorize import fold
from atmc.core.files import append_line, write_beside
from atmc.core.numerics import deterministic
from atmc.core.version import __version__
from atmc.data import Data, load_data
from atmc.evaluation.attacks import Custom, paper_steps
from atmc.evaluation.evaluate import EvaluationOptions, Report, run_evaluation
from atmc.pack import artifact
from atmc.report.report import write_report
from atmc.training.job import Job, Result
from atmc.training.runner import EpochDone, State
from atmc.training.settings import Recipe


@dataclass(frozen=True)
class Message:
    """Another part of a run begins; text for a person. From here on `resume` goes on, where resumable."""

    text: str
    resumable: bool = True


@dataclass(frozen=True)
class Finished:
    """The run is complete: its metrics, as in metrics.json."""

    metrics: dict[str, Any]


def run(config: RunConfig, folder: Path, *, resume: bool = False, overwrite: bool = False) -> Iterator[Any]:
    """Carry a run out; yields `Message`, `StepDone`, `EpochDone`, the evaluation's events and at last `Finished`.

    Raises:
        ValueError: the configuration, its data, checkpoint or folder are not as they must be; nothing was lost.
    """
    config = config.resolved()
    if config.threads:
        torch.set_num_threads(config.threads)
    resuming = check_run_folder(folder, resume=resume, overwrite=overwrite)
    yield Message(f"reading {config.data}", resumable=resuming)
    data = load_data(
        config.data, image_column=config.image_column, label_column=config.label_column, limit=config.limit
    )
    model = build_model(config, data)
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
    if resuming:
        _expect_same(config, parse(read_toml(folder / "config.toml"), str(folder / "config.toml")), folder)
        if (folder / "metrics.json").exists():
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)  # killed before it was taken away
            yield Finished(json.loads((folder / "metrics.json").read_text()))
            return
    with lock_run_folder(folder), deterministic(torch.device(config.device)):
        if resuming != check_run_folder(folder, resume=resume, overwrite=overwrite):
            raise FolderInUse(f"{folder} was changed by another run meanwhile")
        yield Message(_what_is_used(data, job.recipe))
        if not resuming:
            clear_run_folder(folder)
            write_beside(folder / "config.toml", config.to_toml().encode())
        yield from _train_and_judge(job, config, data, folder)


def _what_is_used(data: Data, recipe: Recipe) -> str:
    """'training on 1,294 images, validating on 143, 20 of them under attack', and how many there are if not on all."""
    there = len(data.val)
    clean, attacked = min(recipe.val_clean_n or there, there), min(recipe.val_n, there)
    of_all = f" of {there:,}" if clean < there else ""
    return f"training on {len(data.train):,} images, validating on {clean:,}{of_all}, under attack on {attacked:,}"


def _train_and_judge(job: Job, config: RunConfig, data: Data, folder: Path) -> Iterator[Any]:
    state, spent = _read_checkpoint(folder)
    began = time.monotonic() - spent
    for event in job.run(state):
        if isinstance(event, EpochDone):
            append_line(folder / "log.jsonl", json.dumps(asdict(event.record)))
            _write_checkpoint(folder, event.state, time.monotonic() - began)
        yield event
    yield Message("last choices on the validation split")
    result = job.result()
    size = result.save(folder / "model.atmc")
    yield Message("evaluating the file on the test split")
    device = torch.device(config.device)
    decoded = artifact.load(folder / "model.atmc", factory=lambda num_classes: fold(build_model(config, data)))
    steps = config.steps if {"pgd", "pgd-strong"} & set(config.attacks) else None
    options = EvaluationOptions(tuple(config.attacks), config.eval_n, Custom(steps), config.seed, config.checks)
    report = None
    for judged in run_evaluation(decoded.to(device), data.test, config.parsed_threat(), options):
        yield judged
        report = judged if isinstance(judged, Report) else None
    assert report is not None
    metrics = _metrics(job, result, config, report, size, time.monotonic() - began)
    threat = config.parsed_threat()
    write_report(
        folder,
        metrics,
        decoded.cpu(),
        data.test,
        threat=threat,
        steps=config.steps or paper_steps(threat),
        config_toml=config.to_toml(),
        class_names=data.class_names,
    )
    write_json(folder / "metrics.json", metrics)
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    yield Finished(metrics)


def _metrics(job: Job, result: Result, config: RunConfig, report: Report, size: int, seconds: float) -> dict[str, Any]:
    decided = result.decided
    return {
        "method": config.method,
        "model": config.model,
        "data": config.data,
        "threat": config.threat,
        "seed": config.seed,
        "file_bytes": size,
        "max_bytes": config.budget().max_bytes,
        "dense_file_bytes": sum(4 * value.numel() for value in result.model.state_dict().values()),
        "nominal_bits": decided.size.nominal_bits,
        "nominal_ratio": decided.size.nominal_bits / (32 * job.dense_weights),
        "nonzeros": decided.size.nonzeros,
        "dense_weights": job.dense_weights,
        "bits": decided.size.bits,
        **report.to_json(),
        "validation": {
            "clean": decided.clean.to_json(),
            "pgd": decided.robust.to_json(),
            "fp16": decided.fp16,
            "batch_norm_reestimated": decided.batch_norm,
            "before_rounding": {"clean": decided.unrounded[0].to_json(), "pgd": decided.unrounded[1].to_json()},
            "idle_dropped": decided.idle,
            "pruned_to_fit": decided.pruned,
        },
        "evaluated_on": "model.atmc",
        "seconds": round(seconds, 1),
        "versions": {"atmc": __version__, "torch": torch.__version__},
    }


def build_model(config: RunConfig, data: Data) -> nn.Module:
    """The configuration's model for its data, with a checkpoint's weights if one is named.

    Raises:
        ValueError: unknown model, or a checkpoint that is missing, damaged or of another model.
    """
    own = ":" in config.model  # a user's factory normalizes by itself
    mean, std = (data.mean, data.std) if config.normalize and not own else (None, None)
    options = {} if config.dropout is None else {"dropout": config.dropout}
    model = models.build(
        config.model, data.num_classes, input_shape=data.input_shape, mean=mean, std=std, seed=config.seed, **options
    )
    if config.checkpoint:
        load_weights(model, config.checkpoint, factorized=config.method == "atmc")
    return model


def _expect_same(asked: RunConfig, stored: RunConfig, folder: Path) -> None:
    """A resumed run goes on as it began."""
    ours, theirs = asked.model_dump(), stored.model_dump()
    flat = {key: (ours[key], theirs[key]) for key in ours if key != "training"}
    for key, value in theirs["training"].items():  # one that is not there is younger than the run, or at its default
        before = getattr(Recipe, key, None) if value is None else value
        flat[f"training.{key}"] = (ours["training"][key], list(before) if isinstance(before, tuple) else before)
    changed = [f"{key} was {before!r}, is {now!r}" for key, (now, before) in flat.items() if now != before]
    if changed:
        raise ValueError(f"{folder} was begun with other settings: {'; '.join(changed)}")


def _write_checkpoint(folder: Path, state: State, seconds: float) -> None:
    buffer = BytesIO()
    lines = len((folder / "log.jsonl").read_text().splitlines())
    torch.save({"state": vars(state), "log_lines": lines, "seconds": seconds}, buffer)
    (folder / "checkpoint").mkdir(exist_ok=True)
    write_beside(folder / "checkpoint" / "state.pt", buffer.getvalue())


def _read_checkpoint(folder: Path) -> tuple[State | None, float]:
    """The saved state and the seconds spent; the log is cut back to the lines that belong to it."""
    path, log = folder / "checkpoint" / "state.pt", folder / "log.jsonl"
    if not path.exists():
        log.unlink(missing_ok=True)
        return None, 0.0
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        state, lines, seconds = State(**saved["state"]), int(saved["log_lines"]), float(saved["seconds"])
    except UNREADABLE as error:
        raise ValueError(f"the run's own checkpoint {path} is damaged: start again with --overwrite") from error
    kept = log.read_text().splitlines(keepends=True)[:lines] if log.exists() else []
    write_beside(log, "".join(kept).encode())
    return state, seconds
