"""`atmc evaluate`: a model file or checkpoint, a data set and a threat -> figures, and files that were asked for."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atmc import models
from atmc.commands.checkpoints import load_weights
from atmc.commands.partial_results import Measured, Parts, measured_certificate, measured_curves
from atmc.core.arguments import parse_device
from atmc.core.files import write_beside
from atmc.core.version import __version__
from atmc.data import Data, Images, load_data
from atmc.evaluation import adversarial_file, resume, smoothing
from atmc.evaluation.accuracy import BatchAttacked
from atmc.evaluation.evaluate import EvaluationOptions, Report, run_evaluation
from atmc.evaluation.suspect import Check
from atmc.pack import artifact
from atmc.pack.artifact import LoadedModel
from atmc.report.gallery import chosen, gallery
from atmc.robust.threats import Threat

AGAINST, PARTS = ".against", ".parts"  # states of the other model's attacks, and of curves and certificate
WEIGHTS = (".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class Request:
    """What `atmc evaluate` was asked for; the fields are its options."""

    file: Path
    data: str
    threat: Threat
    options: EvaluationOptions = field(default_factory=EvaluationOptions)
    model: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    device: str = "cpu"
    transfer_from: Path | None = None
    against: Path | None = None
    replay: Path | None = None
    save_examples: Path | None = None
    gallery: Path | None = None
    curves: int | None = None
    certify: float | None = None
    certify_samples: int = 10_000
    json_path: Path | None = None
    resume: bool = False
    overwrite: bool = False

    def state_path(self, of: str = "") -> Path | None:
        """Where an evaluation with --json keeps its state while it runs: its attacks', or `of` another part."""
        return self.json_path.with_name(f"{self.json_path.name}{of}.state") if self.json_path else None

    def existing_states(self) -> dict[str, Path]:
        """Those of these files that are there."""
        paths = {of: self.state_path(of) for of in ("", AGAINST, PARTS)}
        return {of: path for of, path in paths.items() if path and path.exists()}

    def uses(self, of: str) -> bool:
        """Whether what is asked for has such a part."""
        return {AGAINST: self.against is not None, PARTS: bool(self.curves) or self.certify is not None}.get(of, True)


@dataclass(frozen=True)
class Assessed:
    """The evaluation is done: its figures, as in --json."""

    figures: dict[str, Any]


def assess(request: Request) -> Iterator[BatchAttacked | Check | Measured | Report | Assessed]:
    """Carry a request out; yields what happens, and at last `Assessed`.

    Raises:
        ValueError: something asked for makes no sense; nothing was attacked or written.
    """
    _check_outputs(request)
    parse_device(request.device)
    if request.file.suffix in WEIGHTS and not request.model:
        raise ValueError(f"{request.file} holds weights only: name their model with --model")
    if request.curves is not None and request.curves < 1:
        raise ValueError(f"expected at least 1 image for the curves, got {request.curves}")
    if request.certify is not None:
        smoothing.check_settings(request.threat, request.certify, request.certify_samples)
    stored = adversarial_file.read(request.replay) if request.replay else None
    loaded = open_model(request.file, request.model) if request.file.suffix not in WEIGHTS else None
    data = load_data(request.data, image_column=request.image_column, label_column=request.label_column)
    loaded = loaded or open_model(request.file, request.model, data)
    model = loaded.model.to(request.device)
    check_size(loaded, data)
    if stored is not None and stored.adv.shape[1:] != data.test.pixels.shape[1:]:
        shapes = f"{tuple(stored.adv.shape[1:])}, the data {tuple(data.test.pixels.shape[1:])}"
        raise ValueError(f"{request.replay} holds images of shape {shapes}")
    source = open_model(request.transfer_from, request.model, data).model if request.transfer_from else None
    other = None
    if request.against:
        loaded_other = open_model(request.against, request.model, data)
        other = loaded_other.model.to(request.device)
        check_size(loaded_other, data)
    for path in () if request.resume else request.existing_states().values():
        path.unlink()
    parts = _parts(request, model, data.test)
    keep = request.save_examples is not None or request.gallery is not None
    options = replace(request.options, state=request.state_path(), keep=keep)
    figures: dict[str, Any] = {"model": str(request.file), "data": request.data, "threat": str(request.threat)}
    figures["seed"] = options.seed
    report = None
    for event in run_evaluation(model, data.test, request.threat, options, source=source and source.to(request.device)):
        yield event
        report = event if isinstance(event, Report) else None
    assert report is not None
    figures |= report.to_json() | {"per_class": report.per_class(), "seconds": report.seconds}
    if other is not None:
        yield from _against(request, other, report, data, options, figures)
    figures |= yield from _more(request, model, data.test, report, parts)
    figures["versions"] = {"atmc": __version__, "torch": torch.__version__}
    if request.json_path:
        write_beside(request.json_path, (json.dumps(figures, indent=1) + "\n").encode())
    for path in request.existing_states().values():
        path.unlink()
    yield Assessed(figures)


def _parts(request: Request, model: nn.Module, test: Images) -> Parts:
    """What there is of curves and certificate."""
    if not (request.json_path and request.uses(PARTS)):
        return Parts(None, "")
    about = {"threat": str(request.threat), "seed": request.options.seed, "atmc": __version__}
    return Parts(request.state_path(PARTS), resume.compute_fingerprint(model, test, len(test), **about))


def _check_outputs(request: Request) -> None:
    """Nothing that is there is overwritten unasked, and a state is gone on with only when asked."""
    for path in (request.json_path, request.save_examples, request.gallery):
        if path and not path.parent.is_dir():
            raise ValueError(f"there is no folder {path.parent} to write {path.name} into")
        if path and path.exists() and not request.overwrite:
            raise ValueError(f"{path} exists: add --overwrite to replace it")
    if request.save_examples and request.save_examples.suffix != ".npz":
        raise ValueError(f"expected a name that ends in .npz for the examples, got {request.save_examples}")
    if request.resume and not request.json_path:
        raise ValueError("--resume needs --json: the state of an evaluation lies beside that file")
    for of, path in request.existing_states().items():
        if not (request.resume or request.overwrite):
            raise ValueError(f"{path} holds an unfinished evaluation: add --resume to go on with it or --overwrite")
        if request.resume and not request.uses(of):
            raise ValueError(f"{path} holds part of an evaluation that is not asked for now: ask for it, or remove it")


def open_model(path: Path, model: str | None, data: Data | None = None) -> LoadedModel:
    """The model of an .atmc file, or a zoo model or own class (`model`) with the weights of another checkpoint.

    Args:
        data: what a checkpoint's model is for; its mean and deviation normalize a zoo model, as in `compress`.

    Raises:
        ValueError: the file is missing, damaged or of another model, or a checkpoint came without a model's name.
    """
    if path.suffix not in WEIGHTS:
        return artifact.open(path, factory=models.import_factory(model) if model and ":" in model else None)
    if model is None:
        raise ValueError(f"{path} holds weights only: name their model with --model")
    assert data is not None
    mean, std = (None, None) if ":" in model else (data.mean, data.std)
    network = models.build(model, data.num_classes, input_shape=data.input_shape, mean=mean, std=std)
    load_weights(network, str(path))
    return LoadedModel(network.eval(), factors={}, metadata={}, source=str(path))


def known_shape(loaded: LoadedModel) -> tuple[int, int, int]:
    """Return (c, h, w) of the images that a model file is for. Raises ValueError if the file does not say it."""
    shape = loaded.input_shape
    if shape is None:
        raise ValueError(f"{loaded.source} does not say what images its model takes: add --data")
    return shape


def check_size(loaded: LoadedModel, data: Data) -> None:
    """Raise ValueError if a model file says that it takes images of another shape than the data have."""
    shape = loaded.input_shape
    if shape is not None and shape != data.input_shape:
        raise ValueError(
            f"{loaded.source} is for images of shape {shape} and does not take images of shape {data.input_shape}, "
            f"as {data.name} has them"
        )


def _against(
    request: Request, other: nn.Module, report: Report, data: Data, options: EvaluationOptions, figures: dict[str, Any]
) -> Iterator[BatchAttacked | Check]:
    """The other model through the same, and McNemar's test, put into figures."""
    second, second_options = None, replace(options, state=request.state_path(AGAINST), keep=False)
    for event in run_evaluation(other, data.test, request.threat, second_options):
        if isinstance(event, Report):
            second = event
        else:
            yield event
    assert second is not None
    tests = {name: found.to_json() for name, found in report.compared(second).items()}
    figures["against"] = {"model": str(request.against), **second.to_json(), "comparison": tests}


def _more(
    request: Request, model: nn.Module, test: Images, report: Report, parts: Parts
) -> Generator[Measured, None, dict[str, Any]]:
    """Curves, replayed and saved examples, the gallery and the certificate, as far as they were asked for."""
    found: dict[str, Any] = {}
    images, seed = test.to(torch.device(request.device)), request.options.seed
    if request.curves:
        n = min(request.curves, len(test))
        found["curves"] = yield from measured_curves(parts, model, images, request.threat, n)
    if request.replay:
        found["replay"] = {"file": str(request.replay), **adversarial_file.replay(request.replay, model).to_json()}
    if request.certify is not None:
        n = request.options.number(request.options.attacks[0]) or len(test)
        found["smoothing"] = yield from measured_certificate(
            parts, model, images, request.certify, n, request.certify_samples, seed
        )
    if request.save_examples or request.gallery:
        about = {"threat": str(request.threat), "seed": request.options.seed, "model": str(request.file)}
        kept = adversarial_file.collect(model, report.labels, report.attacks, **about)
        if request.save_examples:
            kept.save(request.save_examples)
        if request.gallery:
            clean = test.float_pixels(slice(0, len(kept.labels))).cpu()
            shown = chosen(model, clean, kept.adv, kept.labels)
            write_beside(request.gallery, gallery(shown, request.threat))
    return found
