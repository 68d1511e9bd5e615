"""Accuracy, clean and under attack: who is attacked, in which batches, and what counts as fooled.

A figure is the share of examples that no stage of the named attack fooled; what it did stands beside it. Only examples
that are still right are attacked. The randomness of our own attacks is keyed by seed, restart and example, so that
their figures depend neither on batch size nor on order; AutoAttack's depends on the batches, as pyautoattack has it.
Whatever precision the user has chosen for training, float32 is full here (no TF32).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from atmc.core.numerics import full_float32
from atmc.data import Images
from atmc.evaluation.attacks import Custom, Protocol, build_protocol
from atmc.evaluation.statistics import Accuracy
from atmc.robust.attacks import attack_mode
from atmc.robust.threats import Threat

SLACK = 1e-4  # relative, of distances in float32: an image that is farther than eps by more does not count


@dataclass
class Verdicts:
    """Where a protocol stands: all that it takes to go on. Tensors are (n, ...), on the CPU.

    Examples before `start` are judged. Of the block [start, end), `queue` waits for stage `stage` (-1: for the clean
    pass), of it the first `done` had their turn.
    """

    right: Tensor
    fooled_by: Tensor
    l2: Tensor
    linf: Tensor
    distance: Tensor
    queue: Tensor
    adv: Tensor | None = None
    start: int = 0
    stage: int = -1
    done: int = 0
    refused: int = 0

    @classmethod
    def fresh(cls, images: Images, n: int, *, keep: bool) -> Verdicts:
        """Of n examples, none judged yet; with keep, adversarial images are kept."""
        nothing = torch.full((n,), torch.nan)
        adv = images.float_pixels(slice(0, n)).cpu().clone() if keep else None
        empty = torch.zeros(0, dtype=torch.int64)
        right, fooled_by = torch.zeros(n, dtype=torch.bool), torch.full((n,), -1, dtype=torch.int8)
        return cls(right, fooled_by, nothing, nothing.clone(), torch.zeros(n), empty, adv)


@dataclass(frozen=True)
class BatchAttacked:
    """A batch was attacked: `right` of the first `n` examples are still right, an upper bound until the last stage."""

    attack: str
    stage: str
    right: int
    n: int
    verdicts: Verdicts


def clean_accuracy(model: nn.Module, images: Images, *, n: int | None = None, batch_size: int = 500) -> Accuracy:
    """Accuracy on the first n unchanged images, all by default."""
    count = count_examples(images, n)
    return Accuracy.of(torch.cat([predictions(model, x) == y for x, y in _chunks(images, count, batch_size)]))


@full_float32()
@torch.no_grad()
def predictions(model: nn.Module, x: Tensor) -> Tensor:
    """(n,) predicted classes in evaluation mode; no class (-1) where an output is not a number."""
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
    """Accuracy on the first n images under a named attack: right when clean, and after every stage and restart.

    ``fgsm``; ``pgd``, the paper's unless steps, step_size, restarts or loss say otherwise (steps of 1.25 eps / steps,
    start at x, last iterate); ``pgd-strong`` (40 steps of eps / 10, 5 random restarts, best of steps, together with
    ``pgd``); ``wrm`` (penalty 1.3, 7 steps, no ball: the threat is not used, mean distances are reported); ``cw`` (l2);
    and from AutoAttack, with its parameters, ``apgd-ce``, ``apgd-dlr``, ``fab``, ``square`` and all of ``autoattack``.

    Args:
        n: number of examples, all by default.
        steps, step_size, restarts, loss: of ``pgd``, see `Custom`; steps also of the ``pgd`` in ``pgd-strong``.
        keep: keep the adversarial images, in the result's `adv`.

    Raises:
        ValueError: an unknown attack, one that has no such norm, n < 1, a seed that 63 bits do not hold, or settings
            that make no sense.
    """
    custom = Custom(steps, step_size, restarts, loss)
    count = count_examples(images, n)
    protocol = build_protocol(model, images, threat, attack, custom=custom, seed=seed)
    verdicts = Verdicts.fresh(images, count, keep=keep)
    for _ in run_protocol(model, images, protocol, verdicts, batch_size=batch_size):
        pass
    return summarize(protocol, verdicts)


def count_examples(images: Images, n: int | None) -> int:
    """How many of the images n asks for: all where it is None, and at most all."""
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
) -> Iterator[BatchAttacked]:
    """Attack the examples of `verdicts`, from where it stands, in place; yields after every batch.

    Args:
        batch_size: examples attacked at once. Each stage packs what is left into full batches anew.
        until: a time of `time.monotonic` at which to stop. Then the examples go through the whole protocol a batch at
            a time, so that those before `verdicts.start` are judged in full when the time is over; at least one
            batch is.
    """
    n = len(verdicts.right)
    block = n if until is None else batch_size
    while verdicts.start < n and not (until is not None and verdicts.start and time.monotonic() >= until):
        end = min(verdicts.start + block, n)
        yield from _block(model, images, protocol, verdicts, end, batch_size)
        verdicts.start, verdicts.stage = end, -1


def _block(
    model: nn.Module, images: Images, protocol: Protocol, verdicts: Verdicts, end: int, batch_size: int
) -> Iterator[BatchAttacked]:
    whole = torch.arange(verdicts.start, end)
    if verdicts.stage < 0:
        for part in torch.split(whole, batch_size):
            where = part.to(images.labels.device)
            verdicts.right[part] = (predictions(model, images.float_pixels(where)) == images.labels[where]).cpu()
        verdicts.stage, verdicts.done, verdicts.queue = 0, 0, whole[verdicts.right[whole]]
    while verdicts.stage < len(protocol.stages):
        stage = protocol.stages[verdicts.stage]
        while verdicts.done < len(verdicts.queue):
            part = verdicts.queue[verdicts.done : verdicts.done + batch_size]
            _attack_batch(model, images, protocol, verdicts, part)
            verdicts.done += len(part)
            yield BatchAttacked(protocol.attack, stage.name, int(verdicts.right[:end].sum()), end, verdicts)
        verdicts.stage, verdicts.done, verdicts.queue = verdicts.stage + 1, 0, whole[verdicts.right[whole]]


@full_float32()
def _attack_batch(model: nn.Module, images: Images, protocol: Protocol, verdicts: Verdicts, part: Tensor) -> None:
    """One batch through the stage at hand; an image outside the ball or the box does not count."""
    where = part.to(images.labels.device)
    x, y = images.float_pixels(where), images.labels[where]
    adv = protocol.stages[verdicts.stage].perturb(x, y, where)
    distance = protocol.threat.distance(adv, x) if protocol.threat else torch.zeros(len(x), device=x.device)
    limit = protocol.threat.eps * (1 + SLACK) if protocol.threat else 0.0
    in_box = (adv.flatten(1).amin(1) >= 0) & (adv.flatten(1).amax(1) <= 1)  # false where it is not a number
    allowed = in_box & (distance <= limit)
    wrong = predictions(model, adv) != y
    fooled = (wrong & allowed).cpu()
    if protocol.attack not in ("cw", "fab"):  # these look for the nearest, and may find it beyond eps
        verdicts.refused += int((~allowed).sum())
    change = (adv - x).flatten(1)
    verdicts.l2[part], verdicts.linf[part] = change.norm(dim=1).cpu(), change.abs().amax(1).cpu()
    gone = part[fooled]
    verdicts.right[gone] = False
    verdicts.fooled_by[gone] = verdicts.stage
    verdicts.distance[gone] = distance.cpu()[fooled]
    if verdicts.adv is not None:
        verdicts.adv[gone] = adv.cpu()[fooled]


def summarize(protocol: Protocol, verdicts: Verdicts) -> Accuracy:
    """The figure of the examples that are judged, which is all of them unless the time was over."""
    n = verdicts.start
    found = dict(protocol.settings)
    if protocol.attack == "wrm":
        for name, distances in (("mean_l2", verdicts.l2[:n]), ("mean_linf", verdicts.linf[:n])):
            attacked_ones = distances[~distances.isnan()]
            found[name] = round(float(attacked_ones.mean()), 6) if len(attacked_ones) else None
    names = tuple(stage.name for stage in protocol.stages)
    by, right = verdicts.fooled_by[:n], verdicts.right[:n]
    if protocol.attack == "autoattack":
        clean = right | (by >= 0)
        left = [float((clean & ((by < 0) | (by > position))).float().mean()) for position in range(len(names))]
        found["after"] = {name: round(share, 6) for name, share in zip(names, left, strict=True)}
    return replace(
        Accuracy.of(right, **found),
        fooled_by=by,
        stages=names,
        adv=None if verdicts.adv is None else verdicts.adv[:n],
        largest=float(verdicts.distance[:n].amax()) if n else 0.0,
        refused=verdicts.refused,
    )


def _chunks(images: Images, count: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(x float32 in [0, 1], y) over the first count images."""
    for start in range(0, count, batch_size):
        index = torch.arange(start, min(start + batch_size, count), device=images.labels.device)
        yield images.float_pixels(index), images.labels[index]
