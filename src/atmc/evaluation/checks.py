"""The evaluation's doubts about itself: one function a check, each with a verdict and the figures it rests on.

An accuracy under attack is what the attacks did not manage. Where they were blind it means nothing, and these are the
known ways to be blind (Athalye, Carlini and Wagner 2018; Carlini et al. 2019; Croce and Hein 2020; Croce et al. 2022).
A check never changes a figure. ok is True, False, or None where it could not be answered.

All look at the first 100 images (`suspect.CHECKED`) at most, which keeps them at about 300 gradients an image; `square`
at all that the evaluation's own Square and its white-box attacks saw. "More than the interval" means: below the 95 %
interval (Wilson) of the accuracy it is compared with, on those images, and by more than 2 points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from atmc.core.numerics import full_float32
from atmc.core.rng import Noise
from atmc.evaluation import autoattack
from atmc.evaluation.accuracy import predictions
from atmc.evaluation.attacks import STRONG_STEPS
from atmc.evaluation.statistics import at_least, wilson
from atmc.evaluation.suspect import Check, Suspect, compared, left_by, outputs, relative
from atmc.robust.attacks import LOSSES, attack_mode, fgsm, input_gradient, pgd
from atmc.robust.threats import Linf

QUERIES = 300  # of Square, where the evaluation did not run it
PASSES, DRAWS = 5, 5  # forward passes compared; draws of random noise


def run_checks(found: Suspect) -> Iterator[Check]:
    """Every check, one after the other."""
    for check in CHECKS:
        with full_float32():
            result = check(found)
        yield result


def zero_gradient(found: Suspect) -> Check:
    """A gradient that is exactly zero tells an attack nothing: rounded activations, logits so large that float32 ends.

    Fails where more than 1 % of the images that are right have one, of the loss that PGD climbs.
    """
    x, y = found.x[found.right], found.y[found.right]
    if not len(x):
        return Check("zero_gradient", None, "no image is classified right")
    zero = 0
    for loss in {"ce", found.loss}:
        with attack_mode(found.model):
            _, grad = input_gradient(found.model, x, y, LOSSES[loss])
        zero = max(zero, int((grad.flatten(1).abs().amax(1) == 0).sum()))
    return Check("zero_gradient", zero <= 0.01 * len(x), f"exactly zero at {zero} of {len(x)} images")


@torch.no_grad()
def logits(found: Suspect) -> Check:
    """Probabilities in place of logits weaken every loss; fails where outputs are >= 0 and add up to 1."""
    output = outputs(found.model, found.x)
    low, off = float(output.amin()), float((output.sum(1) - 1).abs().amax())
    detail = f"outputs from {low:.3g} to {float(output.amax()):.3g}, sums at most {off:.3g} from 1"
    return Check("logits", not looks_like_probabilities(output), detail)


def looks_like_probabilities(output: Tensor) -> bool:
    """Whether all outputs (n, classes) are >= 0 and add up to 1."""
    return bool((output >= 0).all()) and bool(((output.sum(1) - 1).abs() < 1e-4).all())


@torch.no_grad()
def deterministic(found: Suspect) -> Check:
    """Attacks must average over chance in the forward pass; fails where the same images give other logits."""
    first = outputs(found.model, found.x)
    passes = [outputs(found.model, found.x) for _ in range(PASSES - 1)]
    apart = max(relative(first, other) for other in passes)
    changed = max(int((first.argmax(1) != other.argmax(1)).sum()) for other in passes)
    detail = f"logits of {PASSES} passes differ by {apart:.2g} of their size, {changed} of {len(first)} predictions"
    return Check("deterministic", apart <= 1e-4 and changed == 0, detail)


@torch.no_grad()
def batch_independence(found: Suspect) -> Check:
    """Logits must not depend on the other images of the batch, as in training-mode batch norm."""
    half = max(1, len(found.x) // 2)
    x = found.x[:half]
    first = outputs(found.model, torch.cat((x, x)))[:half]
    others = [outputs(found.model, torch.cat((x, other)))[:half] for other in (1 - x, found.x[-half:], x * 0)]
    apart = max(relative(first, other) for other in others)
    return Check("batch_independence", apart <= 1e-3, f"logits differ by {apart:.2g} of their size among other images")


def pixel_range(found: Suspect) -> Check:
    """Images, and images of attacks, lie in [0, 1]; the latter in the ball."""
    low, high = float(found.x.amin()), float(found.x.amax())
    refused = sum(attack.refused for attack in found.attacks.values())
    far = max([0.0, *(attack.largest for attack in found.attacks.values())])
    detail = (
        f"images from {low:.4g} to {high:.4g}; largest {found.threat.name} distance {far:.4g} of {found.threat.eps:.4g}"
    )
    detail += f"; {refused} images of attacks outside the ball or [0, 1], not counted" if refused else ""
    return Check("pixel_range", low >= 0 and high <= 1 and not refused, detail)


def labels(found: Suspect) -> Check:
    """A model no better than the commonest label: its classes and the data's are not in the same order."""
    if found.commonest == 1:
        return Check("labels", None, "only one class among the images")
    accuracy = f"clean accuracy {found.clean.accuracy:.2%} of {found.clean.n:,}"
    detail = f"{accuracy}, the commonest label {found.commonest:.0%} of them"
    return Check("labels", found.clean.ci95[0] > found.commonest, detail)


def square(found: Suspect) -> Check:
    """Square needs no gradient: where it breaks what the white-box attacks left, their gradients were no good.

    Where the evaluation ran both, all images that both saw are looked at.
    """
    for name in ("autoattack", "square"):
        if name in found.attacks and (n := found.attacks[name].n) >= len(found.x):
            before = left_by(found.attacks)
            before = found.standing.cpu() if before is None else before[:n]
            after = before & found.attacks[name].right[: len(before)].cpu()
            return compared("square", found, after, f"Square, {autoattack.QUERIES} queries,", before)
    if found.threat.name != "linf" and min(found.x.shape[2:]) < 5:
        return Check("square", None, "Square needs images of at least 5x5 pixels for this norm")
    classes, device = outputs(found.model, found.x[:2]).shape[1], found.x.device
    parts = autoattack.attacks(
        found.model, found.threat, "square", classes=classes, seed=found.seed, device=device, queries=QUERIES
    )
    return compared(
        "square", found, found.withstand(lambda x, y, _: parts["square"](x, y)), f"Square, {QUERIES} queries,"
    )


def more_steps(found: Suspect) -> Check:
    """An attack that has converged gains nothing by twice the steps."""
    steps, size = 2 * found.steps, found.step_size
    noise = None if found.against == ("pgd",) else found.noise("more steps")
    after = found.withstand(_pgd(found, steps, size, found.loss, noise))
    return compared("more_steps", found, after, f"PGD with {steps} steps")


def more_restarts(found: Suspect) -> Check:
    """Nor by other starts."""
    left = found.standing
    for draw in range(2):
        noise = found.noise("more restarts", draw)
        after = found.withstand(_pgd(found, STRONG_STEPS, found.threat.eps / 10, found.loss, noise))
        left = left & after
    return compared("more_restarts", found, left, f"2 random starts of {STRONG_STEPS} steps more")


def other_loss(found: Suspect) -> Check:
    """The margin of the logits keeps its gradient where cross-entropy has lost it (and the reverse)."""
    loss = "ce" if found.loss != "ce" else "margin"
    attack = _pgd(found, STRONG_STEPS, found.threat.eps / 10, loss, found.noise("other loss"))
    return compared("other_loss", found, found.withstand(attack), f"PGD on the loss {loss}")


def fgsm_weaker(found: Suspect) -> Check:
    """One step of full length is among what many steps can do."""
    after = found.withstand(lambda x, y, _: fgsm(found.model, x, y, found.threat, loss=found.loss))
    return compared("fgsm_weaker", found, after, "FGSM")


def noise_weaker(found: Suspect) -> Check:
    """Random noise of the same size must fool far less than the attack.

    Compared image by image, with an exact sign test: the attack must fool more, beyond chance (p < 0.05).
    """
    left = found.right.clone()
    for draw in range(DRAWS):
        left &= predictions(found.model, _noisy(found, draw)) == found.y
    only_attack, only_noise = int((left & ~found.standing).sum()), int((found.standing & ~left).sum())
    by_noise, by_attack = int((found.right & ~left).sum()), int((found.right & ~found.standing).sum())
    detail = f"{DRAWS} draws of noise fool {by_noise}, the attack {by_attack}, of {int(found.right.sum())}"
    stronger = at_least(only_attack, only_attack + only_noise) < 0.05
    if stronger or (not only_noise and not found.standing.any()):
        return Check("noise_weaker", True, detail)
    if max(by_noise, by_attack) < 6:
        return Check("noise_weaker", None, f"{detail}: too few to tell")
    return Check("noise_weaker", False, detail)


def _noisy(found: Suspect, draw: int) -> Tensor:
    """A random image on the ball's surface: corners for linf, else a random direction of full length; in the box."""
    noise, threat = found.noise("noise check", draw), found.threat
    if isinstance(threat, Linf):
        return (found.x + threat.eps * (1.0 - 2.0 * noise.integers(2, found.x.shape[1:]))).clamp(0, 1)
    start = found.x + noise.normal(found.x.shape[1:])
    return threat.project(start, found.x)


def eps_curve(found: Suspect) -> Check:
    """Accuracy falls as eps grows, and ends near 0: at the largest radius an image can become any other.

    PGD from the image at eps / 2, eps, 2 eps and the radius of the whole box; fails where a larger radius leaves more
    than the interval above a smaller one, or the whole box leaves more than a tenth.
    """
    if not found.right.any():
        return Check("eps_curve", None, "no image is classified right")
    largest = found.threat.largest_eps(found.x[0].numel())
    radii = [radius for radius in (found.threat.eps * scale for scale in (0.5, 1, 2)) if radius < largest]
    m = len(found.x)
    counts = {radius: int(_left_at(found, radius).sum()) for radius in (*radii, largest)}
    said = ", ".join(f"{count / m:.0%} at {radius:.3g}" for radius, count in counts.items())
    rises = any(later / m > wilson(before, m)[1] for before, later in pairwise(counts.values()))
    high = wilson(counts[largest], m)[0] > 0.1
    why = "; rises with eps" if rises else "; not near 0 where every image is allowed" if high else ""
    return Check("eps_curve", not rises and not high, said + why)


def _left_at(found: Suspect, radius: float) -> Tensor:
    """(m,) verdicts under PGD within another radius."""
    left, threat, steps = found.right.clone(), found.threat.with_eps(radius), 20
    x, y = found.x[left], found.y[left]
    options = {"steps": steps, "step_size": 2.5 * radius / steps, "loss": found.loss, "best_of_steps": True}
    left[left.clone()] = predictions(found.model, pgd(found.model, x, y, threat, **options)) == y  # type: ignore[arg-type]
    return left


def transfer(found: Suspect) -> Check:
    """Adversarial images of another model must not beat those made with this model's own gradients."""
    source = found.source
    if source is None:
        return Check("transfer", None, "no other model given (--transfer-from)")

    def attack(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
        return pgd(source, x, y, found.threat, steps=STRONG_STEPS, step_size=found.threat.eps / 10, best_of_steps=True)

    return compared("transfer", found, found.withstand(attack), "adversarial images of the other model")


CHECKS: tuple[Callable[[Suspect], Check], ...] = (
    labels,
    pixel_range,
    logits,
    deterministic,
    batch_independence,
    zero_gradient,
    fgsm_weaker,
    noise_weaker,
    more_steps,
    more_restarts,
    other_loss,
    eps_curve,
    square,
    transfer,
)


def _pgd(
    found: Suspect, steps: int, size: float, loss: str, noise: Noise | None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """PGD with best of steps, on some of the images."""

    def attack(x: Tensor, y: Tensor, where: Tensor) -> Tensor:
        some = None if noise is None else noise.take(where)
        options = {"steps": steps, "step_size": size, "loss": loss, "best_of_steps": True}
        return pgd(found.model, x, y, found.threat, noise=some, **options)  # type: ignore[arg-type]

    return attack
