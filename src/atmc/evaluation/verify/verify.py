"""Give each image a verdict: certified by a proof, broken by an image that was found, or undecided.

The stages run from the cheapest on; each takes the images that are undecided until then:

- ``clean``: an image that is wrong without an attack is broken;
- ``interval``: certified if interval bounds prove every graph that runs (see `list_executions`);
- ``pgd-strong``: broken if this attack finds an image that counts (see `evaluation.accuracy`);
- ``autoattack``: likewise, if it is asked for.

A proof and an attack cannot both succeed on an image, so the order of these two changes the time and no verdict.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from atmc.compress.factorize import fold
from atmc.core.arguments import check_module
from atmc.core.rng import check_seed
from atmc.data import Images, as_images, mix_classes
from atmc.evaluation.accuracy import count_examples, predictions, run_protocol
from atmc.evaluation.attacks import Protocol as AttackProtocol
from atmc.evaluation.attacks import build_protocol
from atmc.evaluation.evaluate import check_model, prepare
from atmc.evaluation.statistics import Accuracy
from atmc.evaluation.verdicts import Verdicts
from atmc.evaluation.verify.bounds import bound_images, check_provable, prove
from atmc.evaluation.verify.executions import Execution, list_executions
from atmc.pack.weight_forms import Weight
from atmc.robust.threats import Threat, as_threat

CERTIFIED, BROKEN, UNDECIDED = "certified", "broken", "undecided"
STAGES = {
    "clean": BROKEN,
    "interval": CERTIFIED,
    "pgd-strong": BROKEN,
}  # by deciding stage
LAST_STAGES = {"autoattack": BROKEN}  # those that are asked for
VERDICTS = STAGES | LAST_STAGES


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """How a verification is done: the arguments of `verify`.

    Raises:
        ValueError: options that make no sense.
    """

    n: int | None = None
    autoattack: bool = False
    seed: int = 0
    batch_size: int = 100

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.n is not None and self.n < 1:
            raise ValueError(f"expected n >= 1 examples, got {self.n}")
        if self.batch_size < 1:
            raise ValueError(f"expected batch_size >= 1, got {self.batch_size}")

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that run, in order."""
        return tuple(VERDICTS if self.autoattack else STAGES)


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
class Verification:
    """Verdicts on n images.

    Args:
        threat: what was proved against.
        decided_by: for each image, in the order in which they were taken, the stage that decided it, None if it is
            undecided.
        stages: the stages that ran, in order.
        taken: how many images each stage took.
        seconds: time of each stage.
        settings: of each attack, as in metrics.json.
    """

    threat: Threat
    decided_by: tuple[str | None, ...]
    stages: tuple[str, ...]
    taken: Mapping[str, int]
    seconds: Mapping[str, float]
    settings: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def verdicts(self) -> tuple[str, ...]:
        """For each image "certified", "broken" or "undecided"."""
        return tuple(UNDECIDED if stage is None else VERDICTS[stage] for stage in self.decided_by)

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

    def to_json(self) -> dict[str, Any]:
        """Return the keys clean, certified, attacked, stages and decided_by of the JSON of `atmc verify`."""
        n, eps = len(self.decided_by), self.threat.eps
        shares = {
            verdict: {name: round(self.by_stage[name] / n, 6) for name in self.stages if VERDICTS[name] == verdict}
            for verdict in (CERTIFIED, BROKEN)
        }
        certified = {**self.certified.to_json(), "eps": eps, "by": shares[CERTIFIED]}
        return {
            "clean": self.clean.to_json(),
            "certified": certified | {"undecided": round(self.undecided, 6)},
            "attacked": {**self.attacked.to_json(), "eps": eps, "broken_by": shares[BROKEN], "attacks": self.settings},
            "stages": [
                {
                    "stage": name,
                    "verdict": VERDICTS[name],
                    "images": self.taken[name],
                    "decided": self.by_stage[name],
                    "seconds": round(self.seconds[name], 2),
                }
                for name in self.stages
            ],
            "decided_by": list(self.decided_by),
        }


class Parts(Protocol):
    """Where finished parts of a verification are kept by name, so that an interrupted one continues."""

    def get_or_measure(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return the part of this name, a JSON value; if there is none yet, measure and keep it."""


class _NoParts:
    """Keeps nothing."""

    def get_or_measure(self, name: str, measure: Callable[[], Any]) -> Any:
        return measure()


def verify(
    model: nn.Module,
    test: Any,
    *,
    threat: Threat | str,
    n: int | None = None,
    autoattack: bool = False,
    seed: int = 0,
    batch_size: int = 100,
    factors: Mapping[str, Weight] | None = None,
) -> Verification:
    """Prove, or break, each of the first n test images; docs/verification.md says what a proof covers.

    Args:
        model: module from images (n, c, h, w) in [0, 1] to logits, of operations that a graph can hold. It is verified
            in evaluation mode, in float32 on the CPU, and is not changed.
        test: a DataLoader, a dataset of (image, label) pairs, or a pair of tensors; images in [0, 1]. If they are
            sorted by class, they are taken in a fixed mixed order, as `evaluate` does.
        threat: what the adversary may do, ``Linf(8 / 255)`` or "linf:8/255"; there are proofs for linf only.
        n: number of images, the first ones; all by default.
        autoattack: run AutoAttack on the images that are undecided after `pgd-strong`.
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
    """
    options = VerifyOptions(n=n, autoattack=autoattack, seed=seed, batch_size=batch_size)
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
        parts: finished batches of an earlier call with the same arguments; `autoattack` may differ.

    Raises:
        ValueError: as `verify`.
    """
    check_module(model)
    threat = as_threat(threat)
    images = mix_classes(as_images(test)).to("cpu")
    check_provable(threat, images.pixels[0].numel())
    executions = list_executions(model, tuple(images.pixels.shape[1:]), factors)
    model = fold(model).float().cpu().eval()
    check_model(model, images, None, probabilities=True)
    model, images = prepare(model, images)
    protocols = {
        name: build_protocol(model, images, threat, name, seed=options.seed)
        for name in options.stages
        if name not in ("clean", "interval")
    }
    n = count_examples(images, options.n)
    stages: dict[str, Callable[[Tensor], Tensor]] = {
        "clean": partial(_find_wrong, model, images),
        "interval": partial(_prove_batch, executions, images, threat),
        **{name: partial(_attack_batch, model, images, protocol, n) for name, protocol in protocols.items()},
    }
    decided_by: list[str | None] = [None] * n
    seconds, taken = dict.fromkeys(stages, 0.0), dict.fromkeys(stages, 0)
    parts = parts or _NoParts()
    for name, decide in stages.items():
        rows = [row for row, stage in enumerate(decided_by) if stage is None]
        for start in range(0, len(rows), options.batch_size):
            batch = rows[start : start + options.batch_size]
            outcome = parts.get_or_measure(f"{name} {start}", partial(_time, decide, torch.tensor(batch)))
            for row in outcome["decided"]:
                decided_by[row] = name
            seconds[name] += outcome["seconds"]
            taken[name] += len(batch)
            yield BatchVerified(
                stage=name,
                done=taken[name],
                total=len(rows),
                certified=sum(stage is not None and VERDICTS[stage] == CERTIFIED for stage in decided_by),
                broken=sum(stage is not None and VERDICTS[stage] == BROKEN for stage in decided_by),
                n=n,
            )
    yield Verification(
        threat=threat,
        decided_by=tuple(decided_by),
        stages=tuple(stages),
        taken=taken,
        seconds=seconds,
        settings={name: protocol.settings for name, protocol in protocols.items()},
    )


def prove_executions(executions: Sequence[Execution], x: Tensor, labels: Tensor, threat: Threat) -> Tensor:
    """Return (n,) bool: whether interval bounds prove each image x (n, c, h, w) for everything that runs.

    Raises:
        ValueError: as `bound_images`.
    """
    proved = torch.ones(len(x), dtype=torch.bool)
    for execution in executions:
        rows = proved.nonzero()[:, 0]
        if len(rows):
            box = bound_images(x[rows], threat)
            proved[rows] = prove(execution.graph, box, labels[rows], execution.rounding)
    return proved


# Stages: rows (b,) of images -> (b,) bool, which of them are decided.


def _time(decide: Callable[[Tensor], Tensor], rows: Tensor) -> dict[str, Any]:
    began = time.monotonic()
    decided = rows[decide(rows)].tolist()
    return {"decided": decided, "seconds": time.monotonic() - began}


def _find_wrong(model: nn.Module, images: Images, rows: Tensor) -> Tensor:
    return predictions(model, images.float_pixels(rows)) != images.labels[rows]


@torch.no_grad()
def _prove_batch(executions: Sequence[Execution], images: Images, threat: Threat, rows: Tensor) -> Tensor:
    return prove_executions(executions, images.float_pixels(rows), images.labels[rows], threat)


def _attack_batch(model: nn.Module, images: Images, protocol: AttackProtocol, n: int, rows: Tensor) -> Tensor:
    verdicts = Verdicts.fresh(images, n, keep=False)
    verdicts.right[rows], verdicts.stage, verdicts.queue = True, 0, rows  # the clean pass is done
    for _ in run_protocol(model, images, protocol, verdicts, batch_size=len(rows)):
        pass
    return ~verdicts.right[rows]
