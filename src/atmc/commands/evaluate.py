"""`atmc evaluate`: models, a data set and a threat -> figures, and the files that were asked for."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atmc.commands.model_files import check_image_shape, check_named, open_model
from atmc.commands.outputs import check_absent, check_examples_file, check_parent, write_json
from atmc.commands.partial_results import PartialResults, PartMeasured, measure_certificate, measure_curves
from atmc.core.arguments import parse_device
from atmc.core.files import write_beside
from atmc.core.version import __version__
from atmc.data import Data, Images, load_data
from atmc.evaluation import adversarial_file, resume, smoothing
from atmc.evaluation.accuracy import BatchAttacked
from atmc.evaluation.checks import Check
from atmc.evaluation.evaluate import EvaluationOptions, Report, run_evaluation
from atmc.evaluation.user_model import accept_model
from atmc.pack.artifact import LoadedModel
from atmc.report.gallery import draw_gallery, select_fooled
from atmc.robust.threats import Threat

OWN, AGAINST, PARTS = "", ".against", ".parts"  # states: of the model, of --against, of curves and certificate


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """What `atmc evaluate` was asked for; the fields are its options.

    Args:
        files: model files or checkpoints, evaluated one after the other.
        json_path: the file for the figures of one model, or the folder for those of several.
    """

    files: tuple[Path, ...]
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

    def needs(self, state: str) -> bool:
        """Return whether what was asked for keeps such a state."""
        if state == AGAINST:
            return self.against is not None
        return state != PARTS or bool(self.curves) or self.certify is not None

    def identify(self, file: Path) -> dict[str, Any]:
        """Return all that decides the figures of one file, as JSON: options, and digests of the files that are read.

        Raises:
            OSError: a file cannot be read.
        """
        options = {name: value for name, value in asdict(self.options).items() if name not in ("keep", "state")}
        identity = {"data": self.data, "threat": str(self.threat), **options, "model": self.model}
        identity |= {"image_column": self.image_column, "label_column": self.label_column}
        identity |= {"curves": self.curves, "certify": self.certify, "certify_samples": self.certify_samples}
        read = {"file": file, "transfer_from": self.transfer_from, "against": self.against, "replay": self.replay}
        identity |= {name: path and hashlib.sha256(path.read_bytes()).hexdigest() for name, path in read.items()}
        values: dict[str, Any] = json.loads(json.dumps(identity))
        return values


@dataclass(frozen=True)
class FileStarted:
    """The evaluation of one of several files begins; positions count from 1."""

    file: Path
    position: int
    total: int


@dataclass(frozen=True)
class Evaluated:
    """One file is evaluated, now or in an earlier call: its figures, as in --json."""

    figures: dict[str, Any]


@dataclass(frozen=True)
class _Output:
    """The paths for the figures of one file, and for its states while it is evaluated; None: nothing is kept."""

    json_path: Path | None

    def state_path(self, state: str) -> Path | None:
        return self.json_path.with_name(f"{self.json_path.name}{state}.state") if self.json_path else None

    def existing_states(self) -> dict[str, Path]:
        paths = {state: self.state_path(state) for state in (OWN, AGAINST, PARTS)}
        return {state: path for state, path in paths.items() if path and path.exists()}

    def remove_states(self) -> None:
        for path in self.existing_states().values():
            path.unlink()


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What the evaluation of every file uses."""

    data: Data
    source: nn.Module | None
    other: nn.Module | None
    examples: adversarial_file.AdversarialExamples | None


def evaluate(
    request: EvaluateRequest,
) -> Iterator[FileStarted | BatchAttacked | Check | PartMeasured | Report | Evaluated]:
    """Evaluate the files of a request; yield the events of each evaluation, and an `Evaluated` at the end of each.

    Raises:
        ValueError: the request makes no sense; what concerns all files is checked before anything is attacked.
        OSError: a file cannot be read or written.
    """
    _check_request(request)
    examples = adversarial_file.read(request.replay) if request.replay else None
    outputs = _choose_outputs(request)
    identities = [request.identify(file) for file in request.files]
    earlier = [_read_figures(request, output, identity) for output, identity in zip(outputs, identities, strict=True)]
    for output, figures in zip(outputs, earlier, strict=True):
        if figures is None:
            _check_output(request, output)
    inputs = _open_inputs(request, examples) if None in earlier else None
    jobs = zip(request.files, outputs, identities, earlier, strict=True)
    for position, (file, output, identity, figures) in enumerate(jobs, 1):
        if len(request.files) > 1:
            yield FileStarted(file, position, len(request.files))
        if figures is not None:
            output.remove_states()
            yield Evaluated(figures)
        else:
            assert inputs is not None
            yield from _evaluate_file(request, file, output, identity, inputs)


def _check_request(request: EvaluateRequest) -> None:
    """Raise ValueError for what is wrong in a request whatever the files hold."""
    parse_device(request.device)
    for file in request.files:
        check_named(file, request.model)
    if request.curves is not None and request.curves < 1:
        raise ValueError(f"expected at least 1 image for the curves, got {request.curves}")
    if request.certify is not None:
        smoothing.check_settings(request.threat, request.certify, request.certify_samples)
    if len(request.files) > 1 and (request.save_examples or request.gallery):
        raise ValueError("--save-examples and --gallery write the images of one model: evaluate one file at a time")
    if request.save_examples:
        check_examples_file(request.save_examples)
    if request.gallery:
        check_parent(request.gallery)
    if request.resume and not request.json_path:
        raise ValueError("--resume needs --json: the state of an evaluation lies beside that file")


def _choose_outputs(request: EvaluateRequest) -> list[_Output]:
    """Return the output of each file: of several files, or in a folder that exists, one JSON file per model."""
    folder = request.json_path
    if folder is None:
        return [_Output(None) for _ in request.files]
    check_parent(folder)
    if folder.is_dir():
        return [_Output(folder / f"{name}.json") for name in name_files(request.files)]
    if len(request.files) == 1:
        return [_Output(folder)]
    if folder.exists():
        raise ValueError(f"{folder} is a file: give a folder, for the figures of several models")
    return [_Output(folder / f"{name}.json") for name in name_files(request.files)]


def name_files(files: Sequence[Path]) -> list[str]:
    """Return a name for each model file, all different: that of its run folder, else its own, with folders if needed.

    >>> name_files([Path("runs/a/model.atmc"), Path("b.atmc"), Path("old/a/model.atmc")])
    ['runs-a', 'b', 'old-a']

    Raises:
        ValueError: a file is given twice, or two files cannot get different names.
    """
    parts = [(*file.absolute().parts[1:-1], *([] if file.name == "model.atmc" else [_stem(file)])) for file in files]
    depths = [1] * len(files)
    while True:
        names = ["-".join(path[-depth:]) for path, depth in zip(parts, depths, strict=True)]
        counts = Counter(names)
        if max(counts.values(), default=1) == 1:
            return names
        longer = [
            depth + (counts[name] > 1 and depth < len(path))
            for name, path, depth in zip(names, parts, depths, strict=True)
        ]
        if longer == depths:
            same = " and ".join(str(file) for file, name in zip(files, names, strict=True) if counts[name] > 1)
            raise ValueError(f"the figures of {same} would be written to the same file: name each model once")
        depths = longer


def _stem(file: Path) -> str:
    return file.name.removesuffix(".atmc")


def _read_figures(request: EvaluateRequest, output: _Output, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return the figures that an earlier call with the same request wrote, if this one resumes; None without any.

    Raises:
        ValueError: the figures are of another request.
    """
    path = output.json_path
    if not (request.resume and path and path.is_file()):
        return None
    try:
        figures = json.loads(path.read_bytes())
        earlier = dict(figures["request"])
    except (ValueError, KeyError, TypeError):  # not the figures of such a call: `_check_output` refuses the file
        return None
    if earlier == identity:
        return dict(figures)
    if request.overwrite:
        return None
    changed = [
        f"{key} was {earlier.get(key)!r}, is {identity.get(key)!r}"
        for key in {**earlier, **identity}
        if earlier.get(key) != identity.get(key)
    ]
    raise ValueError(f"{path} is of another evaluation ({'; '.join(changed)}): add --overwrite to replace it")


def _check_output(request: EvaluateRequest, output: _Output) -> None:
    """Raise ValueError if the evaluation would replace what exists, or leave a state that it does not continue."""
    for path in (output.json_path, request.save_examples, request.gallery):
        if path:
            check_absent(path, overwrite=request.overwrite)
    for state, path in output.existing_states().items():
        if not (request.resume or request.overwrite):
            raise ValueError(
                f"{path} holds an unfinished evaluation: add --resume to continue it or --overwrite to start again"
            )
        if request.resume and not request.needs(state):
            raise ValueError(f"{path} holds part of an evaluation that is not asked for now: ask for it, or remove it")


def _open_inputs(request: EvaluateRequest, examples: adversarial_file.AdversarialExamples | None) -> _Inputs:
    """Load the data, and the models of --transfer-from and --against."""
    data = load_data(request.data, image_column=request.image_column, label_column=request.label_column)
    shape = tuple(data.test.pixels.shape[1:])
    if examples is not None and examples.adv.shape[1:] != shape:
        replayed = tuple(examples.adv.shape[1:])
        raise ValueError(f"{request.replay} holds images of shape {replayed}, the data have images of shape {shape}")
    source = open_model(request.transfer_from, request.model, data).model if request.transfer_from else None
    other = _open_checked(request, request.against, data).model if request.against else None
    return _Inputs(data=data, source=source and source.to(request.device), other=other, examples=examples)


def _open_checked(request: EvaluateRequest, file: Path, data: Data) -> LoadedModel:
    """Open a model of the request, on its device, and check that it takes the data's images."""
    loaded = open_model(file, request.model, data)
    check_image_shape(loaded, data)
    loaded.model.to(request.device)
    return loaded


def _evaluate_file(
    request: EvaluateRequest, file: Path, output: _Output, identity: dict[str, Any], inputs: _Inputs
) -> Iterator[BatchAttacked | Check | PartMeasured | Report | Evaluated]:
    """Evaluate one file, write its figures and remove its states."""
    test = inputs.data.test
    model = accept_model(_open_checked(request, file, inputs.data).model, test)
    if output.json_path:
        output.json_path.parent.mkdir(exist_ok=True)
    if not request.resume:
        output.remove_states()
    results = _open_partial_results(request, output, model, test)
    keep = request.save_examples is not None or request.gallery is not None
    options = replace(request.options, state=output.state_path(OWN), keep=keep)
    figures: dict[str, Any] = {"model": str(file), "data": request.data, "threat": str(request.threat)}
    figures["seed"] = options.seed
    report = None
    for event in run_evaluation(model, test, request.threat, options, source=inputs.source, examples=inputs.examples):
        yield event
        report = event if isinstance(event, Report) else None
    assert report is not None
    figures |= report.to_json()
    figures |= {"per_class": report.per_class(), "wrong": report.wrong(), "seconds": report.seconds}
    if inputs.other is not None:
        against = replace(options, state=output.state_path(AGAINST), keep=False)
        figures["against"] = yield from _evaluate_other(request, inputs.other, report, test, against)
    figures |= yield from _measure_more(request, model, test, results)
    figures |= {"request": identity, "versions": {"atmc": __version__, "torch": torch.__version__}}
    if output.json_path:
        write_json(output.json_path, figures)
    output.remove_states()
    if keep:  # after the figures, which took longer
        _write_examples(request, file, model, test, report)
    yield Evaluated(figures)


def _open_partial_results(request: EvaluateRequest, output: _Output, model: nn.Module, test: Images) -> PartialResults:
    """Return the finished parts of curves and certificate, none if there is no file of them."""
    if not (output.json_path and request.needs(PARTS)):
        return PartialResults(None, "")
    decided = {"threat": str(request.threat), "seed": request.options.seed, "atmc": __version__}
    return PartialResults(output.state_path(PARTS), resume.compute_fingerprint(model, test, len(test), **decided))


def _evaluate_other(
    request: EvaluateRequest, other: nn.Module, report: Report, test: Images, options: EvaluationOptions
) -> Generator[BatchAttacked | Check, None, dict[str, Any]]:
    """Evaluate the model of --against in the same way; return its figures with McNemar's test between the two."""
    other_report = None
    for event in run_evaluation(other, test, request.threat, options):
        if isinstance(event, Report):
            other_report = event
        else:
            yield event
    assert other_report is not None
    tests = {name: comparison.to_json() for name, comparison in report.compared(other_report).items()}
    return {"model": str(request.against), **other_report.to_json(), "comparison": tests}


def _measure_more(
    request: EvaluateRequest, model: nn.Module, test: Images, results: PartialResults
) -> Generator[PartMeasured, None, dict[str, Any]]:
    """Measure those of curves, replayed examples and certificate that were asked for; return their figures."""
    figures: dict[str, Any] = {}
    images, options = test.to(torch.device(request.device)), request.options
    if request.curves:
        n = min(request.curves, len(test))
        figures["curves"] = yield from measure_curves(results, model, images, request.threat, n)
    if request.replay:
        figures["replay"] = {"file": str(request.replay), **adversarial_file.replay(request.replay, model).to_json()}
    if request.certify is not None:
        n = options.number(options.attacks[0]) or len(test)
        figures["smoothing"] = yield from measure_certificate(
            results, model, images, request.certify, n, request.certify_samples, options.seed
        )
    return figures


def _write_examples(request: EvaluateRequest, file: Path, model: nn.Module, test: Images, report: Report) -> None:
    """Write the adversarial images, or a picture of some of them, or both, as the request asks."""
    about = {"threat": str(request.threat), "seed": request.options.seed, "model": str(file)}
    examples = adversarial_file.collect(model, report.labels, report.attacks, **about)
    if request.save_examples:
        examples.save(request.save_examples)
    if request.gallery:
        clean = test.float_pixels(slice(0, len(examples.labels))).cpu()
        shown = select_fooled(model, clean, examples.adv, examples.labels)
        write_beside(request.gallery, draw_gallery(shown, request.threat))
