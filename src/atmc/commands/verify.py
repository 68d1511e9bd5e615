"""`atmc verify`: a model file, a data set and a threat -> verdicts per image, in figures and in --json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from atmc.commands.model_files import check_image_shape, check_named, open_model
from atmc.commands.outputs import check_absent, check_examples_file, check_parent, write_json
from atmc.commands.partial_results import PartialResults
from atmc.core.version import __version__
from atmc.data import load_data
from atmc.evaluation import resume
from atmc.evaluation.verify.bounds import check_provable
from atmc.evaluation.verify.stages import STAGES
from atmc.evaluation.verify.verify import BatchVerified, Verification, VerifyOptions, run_verification
from atmc.robust.threats import Threat


@dataclass(frozen=True, kw_only=True)
class VerifyRequest:
    """What `atmc verify` was asked for; the fields are its options.

    Args:
        file: a model file or checkpoint.
        save_examples: the file for the images that broke others, see `adversarial_file`.
        json_path: the file for the figures; the state of an unfinished verification lies beside it.
    """

    file: Path
    data: str
    threat: Threat
    options: VerifyOptions = field(default_factory=VerifyOptions)
    model: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    save_examples: Path | None = None
    json_path: Path | None = None
    resume: bool = False
    overwrite: bool = False

    def identify(self) -> dict[str, Any]:
        """Return all that decides the figures, as JSON, with a digest of the model file.

        Raises:
            OSError: the file cannot be read.
        """
        return {
            "file": hashlib.sha256(self.file.read_bytes()).hexdigest(),
            "data": self.data,
            "threat": str(self.threat),
            "n": self.options.n,
            "attacks": self.options.attacks,
            "linear": self.options.linear,
            "autoattack": self.options.autoattack,
            "time_per_image": self.options.time_per_image,
            "save_examples": self.save_examples is not None,
            "seed": self.options.seed,
            "batch_size": self.options.batch_size,
            "model": self.model,
            "image_column": self.image_column,
            "label_column": self.label_column,
        }

    @property
    def state_path(self) -> Path | None:
        """The file of the verdicts of an unfinished verification; None if nothing is kept."""
        return self.json_path.with_name(f"{self.json_path.name}.state") if self.json_path else None


@dataclass(frozen=True)
class Verified:
    """The verification is done, now or in an earlier call: its figures, as in --json."""

    figures: dict[str, Any]


def verify(request: VerifyRequest) -> Iterator[BatchVerified | Verified]:
    """Verify the images of a request; yield the events of the verification, and a `Verified` at the end.

    Raises:
        ValueError: the request makes no sense, or proofs cannot be given for the model.
        OSError: a file cannot be read or written.
    """
    _check_request(request)
    identity = request.identify()
    figures = _read_figures(request, identity)
    if figures is None:
        _check_output(request)
        figures = yield from _measure(request, identity)
        if request.json_path:
            write_json(request.json_path, figures)
    if request.state_path:
        request.state_path.unlink(missing_ok=True)
    yield Verified(figures)


def _check_request(request: VerifyRequest) -> None:
    check_named(request.file, request.model)
    if request.resume and not request.json_path:
        raise ValueError("--resume needs --json: the state of a verification lies beside that file")
    if request.save_examples:
        check_examples_file(request.save_examples)
    if request.json_path:
        check_parent(request.json_path)
        if request.json_path.is_dir():
            raise ValueError(f"{request.json_path} is a folder: give a file for the figures")


def _read_figures(request: VerifyRequest, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return the figures that an earlier call with the same request wrote, if this one resumes; None without any."""
    path = request.json_path
    if not (request.resume and path and path.is_file()):
        return None
    try:
        figures = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError):  # not figures: `_check_output` refuses the file
        return None
    return figures if figures.get("request") == identity else None


def _check_output(request: VerifyRequest) -> None:
    """Raise ValueError if the verification would replace what exists, or leave a state that it does not continue."""
    for path in (request.json_path, request.save_examples):
        if path:
            check_absent(path, overwrite=request.overwrite)
    if request.state_path and request.state_path.exists() and not (request.resume or request.overwrite):
        raise ValueError(
            f"{request.state_path} holds an unfinished verification: add --resume to continue it or --overwrite to "
            "start again"
        )


def _measure(request: VerifyRequest, identity: dict[str, Any]) -> Generator[BatchVerified, None, dict[str, Any]]:
    """Run the verification, continuing from the state if the request resumes; yield its events, return figures."""
    data = load_data(request.data, image_column=request.image_column, label_column=request.label_column)
    check_provable(request.threat, data.test.pixels[0].numel())
    loaded = open_model(request.file, request.model, data)
    check_image_shape(loaded, data)
    if request.state_path and not request.resume:
        request.state_path.unlink(missing_ok=True)
    asked = {option for stage in STAGES.values() for option in stage.options}  # which may differ when it continues
    decided = {name: value for name, value in identity.items() if name not in asked}
    mark = resume.compute_fingerprint(loaded.model, data.test, len(data.test), request=decided, atmc=__version__)
    parts = PartialResults(request.state_path, mark)
    options, result = replace(request.options, keep=request.save_examples is not None), None
    try:
        for event in run_verification(
            loaded.model, data.test, request.threat, options, factors=loaded.factors, parts=parts
        ):
            if isinstance(event, Verification):
                result = event
            else:
                yield event
    except (KeyboardInterrupt, RuntimeError):
        parts.save()
        raise
    assert result is not None
    if request.save_examples:
        assert result.examples is not None
        about = {**result.examples.about, "model": str(request.file)}
        replace(result.examples, about=about).save(request.save_examples)
    return {
        "model": str(request.file),
        "data": request.data,
        "threat": str(request.threat),
        "seed": request.options.seed,
        **result.to_json(),
        "request": identity,
        "versions": {"atmc": __version__, "torch": torch.__version__},
    }
