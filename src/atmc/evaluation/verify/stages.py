"""The stages of a verification by name, from the cheapest on: the table `STAGES` says what each may decide, and how.

A stage takes rows, positions of images among those that are verified, and decides some of them; the next one takes the
rest. A proof and an attack cannot both succeed on an image, so the order changes the time and no verdict.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from atmc.data import Images
from atmc.evaluation.accuracy import SLACK, predictions, run_protocol
from atmc.evaluation.attacks import build_protocol
from atmc.evaluation.verdicts import Verdicts
from atmc.evaluation.verify.complete import decide
from atmc.evaluation.verify.executions import Execution, Prove, prove_executions, prove_intervals
from atmc.evaluation.verify.linear import prove_linear
from atmc.robust.threats import Threat

CERTIFIED, BROKEN, UNDECIDED = "certified", "broken", "undecided"
Part = dict[str, Any]  # what a stage decided of a batch, as JSON


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model, the images on which it is verified, and what the adversary may do.

    Args:
        model: in float32, on the CPU, in evaluation mode.
        executions: what runs of the model.
        seed: keys random starts.
        time_per_image: seconds for the complete method; None if it does not run.
        keep: whether the images that break others are kept.
    """

    model: nn.Module
    images: Images
    executions: Sequence[Execution]
    threat: Threat
    seed: int
    time_per_image: float | None
    keep: bool

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images (n, c, h, w), float32 in [0, 1], and the labels (n,) of rows (n,)."""
        return self.images.float_pixels(rows), self.images.labels[rows]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a stage decided of a batch.

    Args:
        certified: rows.
        broken: by row, the image (c, h, w) that the model gets wrong.
        details: more figures, as JSON.
    """

    certified: Sequence[int] = ()
    broken: Mapping[int, Tensor] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of a verification.

    Args:
        verdicts: those that it may give.
        decide: (problem, name of the stage, rows (b,)) -> the decision.
        options: the fields of `VerifyOptions` of which each asks for it; none if it always runs.
        is_attack: whether it is the attack of this name in `evaluation.attacks`.
        needs_intervals: whether it attacks through the interval bounds of `robust.intervals`; it does not run for a
            module without them.
        most: the largest number of images that it takes at once; None for the batch size that the user chose.
    """

    verdicts: tuple[str, ...]
    decide: Callable[[Problem, str, Tensor], Decision]
    options: tuple[str, ...] = ()
    is_attack: bool = False
    needs_intervals: bool = False
    most: int | None = None


def run_stage(problem: Problem, stage: str, rows: Sequence[int]) -> Part:
    """Return what a stage decides of rows: the lists rows, certified and broken, seconds, and details.

    If the problem says so, images has those that broke the rows of broken, encoded as text.
    """
    began = time.monotonic()
    decision = STAGES[stage].decide(problem, stage, torch.tensor(rows))
    part: Part = {"rows": list(rows), "certified": list(decision.certified), "broken": list(decision.broken)}
    if problem.keep:
        part["images"] = [_encode(image) for image in decision.broken.values()]
    return part | {"seconds": time.monotonic() - began, **decision.details}


def _encode(image: Tensor) -> str:
    return base64.b64encode(image.numpy().astype("<f4").tobytes()).decode()


def decode_image(text: str, shape: Sequence[int]) -> Tensor:
    """Return an image (c, h, w) of a part."""
    pixels = np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)
    return torch.from_numpy(pixels).view(*shape)


def _find_wrong(problem: Problem, stage: str, rows: Tensor) -> Decision:
    x, labels = problem.take(rows)
    wrong = predictions(problem.model, x) != labels
    return Decision(broken=dict(zip(rows[wrong].tolist(), x[wrong], strict=True)))


def _prove_by(prove_one: Prove) -> Callable[[Problem, str, Tensor], Decision]:
    def prove(problem: Problem, stage: str, rows: Tensor) -> Decision:
        proved = prove_executions(problem.executions, *problem.take(rows), problem.threat, prove_one)
        return Decision(certified=rows[proved].tolist())

    return prove


def _attack(problem: Problem, stage: str, rows: Tensor) -> Decision:
    protocol = build_protocol(problem.model, problem.images, problem.threat, stage, seed=problem.seed)
    verdicts = Verdicts.fresh(problem.images, len(problem.images), keep=False)
    verdicts.right[rows], verdicts.stage, verdicts.queue = True, 0, rows  # the clean pass is done
    verdicts.adv = torch.empty(problem.images.pixels.shape)  # only the rows that are broken get values
    for _ in run_protocol(problem.model, problem.images, protocol, verdicts, batch_size=len(rows)):
        pass
    return Decision(broken={row: verdicts.adv[row] for row in rows[~verdicts.right[rows]].tolist()})


def _decide_completely(problem: Problem, stage: str, rows: Tensor) -> Decision:
    """Decide one image; what the complete method calls broken counts only if the model errs on an image that counts."""
    (row,), (x, label) = rows.tolist(), problem.take(rows)
    assert problem.time_per_image is not None
    outcome = decide(
        problem.model,
        problem.executions,
        x[0],
        int(label),
        problem.threat,
        seconds=problem.time_per_image,
        seed=problem.seed,
    )
    details = {"limit": problem.time_per_image, "unstable": outcome.unstable, "branches": outcome.branches}
    if outcome.verdict == CERTIFIED:
        return Decision(certified=[row], details=details)
    if outcome.image is not None and _is_broken_by(problem, x, label, outcome.image[None]):
        return Decision(broken={row: outcome.image}, details=details)
    return Decision(details=details)


def _is_broken_by(problem: Problem, x: Tensor, label: Tensor, adv: Tensor) -> bool:
    """Return whether an image adv (1, c, h, w) counts, as `evaluation.accuracy` says, and the model errs on it."""
    allowed = bool(((adv >= 0) & (adv <= 1)).all())
    near = float(problem.threat.distance(adv, x)) <= problem.threat.eps * (1 + SLACK)
    return allowed and near and bool(predictions(problem.model, adv) != label)


STAGES = {
    "clean": Stage(verdicts=(BROKEN,), decide=_find_wrong),
    "interval": Stage(verdicts=(CERTIFIED,), decide=_prove_by(prove_intervals)),
    "pgd-strong": Stage(verdicts=(BROKEN,), decide=_attack, is_attack=True, options=("attacks",)),
    "interval-pgd": Stage(
        verdicts=(BROKEN,), decide=_attack, is_attack=True, needs_intervals=True, options=("attacks",)
    ),
    "linear": Stage(
        verdicts=(CERTIFIED,), decide=_prove_by(prove_linear), options=("linear", "time_per_image"), most=10
    ),
    "autoattack": Stage(verdicts=(BROKEN,), decide=_attack, is_attack=True, options=("autoattack",)),
    "complete": Stage(verdicts=(CERTIFIED, BROKEN), decide=_decide_completely, options=("time_per_image",), most=1),
}
