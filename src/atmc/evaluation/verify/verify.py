"""Give each image a verdict: certified by a proof, broken by an image that the model gets wrong, or undecided.

`run_verification` takes the images through the stages of `stages.STAGES`; docs/verification.md says what they do and
what a proof covers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from atmc.compress.factorize import fold
from atmc.core.rng import check_seed
from atmc.core.torch_state import prepared_torch
from atmc.data import Images, as_images, mix_classes
from atmc.evaluation.accuracy import count_examples, interval_accuracy, predictions
from atmc.evaluation.adversarial_file import AdversarialExamples
from atmc.evaluation.attacks import build_protocol
from atmc.evaluation.statistics import Accuracy
from atmc.evaluation.user_model import accept_model, check_model, prepare
from atmc.evaluation.verify.bounds import check_provable
from atmc.evaluation.verify.executions import list_executions
from atmc.evaluation.verify.stages import BROKEN, CERTIFIED, STAGES, UNDECIDED, Part, Problem, decode_image
from atmc.evaluation.verify.workers import Workers
from atmc.models import USER_CODE_ERRORS
from atmc.pack.weight_forms import Weight
from atmc.robust.threats import Threat, as_threat


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """How a verification is done: the arguments of `verify`.

    Args:
        keep: keep the images that break others, in `Verification.examples`.

    Raises:
        ValueError: options that make no sense.
    """

    n: int | None = None
    attacks: bool = True
    linear: bool = False
    autoattack: bool = False
    time_per_image: float | None = None
    processes: int = 1
    keep: bool = True
    seed: int = 0
    batch_size: int = 100

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.n is not None and self.n < 1:
            raise ValueError(f"expected n >= 1 examples, got {self.n}")
        if self.batch_size < 1:
            raise ValueError(f"expected batch_size >= 1, got {self.batch_size}")
        if self.processes < 1:
            raise ValueError(f"expected processes >= 1, got {self.processes}")
        if self.time_per_image is not None and not 0 < self.time_per_image < float("inf"):
            raise ValueError(f"expected a finite time per image > 0 seconds, got {self.time_per_image}")

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that run, in order."""
        return tuple(
            name
            for name, stage in STAGES.items()
            if not stage.options or any(getattr(self, option) for option in stage.options)
        )


@dataclass(frozen=True, kw_only=True)
class BatchVerified:
    """A stage has taken `done` of its `total` images; the counts are of all n images so far."""

    stage: str
    done: int
    total: int
    certified: int
    broken: int
    n: int


@dataclass(frozen=True, kw_only=True)
class ImageSearched:
    """How the complete method fared on one image.

    Args:
        row: the image's position among those that were taken.
        verdict: what it gave.
        seconds: its time.
        unstable: the number of ReLUs and pooling windows of which the bounds leave open what they pass on.
        branches: the number of parts of the problem that it bounded.
    """

    row: int
    verdict: str
    seconds: float
    unstable: int
    branches: int


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Verdicts on n images.

    Args:
        threat: what was proved against.
        verdicts: for each image, in the order in which they were taken, "certified", "broken" or "undecided".
        decided_by: for each image the stage that decided it, None if it is undecided.
        stages: the stages that ran, in order.
        taken: how many images each stage took.
        seconds: time of each stage, added up over processes.
        settings: of each attack, as in metrics.json.
        searched: the images that the complete method took, in order.
        examples: for each image the one that broke it, or else the image itself; None if they were not kept.
    """

    threat: Threat
    verdicts: tuple[str, ...]
    decided_by: tuple[str | None, ...]
    stages: tuple[str, ...]
    taken: Mapping[str, int]
    seconds: Mapping[str, float]
    settings: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    searched: tuple[ImageSearched, ...] = ()
    examples: AdversarialExamples | None = None

    @property
    def clean(self) -> Accuracy:
        """Accuracy without an attack."""
        return Accuracy.of(torch.tensor([stage != "clean" for stage in self.decided_by]))

    @property
    def certified(self) -> Accuracy:
        """Share of images that are proved: a lower bound of the accuracy under every attack of the threat."""
        return Accuracy.of(torch.tensor([verdict == CERTIFIED for verdict in self.verdicts]))

    @property
    def attacked(self) -> Accuracy:
        """Share of images that nothing broke: accuracy under the attacks that ran, an upper bound."""
        return Accuracy.of(torch.tensor([verdict != BROKEN for verdict in self.verdicts]))

    @property
    def undecided(self) -> float:
        """Share of images that are neither certified nor broken."""
        return self.verdicts.count(UNDECIDED) / len(self.verdicts)

    @property
    def by_stage(self) -> dict[str, int]:
        """How many images each stage decided."""
        counts = Counter(self.decided_by)
        return {name: counts[name] for name in self.stages}

    def count(self, stage: str, verdict: str) -> int:
        """Return how many images got this verdict by this stage."""
        return list(zip(self.decided_by, self.verdicts, strict=True)).count((stage, verdict))

    def to_json(self) -> dict[str, Any]:
        """Return the keys of `atmc verify --json` on verdicts: clean, certified, attacked, stages, complete and so on.

        complete is there if the complete method ran.
        """
        eps = self.threat.eps
        certified = {**self.certified.to_json(), "eps": eps, "by": self._share_by_stage(CERTIFIED)}
        attacked = {**self.attacked.to_json(), "eps": eps, "broken_by": self._share_by_stage(BROKEN)}
        figures = {
            "clean": self.clean.to_json(),
            "certified": certified | {"undecided": round(self.undecided, 6)},
            "attacked": attacked | {"attacks": self.settings},
            "stages": [
                {
                    "stage": name,
                    "verdict": " or ".join(STAGES[name].verdicts),
                    "images": self.taken[name],
                    "decided": self.by_stage[name],
                    **{verdict: self.count(name, verdict) for verdict in STAGES[name].verdicts},
                    "seconds": round(self.seconds[name], 2),
                }
                for name in self.stages
            ],
        }
        if self.searched:
            figures["complete"] = _describe_search(self.searched)
        return figures | {"verdicts": list(self.verdicts), "decided_by": list(self.decided_by)}

    def _share_by_stage(self, verdict: str) -> dict[str, float]:
        """Return the share of images that got this verdict, by stage."""
        names = [name for name in self.stages if verdict in STAGES[name].verdicts]
        return {name: round(self.count(name, verdict) / len(self.verdicts), 6) for name in names}


def _describe_search(searched: Sequence[ImageSearched]) -> dict[str, Any]:
    """Return, as JSON, the distributions of time and of unstable ReLUs, and the figures of each image."""
    return {
        "images": len(searched),
        "undecided": sum(one.verdict == UNDECIDED for one in searched),
        "seconds": _describe_distribution([one.seconds for one in searched]),
        "unstable": _describe_distribution([one.unstable for one in searched]),
        "by_image": [{**asdict(one), "seconds": round(one.seconds, 3)} for one in searched],
    }


def _describe_distribution(values: Sequence[float]) -> dict[str, float]:
    """Return the least value, the median, the 90th percentile and the largest value."""
    shares = {"min": 0.0, "median": 0.5, "p90": 0.9, "max": 1.0}
    return {name: round(float(np.quantile(values, share)), 3) for name, share in shares.items()}


class Parts(Protocol):
    """Where finished parts of a verification are kept by name, so that an interrupted one continues."""

    def get(self, name: str) -> Any:
        """Return the part of this name, a JSON value; None if there is none yet."""

    def keep(self, name: str, value: Any) -> None:
        """Keep a part."""


class _NoParts:
    """Keeps nothing."""

    def get(self, name: str) -> Any:
        return None

    def keep(self, name: str, value: Any) -> None:
        pass


def verify(
    model: nn.Module,
    test: Any,
    *,
    threat: Threat | str,
    n: int | None = None,
    attacks: bool = True,
    linear: bool = False,
    autoattack: bool = False,
    time_per_image: float | None = None,
    processes: int = 1,
    seed: int = 0,
    batch_size: int = 100,
    factors: Mapping[str, Weight] | None = None,
) -> Verification:
    """Prove, or break, each of the first n test images; docs/verification.md says what a proof covers.

    Args:
        model: module from images (n, c, h, w) in [0, 1] to logits, of operations that a graph can hold. It is verified
            in evaluation mode, whatever its mode is, as in `evaluate`; in float32 on the CPU. It is not changed.
        test: a DataLoader, a dataset of (image, label) pairs, or a pair of tensors; images in [0, 1]. If they are
            sorted by class, they are taken in a fixed mixed order, as `evaluate` does.
        threat: what the adversary may do, ``Linf(8 / 255)`` or "linf:8/255"; there are proofs for linf only.
        n: number of images, the first ones; all by default.
        attacks: attack the images that intervals do not certify by `pgd-strong` and `interval-pgd`; without them the
            proofs are the same, and more images remain undecided.
        linear: bound the images that are undecided then by backward linear bounds, which take a second
            or, if most ReLUs are open, many seconds each.
        autoattack: run AutoAttack on the images that are undecided then.
        time_per_image: run the complete method for at most so many seconds on each image that is undecided then; it
            includes `linear`.
        processes: number of processes that share the images, with one thread each. If there are several, the script
            that calls this function needs the guard ``if __name__ == "__main__":``, since each process imports it.
        seed: keys the random starts of attacks.
        batch_size: number of images that are taken at once. The verdicts of AutoAttack depend on it.
        factors: of the weights of a model file, if the engine runs them (`artifact.LoadedModel.factors`); by default
            those of the model's own factorized layers.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).requires_grad_(False)
    >>> _ = model[1].weight.copy_(torch.tensor([[1.0], [-1.0]])), model[1].bias.copy_(torch.tensor([0.0, 1.0]))
    >>> images = torch.tensor([0.8, 0.6]).view(2, 1, 1, 1)
    >>> verify(model, (images, torch.tensor([0, 1])), threat="linf:0.2").verdicts
    ('certified', 'broken')

    Raises:
        ValueError: another norm than linf, eps above 1, a model with an operation without a rule or with constants that
            are not finite, or one that does not fit the images.
        WorkerEnded: one of several processes ended before it was done.
    """
    options = VerifyOptions(
        n=n,
        attacks=attacks,
        linear=linear,
        autoattack=autoattack,
        time_per_image=time_per_image,
        processes=processes,
        seed=seed,
        batch_size=batch_size,
    )
    with prepared_torch(torch.device("cpu")):
        *_, result = run_verification(model, test, threat, options, factors=factors)
    assert isinstance(result, Verification)
    return result


def run_verification(
    model: nn.Module,
    test: Any,
    threat: Threat | str,
    options: VerifyOptions,
    *,
    factors: Mapping[str, Weight] | None = None,
    parts: Parts | None = None,
) -> Iterator[BatchVerified | Verification]:
    """Verify step by step: yield after every batch of every stage, and at last the result.

    Args:
        factors: see `verify`.
        parts: finished batches of an earlier call with the same arguments; processes, and the options that ask for
            stages, may differ.

    Raises:
        ValueError: as `verify`.
        WorkerEnded: as `verify`.
    """
    threat = as_threat(threat)
    images = mix_classes(as_images(test)).to("cpu")
    check_provable(threat, images.pixels[0].numel())
    model = accept_model(model, images)
    executions = list_executions(model, tuple(images.pixels.shape[1:]), factors)
    executions.sort(key=lambda execution: execution.graph.macs(dense=True))  # most proofs that fail do so on each
    model = fold(model).float().cpu().eval()
    check_model(model, images, None, probabilities=True)
    model, images = prepare(model, images)
    images = images.take(slice(0, count_examples(images, options.n)))
    problem = Problem(
        model=model,
        images=images,
        executions=executions,
        threat=threat,
        seed=options.seed,
        time_per_image=options.time_per_image,
        keep=options.keep,
    )
    bounded = _has_interval_bounds(model, images, threat)
    stages = tuple(name for name in options.stages if bounded or not STAGES[name].needs_intervals)
    settings = {
        name: build_protocol(model, images, threat, name, seed=options.seed).settings
        for name in stages
        if STAGES[name].is_attack
    }
    progress, parts = _Progress(images), _NoParts() if parts is None else parts
    with Workers(problem, options.processes) as workers:
        for name in stages:
            rows = progress.list_undecided()
            for batch, part in _run_stage(workers, name, rows, options, parts):
                progress.add(name, batch, part)
                yield progress.describe(name, len(rows))
    examples = None
    if options.keep:
        breaking = [name for name in stages if BROKEN in STAGES[name].verdicts]
        examples = progress.collect_examples(model, attacks=breaking, threat=str(threat), seed=options.seed)
    yield Verification(
        threat=threat,
        verdicts=tuple(progress.verdicts),
        decided_by=tuple(progress.decided_by),
        stages=stages,
        taken={name: progress.taken[name] for name in stages},
        seconds={name: progress.seconds.get(name, 0.0) for name in stages},
        settings=settings,
        searched=tuple(sorted(progress.searched, key=lambda one: one.row)),
        examples=examples,
    )


def _has_interval_bounds(model: nn.Module, images: Images, threat: Threat) -> bool:
    """Return whether the module runs on intervals, as the graph that is traced from it does."""
    try:
        interval_accuracy(model, images, threat, n=1)
    except USER_CODE_ERRORS:  # the user's module may meet anything there
        return False
    return True


def _run_stage(
    workers: Workers, name: str, rows: Sequence[int], options: VerifyOptions, parts: Parts
) -> Iterator[tuple[list[int], Part]]:
    """Run a stage on rows in batches, unless it did so in an earlier call; yield each batch and its part."""
    stage, waiting = STAGES[name], dict[str, list[int]]()
    size = min(options.batch_size, stage.most or options.batch_size)
    for start in range(0, len(rows), size):
        batch = list(rows[start : start + size])
        key = f"{name} {batch[0]}"
        part = parts.get(key)
        if part is not None and _is_valid(part, batch, options):
            yield batch, part
        else:
            waiting[key] = batch
    batches = list(waiting.items())
    for position, part in workers.run(name, [batch for _, batch in batches]):
        key, batch = batches[position]
        parts.keep(key, part)
        yield batch, part


def _is_valid(part: Part, batch: Sequence[int], options: VerifyOptions) -> bool:
    """Return whether a part of an earlier call is what a stage would decide now.

    Other stages may have run before, so that the batch was another one, and another time limit may leave other images
    undecided.
    """
    is_in_time = part.get("limit") in (None, options.time_per_image)
    return part["rows"] == batch and (is_in_time or bool(part["certified"] or part["broken"]))


class _Progress:
    """What is decided so far; lists are in the order of the images."""

    def __init__(self, images: Images) -> None:
        self.verdicts = [UNDECIDED] * len(images)
        self.decided_by: list[str | None] = [None] * len(images)
        self.taken, self.seconds = Counter[str](), dict[str, float]()
        self.searched: list[ImageSearched] = []
        self._images, self._encoded = images, dict[int, str]()

    def list_undecided(self) -> list[int]:
        """Return the rows of images without a verdict."""
        return [row for row, verdict in enumerate(self.verdicts) if verdict == UNDECIDED]

    def add(self, stage: str, batch: Sequence[int], part: Part) -> None:
        """Add what a stage decided of a batch of rows."""
        for verdict in STAGES[stage].verdicts:
            for row in part[verdict]:
                self.verdicts[row], self.decided_by[row] = verdict, stage
        self._encoded.update(zip(part["broken"], part.get("images", ()), strict=False))
        self.taken[stage] += len(batch)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + part["seconds"]
        if "unstable" in part:
            (row,) = batch
            self.searched.append(
                ImageSearched(
                    row=row,
                    verdict=self.verdicts[row],
                    seconds=part["seconds"],
                    unstable=part["unstable"],
                    branches=part["branches"],
                )
            )

    def describe(self, stage: str, total: int) -> BatchVerified:
        """Return the event that a stage has taken so many of `total` images."""
        return BatchVerified(
            stage=stage,
            done=self.taken[stage],
            total=total,
            certified=self.verdicts.count(CERTIFIED),
            broken=self.verdicts.count(BROKEN),
            n=len(self.verdicts),
        )

    def collect_examples(self, model: nn.Module, **about: Any) -> AdversarialExamples:
        """Return for each image the one that broke it, or else the image itself, with the model's predictions."""
        adv = self._images.float_pixels(slice(None)).clone()
        for row, text in self._encoded.items():
            adv[row] = decode_image(text, adv.shape[1:])
        predicted = torch.cat([predictions(model, part) for part in torch.split(adv, 500)])
        pairs = zip(self.verdicts, self.decided_by, strict=True)
        fooled = torch.tensor([verdict == BROKEN and stage != "clean" for verdict, stage in pairs])
        return AdversarialExamples(adv, self._images.labels, fooled, predicted, about)
