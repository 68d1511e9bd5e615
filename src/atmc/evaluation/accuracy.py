"""Accuracy, clean and under attack: which images are attacked, in which batches, and what counts as fooled.

An accuracy is the share of examples that no stage of the attack fooled, together with the attack's settings. Only
examples that are still right are attacked. The randomness of our own attacks is keyed by seed, restart and example, so
that their accuracies depend neither on batch size nor on order; those of AutoAttack depend on the batches, as in
pyautoattack. Whatever precision the user has chosen for training, float32 is full here (no TF32).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from atmc.core.torch_state import full_float32
from atmc.data import Images
from atmc.evaluation.attacks import Protocol, build_protocol
from atmc.evaluation.statistics import Accuracy
from atmc.evaluation.verdicts import Verdicts
from atmc.robust.attacks import PgdSettings, attack_mode
from atmc.robust.intervals import certified
from atmc.robust.threats import Threat

SLACK = 1e-4  # an image whose distance exceeds eps by more than this share does not count (float32 rounding)


@dataclass(frozen=True)
class BatchAttacked:
    """A batch was attacked: `right` of the first `n` examples are still right, an upper bound until the last stage."""

    attack: str
    stage: str
    right: int
    n: int
    verdicts: Verdicts


def clean_accuracy(model: nn.Module, images: Images, *, n: int | None = None, batch_size: int = 500) -> Accuracy:
    """Return the accuracy on the first n unchanged images, all by default."""
    count = count_examples(images, n)
    return Accuracy.of(torch.cat([predictions(model, x) == y for x, y in _batches(images, count, batch_size)]))


@full_float32()
@torch.no_grad()
def interval_accuracy(
    model: nn.Module, images: Images, threat: Threat, *, n: int | None = None, batch_size: int = 500
) -> Accuracy:
    """Return the share of the first n images whose label interval bounds certify, in float32 and without a margin.

    For validation: `robust.intervals` claims no soundness.
    """
    count = count_examples(images, n)
    with attack_mode(model):
        return Accuracy.of(
            torch.cat([certified(model, x, y, threat) for x, y in _batches(images, count, batch_size)]), eps=threat.eps
        )


@full_float32()
@torch.no_grad()
def predictions(model: nn.Module, x: Tensor) -> Tensor:
    """Return the (n,) predicted classes in evaluation mode; -1, no class, if an output is not a finite number."""
    with attack_mode(model):
        logits = model(x).float()
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


@full_float32()
def robust_accuracy(
    model: nn.Module,
    images: Images,
    threat: Threat,
    attack: str = "pgd",
    *,
    n: int | None = None,
    steps: int | None = None,
    step_size: float | None = None,
    restarts: int = 1,
    loss: str = "ce",
    seed: int = 0,
    batch_size: int = 500,
    keep: bool = False,
) -> Accuracy:
    """Return the accuracy on the first n images under an attack: right when clean, and after every stage and restart.

    Args:
        attack: a key of `attacks.ATTACKS`.
        n: number of examples, all by default.
        steps, step_size, restarts, loss: of ``pgd``, and of the ``pgd`` in ``pgd-strong``: see `PgdSettings.paper`.
        seed: keys random starts.
        batch_size: images attacked at once.
        keep: keep the adversarial images, in the result's `adv`.

    Raises:
        ValueError: an unknown attack, one that does not exist for the threat's norm, n < 1, a seed that does not fit
            into 63 bits, or settings that make no sense.
    """
    pgd = PgdSettings.paper(threat, steps=steps, step_size=step_size, restarts=restarts, loss=loss)
    count = count_examples(images, n)
    protocol = build_protocol(model, images, threat, attack, pgd=pgd, seed=seed)
    verdicts = Verdicts.fresh(images, count, keep=keep)
    for _ in run_protocol(model, images, protocol, verdicts, batch_size=batch_size):
        pass
    return summarize(protocol, verdicts)


def count_examples(images: Images, n: int | None) -> int:
    """Return the number of images that n asks for: all if it is None, and never more than there are.

    Raises:
        ValueError: n < 1, or no images.
    """
    if n is not None and n < 1:
        raise ValueError(f"expected n >= 1 examples, got {n}")
    if not len(images):
        raise ValueError("expected at least one image, got none")
    return min(n or len(images), len(images))


def run_protocol(
    model: nn.Module,
    images: Images,
    protocol: Protocol,
    verdicts: Verdicts,
    *,
    batch_size: int = 500,
    until: float | None = None,
    survivors: Tensor | None = None,
) -> Iterator[BatchAttacked]:
    """Run an attack on the first examples, continuing from `verdicts` and updating it; yield after every batch.

    Args:
        verdicts: the progress so far, see `Verdicts`.
        batch_size: examples attacked at once. Each stage fills its batches from the examples that are still right.
        until: a time of `time.monotonic` at which to stop. The examples then go through all stages one batch at a
            time, so that those before `verdicts.start` are finished when the time is over; at least one batch is.
        survivors: (n,) bool, on the CPU: only these are attacked, and the others count as wrong; by default all.
    """
    n = len(verdicts.right)
    if survivors is not None:
        verdicts.right &= survivors  # in a continued state, since which the earlier attack may have broken more
    block = n if until is None else batch_size
    while verdicts.start < n and not (until is not None and verdicts.start and time.monotonic() >= until):
        end = min(verdicts.start + block, n)
        yield from _run_block(model, images, protocol, verdicts, end, batch_size, survivors)
        verdicts.start, verdicts.stage = end, -1


def _run_block(
    model: nn.Module,
    images: Images,
    protocol: Protocol,
    verdicts: Verdicts,
    end: int,
    batch_size: int,
    survivors: Tensor | None,
) -> Iterator[BatchAttacked]:
    """Run all stages on the examples from `verdicts.start` to end."""
    whole = torch.arange(verdicts.start, end)
    if verdicts.stage < 0:
        for part in torch.split(whole, batch_size):
            rows = part.to(images.labels.device)
            verdicts.right[part] = (predictions(model, images.float_pixels(rows)) == images.labels[rows]).cpu()
        if survivors is not None:
            verdicts.right[whole] &= survivors[whole]
        verdicts.stage, verdicts.done, verdicts.queue = 0, 0, whole[verdicts.right[whole]]
    while verdicts.stage < len(protocol.stages):
        stage = protocol.stages[verdicts.stage]
        while verdicts.done < len(verdicts.queue):
            part = verdicts.queue[verdicts.done : verdicts.done + batch_size]
            _attack_batch(model, images, protocol, verdicts, part)
            verdicts.done += len(part)
            still_right = int(verdicts.right[:end].sum())
            yield BatchAttacked(protocol.attack, stage.name, still_right, end, verdicts)
        verdicts.stage, verdicts.done, verdicts.queue = verdicts.stage + 1, 0, whole[verdicts.right[whole]]


@full_float32()
def _attack_batch(model: nn.Module, images: Images, protocol: Protocol, verdicts: Verdicts, part: Tensor) -> None:
    """Attack one batch with the current stage; an image outside the ball or [0, 1] does not count."""
    rows = part.to(images.labels.device)
    x, y = images.float_pixels(rows), images.labels[rows]
    adv = protocol.stages[verdicts.stage].perturb(x, y, rows)
    distance = protocol.threat.distance(adv, x) if protocol.threat else torch.zeros(len(x), device=x.device)
    allowed = find_allowed(adv, x, protocol.threat)
    wrong = predictions(model, adv) != y
    fooled = (wrong & allowed).cpu()
    if not protocol.spec.minimal_norm:
        verdicts.refused += int((~allowed).sum())
    change = (adv - x).flatten(1)
    verdicts.l2[part], verdicts.linf[part] = change.norm(dim=1).cpu(), change.abs().amax(1).cpu()
    broken = part[fooled]
    verdicts.right[broken] = False
    verdicts.fooled_by[broken] = verdicts.stage
    verdicts.distance[broken] = distance.cpu()[fooled]
    if verdicts.adv is not None:
        verdicts.adv[broken] = adv.cpu()[fooled]


def find_allowed(adv: Tensor, x: Tensor, threat: Threat | None) -> Tensor:
    """Return (n,) bool: whether images count as adversarial to x, being in [0, 1] and, unless it is None, the ball."""
    allowed = (adv.flatten(1).amin(1) >= 0) & (adv.flatten(1).amax(1) <= 1)  # false if a pixel is not a number
    return allowed if threat is None else allowed & (threat.distance(adv, x) <= threat.eps * (1 + SLACK))


def summarize(protocol: Protocol, verdicts: Verdicts) -> Accuracy:
    """Return the accuracy on the examples that are finished, which are all unless the time ran out."""
    n = verdicts.start
    names = tuple(stage.name for stage in protocol.stages)
    report = protocol.spec.report(verdicts, names) if protocol.spec.report else {}
    return replace(
        Accuracy.of(verdicts.right[:n], **protocol.settings, **report),
        fooled_by=verdicts.fooled_by[:n],
        stages=names,
        adv=None if verdicts.adv is None else verdicts.adv[:n],
        largest=float(verdicts.distance[:n].amax()) if n else 0.0,
        refused=verdicts.refused,
    )


def _batches(images: Images, count: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (x float32 in [0, 1], y) of the first count images, in batches."""
    for start in range(0, count, batch_size):
        index = torch.arange(start, min(start + batch_size, count), device=images.labels.device)
        yield images.float_pixels(index), images.labels[index]
