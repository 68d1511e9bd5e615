"""Evaluate a model: its accuracies, clean and under attack, and checks of the attacks."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atmc.core.torch_state import prepared_torch
from atmc.data import Images, as_images, mix_classes
from atmc.evaluation import resume
from atmc.evaluation.accuracy import BatchAttacked, clean_accuracy, count_examples, run_protocol, summarize
from atmc.evaluation.adversarial_file import AdversarialExamples
from atmc.evaluation.attacks import ATTACKS, build_protocol, check_attacks, check_norm, takes_pgd_settings
from atmc.evaluation.checks import Check, collect_check_inputs, run_checks
from atmc.evaluation.statistics import Accuracy, Comparison, compare, per_class, worst_case
from atmc.evaluation.user_model import accept_model, check_model, prepare
from atmc.evaluation.verdicts import Verdicts
from atmc.robust.attacks import PgdSettings, check_pgd
from atmc.robust.threats import Threat, as_threat, check_threat


class EvaluationWarning(UserWarning):
    """A check failed: the accuracies under attack may be far too high."""


@dataclass(frozen=True)
class Report:
    """Accuracies of one model on one set of images.

    Args:
        clean: accuracy on all images, without attack.
        attacks: accuracies by attack.
        checks: results of the checks; empty if they were not run.
        labels: (n,) labels of all images.
        seconds: time of each attack, and of all checks together.
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
        """Accuracy under all attacks, on the images that all of them saw; None for a single attack."""
        return worst_case(list(self.attacks.values())) if len(self.attacks) > 1 else None

    def compared(self, other: Report) -> dict[str, Comparison]:
        """Return McNemar's test of this model (A) and another one (B), clean and for each attack that both have.

        Raises:
            ValueError: the other report is of other images.
        """
        if not torch.equal(self.labels, other.labels):
            raise ValueError("expected two reports on the same images")
        pairs = [("clean", self.clean, other.clean)]
        pairs += [(name, self.attacks[name], other.attacks[name]) for name in self.attacks if name in other.attacks]
        comparisons = {}
        for name, one, two in pairs:
            n = min(one.n, two.n)
            comparisons[name] = compare(one.right[:n], two.right[:n])
        return comparisons

    def per_class(self) -> dict[str, list[dict[str, Any]]]:
        """Return the accuracies of each class, clean and by attack, as JSON."""
        accuracies = {"clean": self.clean, **self.attacks}
        return {name: per_class(accuracy, self.labels) for name, accuracy in accuracies.items()}

    def wrong(self) -> dict[str, list[int]]:
        """Return the positions of the images that are classified wrong, clean and under each attack.

        The clean list is of all images, that of an attack of the first `attacks[name].n`.
        """
        accuracies = {"clean": self.clean, **self.attacks}
        return {name: (~accuracy.right).nonzero().flatten().tolist() for name, accuracy in accuracies.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the report as in metrics.json."""
        figures: dict[str, Any] = {
            "clean": self.clean.to_json(),
            "attacks": {name: accuracy.to_json() for name, accuracy in self.attacks.items()},
        }
        if self.worst is not None:
            figures["worst_case"] = {**self.worst.to_json(), "of": list(self.attacks)}
        return figures | {"checks": [check.to_json() for check in self.checks]}


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How an evaluation is done: the arguments of `evaluate`, with `attacks` for attack.

    Raises:
        ValueError: an unknown attack, or options that make no sense.
    """

    attacks: tuple[str, ...] = ("pgd",)
    after: str | None = None
    n: int | Mapping[str, int] | None = None
    steps: int | None = None
    step_size: float | None = None
    restarts: int = 1
    loss: str = "ce"
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
            raise ValueError(f"expected each attack once, got {', '.join(self.attacks)}")
        check_pgd(steps=self.steps, step_size=self.step_size, restarts=self.restarts, loss=self.loss)
        if self.after is not None:
            check_attacks([self.after])
            if self.attacks == (self.after,):
                raise ValueError(f"expected an attack to run after {self.after!r}, got no other attack")
        is_paper = (self.steps, self.step_size, self.restarts, self.loss) == (None, None, 1, "ce")
        if not is_paper and not takes_pgd_settings(self.order):
            takers = " and ".join(name for name, spec in ATTACKS.items() if spec.takes_pgd)
            asked = ", ".join(self.order)
            raise ValueError(f"steps, step size, restarts and loss are for {takers}, the attacks are {asked}")
        if self.batch_size < 1:
            raise ValueError(f"expected batch_size >= 1, got {self.batch_size}")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"expected a time > 0 seconds, got {self.seconds}")

    @property
    def order(self) -> tuple[str, ...]:
        """The attacks in the order in which they run: `after` first, even if it is not among `attacks`."""
        if self.after is None:
            return self.attacks
        return (self.after, *(name for name in self.attacks if name != self.after))

    def pgd(self, threat: Threat) -> PgdSettings:
        """Return the settings of PGD: the paper's, unless the user gave others."""
        return PgdSettings.paper(
            threat, steps=self.steps, step_size=self.step_size, restarts=self.restarts, loss=self.loss
        )

    def number(self, name: str) -> int | None:
        """Return the number of images to attack, None for all."""
        return self.n.get(name) if isinstance(self.n, Mapping) else self.n


def evaluate(
    model: nn.Module,
    test: Any,
    *,
    threat: Threat | str,
    attack: str | Sequence[str] = "pgd",
    after: str | None = None,
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
    """Measure the accuracy on all test images, and the accuracy under attack on the first n of them, in float32.

    Args:
        model: module from images (n, c, h, w) in [0, 1] to logits; it is not changed.
        test: a DataLoader, a dataset of (image, label) pairs, or a pair of tensors; images in [0, 1].
        threat: what the adversary may do, ``Linf(8 / 255)`` or "linf:8/255".
        attack: one or several names in `attacks.ATTACKS`; with several, `Report.worst` is the worst case.
        after: an attack that runs first; the others then attack only the images that it left, and those that it broke
            count as wrong under each of them.
        n: number of images to attack, one for all attacks or one per attack; all by default.
        steps, step_size, restarts, loss: settings of ``pgd`` that replace the paper's (loss: ce, dlr or margin).
        seed: keys random starts.
        checks: run the checks of the attacks, on 100 images (`evaluation.checks`).
        transfer_from: a model, such as the dense one, whose adversarial images are tried on this one as a check.
        batch_size: number of images attacked at once.
        seconds: stop attacking after this time; each attack then counts the images that it has finished.
        keep: keep the adversarial images, in `Report.attacks[name].adv`.
        state: a file to save the progress in; the same call continues from it, and removes it at the end.

    Warns:
        EvaluationWarning: a check failed.

    Raises:
        ValueError: unknown attack, one that does not exist for the norm, a threat too large for the images, or a model
            that does not fit them.
    """
    options = EvaluationOptions(
        attacks=(attack,) if isinstance(attack, str) else tuple(attack),
        after=after,
        n=n,
        steps=steps,
        step_size=step_size,
        restarts=restarts,
        loss=loss,
        seed=seed,
        checks=checks,
        batch_size=batch_size,
        seconds=seconds,
        keep=keep,
        state=Path(state) if state is not None else None,
    )
    with prepared_torch(torch.device("cpu")):
        *_, report = run_evaluation(model, test, threat, options, source=transfer_from)
    assert isinstance(report, Report)
    if options.state:
        options.state.unlink(missing_ok=True)
    if report.failed:
        names = "; ".join(f"{check.name}: {check.detail}" for check in report.failed)
        warnings.warn(f"the accuracies under attack are not to be trusted: {names}", EvaluationWarning, stacklevel=2)
    return report


def run_evaluation(
    model: nn.Module,
    test: Any,
    threat: Threat | str,
    options: EvaluationOptions,
    *,
    source: nn.Module | None = None,
    examples: AdversarialExamples | None = None,
) -> Iterator[BatchAttacked | Check | Report]:
    """Run an evaluation step by step: yield every attacked batch, every check, and at last the report.

    If there is a state file, the caller removes it.

    Args:
        source: a model whose adversarial images are tried on this one.
        examples: adversarial images of the first images, which the check `masked` counts, whatever attack made them.

    Raises:
        ValueError: as `evaluate`.
    """
    threat = as_threat(threat)
    images = mix_classes(as_images(test))
    check_threat(threat, images.pixels[0].numel())
    model = accept_model(model, images)
    for name in options.order:
        check_norm(name, threat)
        count_examples(images, options.number(name))
    classes = check_model(model, images, None, probabilities=options.checks)
    model, images = prepare(model, images)
    if source is not None:
        source = accept_model(source, images)
        check_model(source, images, classes)
        source, _ = prepare(source, images)
    attacks: dict[str, Accuracy] = {}
    seconds: dict[str, float] = {}
    clean = clean_accuracy(model, images, batch_size=options.batch_size)
    yield from _run_attacks(model, images, threat, options, attacks, seconds)
    began = time.monotonic()
    checks: list[Check] = []
    if options.checks:
        inputs = collect_check_inputs(
            model,
            images,
            threat,
            clean,
            attacks,
            pgd=options.pgd(threat),
            source=source,
            examples=examples,
            seed=options.seed,
        )
        for check in run_checks(inputs):
            checks.append(check)
            yield check
        seconds["checks"] = round(time.monotonic() - began, 2)
    yield Report(clean, attacks, tuple(checks), images.labels.cpu(), seconds)


def _run_attacks(
    model: nn.Module,
    images: Images,
    threat: Threat,
    options: EvaluationOptions,
    attacks: dict[str, Accuracy],
    seconds: dict[str, float],
) -> Iterator[BatchAttacked]:
    """Run the attacks in turn, put each accuracy into `attacks` and its time into `seconds`, and save the state."""
    stored = resume.read_state(options.state) if options.state and options.state.exists() else {}
    began = saved = time.monotonic()
    for position, name in enumerate(options.order):
        count = count_examples(images, options.number(name))
        protocol = build_protocol(model, images, threat, name, pgd=options.pgd(threat), seed=options.seed)
        settings = {**protocol.settings, "threat": str(threat), "attack": name, "batch_size": options.batch_size}
        settings |= {"keep": options.keep, "timed": options.seconds is not None}
        survivors = None
        if options.after is not None and name != options.after:
            settings |= {"after": options.after}
            survivors = torch.ones(count, dtype=torch.bool)  # images that the first attack did not see are attacked
            first = attacks[options.after].right[:count]
            survivors[: len(first)] = first
        fingerprint = resume.compute_fingerprint(model, images, count, **settings) if options.state else ""
        if name in stored and stored[name][0] != fingerprint:
            raise ValueError(f"{options.state} is of another evaluation: remove it, or repeat that evaluation")
        stored.setdefault(name, (fingerprint, Verdicts.fresh(images, count, keep=options.keep)))
        verdicts, start, until = stored[name][1], time.monotonic(), None
        if options.seconds is not None:  # the attacks that remain share the time that remains
            until = start + max(0.0, began + options.seconds - start) / (len(options.order) - position)
        for event in run_protocol(
            model, images, protocol, verdicts, batch_size=options.batch_size, until=until, survivors=survivors
        ):
            if options.state and time.monotonic() - saved > resume.SAVE_EVERY:
                resume.write_state(options.state, stored)
                saved = time.monotonic()
            yield event
        attacks[name] = summarize(protocol, verdicts)
        if survivors is not None:
            shown = {**attacks[name].settings, "survivors_of": options.after}
            attacks[name] = replace(attacks[name], settings=shown)
        seconds[name] = round(time.monotonic() - start, 2)
        if options.state:
            resume.write_state(options.state, stored)
