"""evaluate(): a model's accuracies, clean and under attack, with the evaluation's doubts about them."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atmc import models
from atmc.compress.factorize import use_channels_last
from atmc.core.arguments import check_module
from atmc.data import Images, as_images, mixed_order
from atmc.evaluation import resume
from atmc.evaluation.accuracy import BatchAttacked, Verdicts, clean_accuracy, count_examples, run_protocol, summarize
from atmc.evaluation.attacks import Custom, build_protocol, check_attacks, check_norm
from atmc.evaluation.checks import looks_like_probabilities, run_checks
from atmc.evaluation.statistics import Accuracy, Comparison, compare, per_class, worst_case
from atmc.evaluation.suspect import Check, suspect
from atmc.robust.attacks import attack_mode
from atmc.robust.threats import Threat, as_threat, check_threat

SAVE_EVERY = 20.0  # seconds between two writes of the state


class EvaluationWarning(UserWarning):
    """A check failed: the accuracies under attack may be far too high."""


@dataclass(frozen=True)
class Report:
    """Accuracies of one model on one set of images.

    Args:
        clean: on all images, without attack.
        attacks: attack name -> accuracy.
        checks: the evaluation's doubts; empty if they were not asked for.
        labels: (n,) of all images.
        seconds: what each attack, and the checks together, took.
    """

    clean: Accuracy
    attacks: dict[str, Accuracy]
    checks: tuple[Check, ...] = ()
    labels: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64), repr=False)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.ok is False]

    @property
    def worst(self) -> Accuracy | None:
        """Right under every attack, on the images that all of them saw; None for a single attack."""
        return worst_case(list(self.attacks.values())) if len(self.attacks) > 1 else None

    def compared(self, other: Report) -> dict[str, Comparison]:
        """McNemar's test of this model (A) and another one (B), clean and for each attack that both went through.

        Raises:
            ValueError: the other report is of other images.
        """
        if not torch.equal(self.labels, other.labels):
            raise ValueError("expected two reports on the same images")
        pairs = [("clean", self.clean, other.clean)]
        pairs += [(name, self.attacks[name], other.attacks[name]) for name in self.attacks if name in other.attacks]
        found = {}
        for name, one, two in pairs:
            n = min(one.n, two.n)
            found[name] = compare(one.right[:n], two.right[:n])
        return found

    def per_class(self) -> dict[str, list[dict[str, Any]]]:
        """Accuracies of each class, clean and by attack, as JSON."""
        return {name: per_class(found, self.labels) for name, found in {"clean": self.clean, **self.attacks}.items()}

    def to_json(self) -> dict[str, Any]:
        """As in metrics.json."""
        found: dict[str, Any] = {
            "clean": self.clean.to_json(),
            "attacks": {name: accuracy.to_json() for name, accuracy in self.attacks.items()},
        }
        if self.worst is not None:
            found["worst_case"] = {**self.worst.to_json(), "of": list(self.attacks)}
        return found | {"checks": [check.to_json() for check in self.checks]}


@dataclass(frozen=True)
class EvaluationOptions:
    """How an evaluation is done; see `evaluate`."""

    attacks: tuple[str, ...] = ("pgd",)
    n: int | Mapping[str, int] | None = None
    custom: Custom = field(default_factory=Custom)
    seed: int = 0
    checks: bool = True
    batch_size: int = 500
    seconds: float | None = None
    keep: bool = False
    state: Path | None = None

    def __post_init__(self) -> None:
        check_attacks(self.attacks)
        check_attacks(list(self.n) if isinstance(self.n, Mapping) else [])
        if not self.attacks:
            raise ValueError("expected at least one attack")
        if len(set(self.attacks)) < len(self.attacks):
            raise ValueError(f"each attack once, got {', '.join(self.attacks)}")
        if self.custom != Custom() and not {"pgd", "pgd-strong"} & set(self.attacks):
            raise ValueError(f"steps, step size, restarts and loss are of pgd, which is not among {self.attacks}")
        if self.batch_size < 1:
            raise ValueError(f"expected batch_size >= 1, got {self.batch_size}")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"expected a time > 0 seconds, got {self.seconds}")

    def number(self, name: str) -> int | None:
        """Images under an attack, None for all."""
        return self.n.get(name) if isinstance(self.n, Mapping) else self.n


def evaluate(
    model: nn.Module,
    test: Any,
    *,
    threat: Threat | str,
    attack: str | Sequence[str] = "pgd",
    n: int | Mapping[str, int] | None = None,
    steps: int | None = None,
    step_size: float | None = None,
    restarts: int = 1,
    loss: str = "ce",
    seed: int = 0,
    checks: bool = True,
    transfer_from: nn.Module | None = None,
    batch_size: int = 500,
    seconds: float | None = None,
    keep: bool = False,
    state: str | Path | None = None,
) -> Report:
    """Clean accuracy on all test images and accuracy under attack on the first n of them, in float32.

    Args:
        model: module from images (n, c, h, w) in [0, 1] to logits; left as it was.
        test: as in `compress`.
        attack: one or several of `robust.protocols.ATTACKS`; with several, `Report.worst` is the worst case.
        n: images under attack, for every attack or by its name; all by default.
        steps, step_size, restarts, loss: of ``pgd``, where they are to differ from the paper's (loss ce, dlr, margin).
        checks: let the evaluation doubt itself, on 100 images (`robust.checks`).
        transfer_from: a model, say the dense one, whose adversarial images are tried on this one, as a check.
        batch_size: images attacked at once.
        seconds: stop attacking after so long; each attack then counts the images it has finished.
        keep: keep the adversarial images, in `Report.attacks[name].adv`.
        state: a file to which the state is saved; the same call goes on from it, and removes it in the end.

    Warns:
        EvaluationWarning: a check failed.

    Raises:
        ValueError: unknown attack, one that does not exist for the norm, a threat too large for the images, or a model
            that does not fit them.
    """
    options = EvaluationOptions(
        (attack,) if isinstance(attack, str) else tuple(attack),
        n,
        Custom(steps, step_size, restarts, loss),
        seed,
        checks,
        batch_size,
        seconds,
        keep,
        Path(state) if state is not None else None,
    )
    *_, report = run_evaluation(model, test, threat, options, source=transfer_from)
    assert isinstance(report, Report)
    if options.state:
        options.state.unlink(missing_ok=True)
    if report.failed:
        names = "; ".join(f"{check.name}: {check.detail}" for check in report.failed)
        warnings.warn(f"the accuracies under attack are not to be trusted: {names}", EvaluationWarning, stacklevel=2)
    return report


def run_evaluation(
    model: nn.Module, test: Any, threat: Threat | str, options: EvaluationOptions, *, source: nn.Module | None = None
) -> Iterator[BatchAttacked | Check | Report]:
    """`evaluate`, step by step: yields every attacked batch, every check, and at last the report.

    A state file, where one is kept, stays; the caller removes it.
    """
    check_module(model)
    threat = as_threat(threat)
    images = mixed_order(as_images(test))
    check_threat(threat, images.pixels[0].numel())
    for name in options.attacks:
        check_norm(name, threat)
        count_examples(images, options.number(name))
    classes = check_model(model, images, None, probabilities=options.checks)
    model, images = prepare(model, images)
    if source is not None:
        check_model(source, images, classes)
        source, _ = prepare(source, images)
    attacks: dict[str, Accuracy] = {}
    spent: dict[str, float] = {}
    clean = clean_accuracy(model, images, batch_size=options.batch_size)
    yield from _attack_all(model, images, threat, options, attacks, spent)
    began = time.monotonic()
    checks: list[Check] = []
    if options.checks:
        found = suspect(model, images, threat, clean, attacks, custom=options.custom, source=source, seed=options.seed)
        for check in run_checks(found):
            checks.append(check)
            yield check
        spent["checks"] = round(time.monotonic() - began, 2)
    yield Report(clean, attacks, tuple(checks), images.labels.cpu(), spent)


def _attack_all(
    model: nn.Module,
    images: Images,
    threat: Threat,
    options: EvaluationOptions,
    attacks: dict[str, Accuracy],
    spent: dict[str, float],
) -> Iterator[BatchAttacked]:
    """Every attack in turn, its figure put into `attacks`; the state is saved now and then."""
    stored = resume.read_state(options.state) if options.state and options.state.exists() else {}
    began = saved = time.monotonic()
    for position, name in enumerate(options.attacks):
        count = count_examples(images, options.number(name))
        protocol = build_protocol(model, images, threat, name, custom=options.custom, seed=options.seed)
        asked = {**protocol.settings, "threat": str(threat), "attack": name, "batch_size": options.batch_size}
        asked |= {"keep": options.keep, "timed": options.seconds is not None}
        mark = resume.compute_fingerprint(model, images, count, **asked) if options.state else ""
        if name in stored and stored[name][0] != mark:
            raise ValueError(f"{options.state} is of another evaluation: remove it, or ask for the same as then")
        stored.setdefault(name, (mark, Verdicts.fresh(images, count, keep=options.keep)))
        verdicts, start, until = stored[name][1], time.monotonic(), None
        if options.seconds is not None:  # what is left of the time, shared by the attacks that are left
            until = start + max(0.0, began + options.seconds - start) / (len(options.attacks) - position)
        for event in run_protocol(model, images, protocol, verdicts, batch_size=options.batch_size, until=until):
            if options.state and time.monotonic() - saved > SAVE_EVERY:
                resume.write_state(options.state, stored)
                saved = time.monotonic()
            yield event
        attacks[name] = summarize(protocol, verdicts)
        spent[name] = round(time.monotonic() - start, 2)
        if options.state:
            resume.write_state(options.state, stored)


def prepare(model: nn.Module, images: Images) -> tuple[nn.Module, Images]:
    """A copy of the model in float32 and in the layout it runs fastest in, and the images on its device."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    images = images.to(device)
    if any(value.is_floating_point() and value.dtype != torch.float32 for value in model.state_dict().values()):
        model = copy.deepcopy(model).float()
    return (use_channels_last(copy.deepcopy(model)) if takes_channels_last(model, images) else model), images


@torch.no_grad()
def check_model(model: nn.Module, images: Images, classes: int | None, *, probabilities: bool = False) -> int:
    """The number of classes; ValueError if the model does not map such images to one finite logit a class.

    Args:
        probabilities: let outputs pass that look like probabilities (`evaluate` has a check of its own for them).
    """
    x = images.float_pixels(torch.arange(min(8, len(images)), device=images.labels.device))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with attack_mode(model):
            output = model(x.to(device))
    except models.USER_CODE_ERRORS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the model does not take images of shape {tuple(x.shape[1:])}: {reason}") from error
    if not isinstance(output, torch.Tensor) or output.dim() != 2 or len(output) != len(x):
        got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ValueError(f"expected logits of shape ({len(x)}, classes) from the model, got {got}")
    if classes is not None and output.shape[1] != classes:
        raise ValueError(f"the model has {output.shape[1]} outputs, the data {classes} classes")
    if classes is None and output.shape[1] <= int(images.labels.max()):
        raise ValueError(f"the model has {output.shape[1]} outputs, the labels go up to {int(images.labels.max())}")
    if not bool(output.isfinite().all()):
        raise ValueError("the model's outputs are not finite numbers")
    if not probabilities and looks_like_probabilities(output):
        raise ValueError("the model's outputs look like probabilities: give logits, without a softmax at the end")
    return int(output.shape[1])


def takes_channels_last(model: nn.Module, images: Images) -> bool:
    """Whether a pass and its gradient work with images and kernels in that layout: not where code says ``x.view``."""
    if images.pixels.dim() != 4:
        return False
    trial = use_channels_last(copy.deepcopy(model))
    x = images.float_pixels(torch.arange(min(2, len(images)), device=images.labels.device))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    x = x.contiguous(memory_format=torch.channels_last).to(device).requires_grad_()
    try:
        with attack_mode(trial), torch.enable_grad():
            torch.autograd.grad(trial(x).sum(), x)
    except RuntimeError:
        return False
    return True
