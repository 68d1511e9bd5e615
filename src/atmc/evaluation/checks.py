"""Checks of an evaluation: one function per check, each with a verdict and the figures that it rests on.

An accuracy under attack is what the attacks did not manage to break. It means nothing if the attacks were blind, and
these are the known ways to be blind (Athalye, Carlini and Wagner 2018; Carlini et al. 2019; Croce and Hein 2020; Croce
et al. 2022). A check never changes a figure. ok is True, False, or None if the check could not be run.

A check looks at the first 100 images (`CHECKED`) at most, which keeps all of them together at about 300 gradients per
image; `square` and `masked` look at all images that the evaluation's own attacks saw. A second attack breaks too much
(`compare_survivors`) if it leaves less than the 95 % interval (Wilson) of what the white-box attacks left of these
images, and less by more than 2 % of the images.

An image whose label interval bounds prove cannot be broken, however blind the attacks are. Networks with proofs are
flat around many images, so a gradient of exactly zero is no sign of a masked one there. `zero_gradient`, `noise_weaker`
and `eps_curve` therefore set aside what is proved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from atmc.core.rng import Noise
from atmc.core.torch_state import full_float32
from atmc.data import Images
from atmc.evaluation import autoattack
from atmc.evaluation.accuracy import find_allowed, predictions
from atmc.evaluation.adversarial_file import AdversarialExamples
from atmc.evaluation.attacks import ATTACKS
from atmc.evaluation.statistics import Accuracy, binomial_tail, wilson
from atmc.models.factory import USER_CODE_ERRORS
from atmc.robust.attacks import LOSSES, PgdSettings, attack_mode, fgsm, input_gradient
from atmc.robust.intervals import certified
from atmc.robust.threats import Linf, Threat

CHECKED = 100  # images
LEEWAY = 0.02  # share of the images that a second attack may break beyond a first one even if both are sound
QUERIES = 300  # of Square, if the evaluation did not run it
PASSES, DRAWS = 5, 5  # forward passes compared; draws of random noise


@dataclass(frozen=True)
class Check:
    """The result of a check: its name, the verdict, and the figures in words."""

    name: str
    ok: bool | None
    detail: str

    def to_json(self) -> dict[str, Any]:
        """Return the check as in metrics.json."""
        return {"name": self.name, "ok": self.ok, "detail": self.detail}


@dataclass(frozen=True, eq=False, kw_only=True)
class CheckInputs:
    """What the checks look at: a model, some images, and the evaluation's verdicts on them.

    Args:
        x, y, index: the images, (m, c, h, w), their labels and their rows in the split, (m,).
        right: (m,) bool, right without attack.
        survivors: (m,) bool, right after the white-box attacks of the evaluation.
        proved: (m,) bool, right under every attack of the threat, as interval bounds in float32 say; for linf only.
        white_box: the names of those attacks.
        clean: accuracy on all images.
        commonest_share: the share of the commonest label among all images.
        attacks: the evaluation's accuracies, by attack.
        pgd: the user's settings of PGD.
        source: a model whose adversarial images are tried on this one.
        broken: (k,) bool, which of the first images are broken by adversarial images from elsewhere; None: there are
            none.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    index: Tensor
    threat: Threat
    right: Tensor
    survivors: Tensor
    proved: Tensor
    white_box: tuple[str, ...]
    clean: Accuracy
    commonest_share: float
    attacks: Mapping[str, Accuracy]
    pgd: PgdSettings
    source: nn.Module | None
    broken: Tensor | None
    seed: int

    @property
    def loss(self) -> str:
        """The loss that PGD maximizes; the margin for dlr: it has the same sign and any number of classes."""
        return "margin" if self.pgd.loss == "dlr" else self.pgd.loss

    @property
    def only_pgd(self) -> bool:
        """Whether the evaluation ran no white-box attack but PGD with the user's settings."""
        return all(ATTACKS[name].only_pgd for name in self.white_box)

    def noise(self, purpose: str, draw: int = 0) -> Noise:
        """Return random numbers for the images, which no attack of the evaluation uses."""
        return Noise(self.index, seed=self.seed, purpose=purpose, epoch=draw)

    def attack_survivors(self, attack: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Return (m,) verdicts after an attack (x, y, rows among the m) on the survivors."""
        left = self.survivors.clone()
        rows = left.nonzero()[:, 0]
        if len(rows):
            adv = attack(self.x[rows], self.y[rows], rows)
            left[rows] = predictions(self.model, adv) == self.y[rows]
        return left

    def run_pgd(self, settings: PgdSettings, noise: Noise | None) -> Tensor:
        """Return (m,) verdicts after PGD on the survivors, from random points if noise is given."""

        def attack(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
            return settings.attack(self.model, x, y, self.threat, noise=None if noise is None else noise.take(rows))

        return self.attack_survivors(attack)


def collect_check_inputs(
    model: nn.Module,
    images: Images,
    threat: Threat,
    clean: Accuracy,
    attacks: Mapping[str, Accuracy],
    *,
    pgd: PgdSettings | None = None,
    source: nn.Module | None = None,
    examples: AdversarialExamples | None = None,
    seed: int = 0,
) -> CheckInputs:
    """Return the first images with the evaluation's verdicts on them; attack them by PGD if no white-box attack ran.

    Args:
        images: all of them, on the model's device.
        attacks: the evaluation's accuracies on the first images, by attack.
        pgd: the user's settings of PGD; the paper's by default.
        source: a model whose adversarial images are tried on this one.
        examples: saved adversarial images, of any attack on the first images; others are ignored.
    """
    pgd = pgd or PgdSettings.paper(threat)
    attacked = white_box_survivors(attacks)
    m = min(CHECKED, len(images) if attacked is None else len(attacked))
    index = torch.arange(m, device=images.labels.device)
    x, y = images.float_pixels(index), images.labels[index]
    right = predictions(model, x) == y
    survivors = right.clone()
    white_box = tuple(name for name in attacks if ATTACKS[name].white_box) or ("pgd",)
    inputs = CheckInputs(
        model=model,
        x=x,
        y=y,
        index=index,
        threat=threat,
        right=right,
        survivors=survivors,
        proved=_find_proved(model, x, y, threat),
        white_box=white_box,
        clean=clean,
        commonest_share=float(images.labels.bincount().amax()) / len(images),
        attacks=attacks,
        pgd=pgd,
        source=source,
        broken=_find_broken(model, images, threat, examples) if examples else None,
        seed=seed,
    )
    if attacked is not None:
        return replace(inputs, survivors=survivors & attacked[:m].to(survivors.device))
    last_iterate = replace(pgd, loss=inputs.loss, best_of_steps=False)
    return replace(inputs, survivors=inputs.run_pgd(last_iterate, None))


@full_float32()
@torch.no_grad()
def _find_proved(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """Return (m,) bool: whether interval bounds prove the label; nowhere if the model cannot be bounded by them."""
    if isinstance(threat, Linf):
        try:
            with attack_mode(model):
                return certified(model, x, y, threat)
        except USER_CODE_ERRORS:  # an operation without a rule, or the model's own code, which got no tensor
            pass
    return torch.zeros(len(x), dtype=torch.bool, device=x.device)


def _find_broken(model: nn.Module, images: Images, threat: Threat, examples: AdversarialExamples) -> Tensor | None:
    """Return (k,) bool, on the CPU: whether saved images count and are wrong; None if they are of other labels."""
    k = len(examples.labels)
    if not torch.equal(examples.labels, images.labels[:k].cpu()):
        return None
    broken = []
    for rows in torch.split(torch.arange(k, device=images.labels.device), 500):
        x, adv = images.float_pixels(rows), examples.adv[rows.cpu()].to(rows.device)
        broken.append(find_allowed(adv, x, threat) & (predictions(model, adv) != images.labels[rows]))
    return torch.cat(broken).cpu()


def white_box_survivors(attacks: Mapping[str, Accuracy]) -> Tensor | None:
    """Return the (n,) verdicts after all white-box attacks, for images that all saw, on the CPU; None if none ran."""
    left = None
    for name, accuracy in attacks.items():
        if ATTACKS[name].white_box:
            right = accuracy.right_before(*ATTACKS[name].gradient_free).cpu()
            n = len(right) if left is None else min(len(left), len(right))
            left = right[:n] if left is None else left[:n] & right[:n]
    return left


def compare_survivors(
    name: str, inputs: CheckInputs, after: Tensor, attack: str, *, before: Tensor | None = None
) -> Check:
    """Return a check that fails if fewer survive than the interval allows, and by more than `LEEWAY`.

    Args:
        after: (n,) verdicts after another attack.
        attack: what the detail calls that attack.
        before: (n,) what the white-box attacks left; the inputs' survivors by default.
    """
    before = inputs.survivors if before is None else before
    n, expected, left = len(before), int(before.sum()), int(after.sum())
    low = wilson(expected, n)[0]
    detail = f"{' and '.join(inputs.white_box)} leave {expected} of {n}, {attack} then {left} (interval from {low:.1%})"
    return Check(name, not expected or left / n >= low or expected - left <= LEEWAY * n, detail)


def run_checks(inputs: CheckInputs) -> Iterator[Check]:
    """Run all checks, one after the other."""
    for check in CHECKS:
        with full_float32():
            result = check(inputs)
        yield result


def zero_gradient(inputs: CheckInputs) -> Check:
    """Check for gradients of exactly zero: rounded activations, or logits so large that the loss underflows.

    It fails if more than 1 % of the images that are right have such a gradient of the loss that PGD maximizes, and no
    proof.
    """
    x, y, proved = inputs.x[inputs.right], inputs.y[inputs.right], inputs.proved[inputs.right]
    if not len(x):
        return Check("zero_gradient", None, "no image is classified right")
    count = aside = 0
    for loss in {"ce", inputs.loss}:
        with attack_mode(inputs.model):
            _, grad = input_gradient(inputs.model, x, y, LOSSES[loss])
        zero = grad.flatten(1).abs().amax(1) == 0
        count, aside = max(count, int((zero & ~proved).sum())), max(aside, int((zero & proved).sum()))
    return Check("zero_gradient", count <= 0.01 * len(x), f"exactly zero at {count} of {len(x)} images{_aside(aside)}")


def _aside(count: int) -> str:
    """Return the end of a detail: how many images did not count, since no attack can break them."""
    return f"; {count} more set aside, proved by interval bounds" if count else ""


@torch.no_grad()
def logits(inputs: CheckInputs) -> Check:
    """Check that outputs are logits, since probabilities weaken every loss; fail if they are >= 0 and add up to 1."""
    output = outputs(inputs.model, inputs.x)
    low, off = float(output.amin()), float((output.sum(1) - 1).abs().amax())
    detail = f"outputs from {low:.3g} to {float(output.amax()):.3g}, sums at most {off:.3g} from 1"
    return Check("logits", not looks_like_probabilities(output), detail)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Return the (n, classes) float32 outputs in evaluation mode."""
    with attack_mode(model), torch.no_grad():
        output: Tensor = model(x)
    return output.float()


def looks_like_probabilities(output: Tensor) -> bool:
    """Return whether all outputs (n, classes) are >= 0 and add up to 1."""
    return bool((output >= 0).all()) and bool(((output.sum(1) - 1).abs() < 1e-4).all())


def relative_distance(a: Tensor, b: Tensor) -> float:
    """Return the largest distance between two rows, relative to the length of the first."""
    apart = (a - b).norm(dim=1) / a.norm(dim=1).clamp_min(1e-12)
    return float(apart.amax())


@torch.no_grad()
def deterministic(inputs: CheckInputs) -> Check:
    """Check that the same images give the same logits: attacks would have to average over a random forward pass."""
    first = outputs(inputs.model, inputs.x)
    passes = [outputs(inputs.model, inputs.x) for _ in range(PASSES - 1)]
    apart = max(relative_distance(first, other) for other in passes)
    changed = max(int((first.argmax(1) != other.argmax(1)).sum()) for other in passes)
    detail = f"logits of {PASSES} passes differ by {apart:.2g} of their size, {changed} of {len(first)} predictions"
    return Check("deterministic", apart <= 1e-4 and changed == 0, detail)


@torch.no_grad()
def batch_independence(inputs: CheckInputs) -> Check:
    """Check that logits do not depend on the other images of the batch, as they do in training-mode batch norm."""
    half = max(1, len(inputs.x) // 2)
    x = inputs.x[:half]
    first = outputs(inputs.model, torch.cat((x, x)))[:half]
    others = [outputs(inputs.model, torch.cat((x, other)))[:half] for other in (1 - x, inputs.x[-half:], x * 0)]
    apart = max(relative_distance(first, other) for other in others)
    return Check("batch_independence", apart <= 1e-3, f"logits differ by {apart:.2g} of their size among other images")


def pixel_range(inputs: CheckInputs) -> Check:
    """Check that images, and the images of attacks, lie in [0, 1], and the latter in the ball."""
    low, high = float(inputs.x.amin()), float(inputs.x.amax())
    refused = sum(accuracy.refused for accuracy in inputs.attacks.values())
    far = max([0.0, *(accuracy.largest for accuracy in inputs.attacks.values())])
    threat = inputs.threat
    detail = f"images from {low:.4g} to {high:.4g}; largest {threat.name} distance {far:.4g} of {threat.eps:.4g}"
    detail += f"; {refused} images of attacks outside the ball or [0, 1], not counted" if refused else ""
    return Check("pixel_range", low >= 0 and high <= 1 and not refused, detail)


def labels(inputs: CheckInputs) -> Check:
    """Check that the model is better than the commonest label: if not, its classes are in another order."""
    if inputs.commonest_share == 1:
        return Check("labels", None, "only one class among the images")
    accuracy = f"clean accuracy {inputs.clean.accuracy:.2%} of {inputs.clean.n:,}"
    detail = f"{accuracy}, the commonest label {inputs.commonest_share:.0%} of them"
    return Check("labels", inputs.clean.ci95[0] > inputs.commonest_share, detail)


def square(inputs: CheckInputs) -> Check:
    """Check that Square, which needs no gradient, does not break what the white-box attacks left.

    If the evaluation ran Square itself, all images that it and the white-box attacks saw are compared. What is proved
    is not set aside: Square cannot break it either.
    """
    ran = [
        accuracy.right_before(*(ATTACKS[name].further or ()))
        for name, accuracy in inputs.attacks.items()
        if autoattack.SQUARE in ATTACKS[name].gradient_free and accuracy.n >= len(inputs.x)
    ]
    if ran:
        right, left = max(ran, key=len).cpu(), white_box_survivors(inputs.attacks)
        before = inputs.survivors.cpu() if left is None else left[: len(right)]
        after = before & right[: len(before)]
        return compare_survivors("square", inputs, after, f"Square, {autoattack.QUERIES} queries,", before=before)
    if inputs.threat.name != "linf" and min(inputs.x.shape[2:]) < 5:
        return Check("square", None, "Square needs images of at least 5x5 pixels for this norm")
    attack = autoattack.build_attacks(
        inputs.model,
        inputs.threat,
        [autoattack.SQUARE],
        classes=outputs(inputs.model, inputs.x[:2]).shape[1],
        seed=inputs.seed,
        device=inputs.x.device,
        queries=QUERIES,
    )[autoattack.SQUARE]
    after = inputs.attack_survivors(lambda x, y, _: attack(x, y))
    return compare_survivors("square", inputs, after, f"Square, {QUERIES} queries,")


def masked(inputs: CheckInputs) -> Check:
    """Check that attacks which do not follow the model's gradients break little of what AutoAttack left.

    These are the further stages of an attack that begins with those of AutoAttack, and adversarial images from
    elsewhere, such as those that the complete method of `atmc verify` found. The check fails if they break more than
    2 % of the images, and more than one image. The images are the same before and after, so the interval, which is
    about the draw of the images, gives no leeway here. Some does remain: no attack is complete, and another seed of
    AutoAttack breaks an image or two as well.
    """
    ran = [(spec.further, inputs.attacks[name]) for name, spec in ATTACKS.items() if name in inputs.attacks]
    usable = [(further, one) for further, one in ran if further or (further is not None and inputs.broken is not None)]
    if not usable:
        names = " or ".join(name for name, spec in ATTACKS.items() if spec.further)
        return Check("masked", None, f"no attack that goes beyond AutoAttack was run (--attack {names})")
    further, accuracy = max(usable, key=lambda pair: (pair[1].n, len(pair[0])))
    counts, left = accuracy.count_fooled(further), accuracy.right.cpu().clone()
    if inputs.broken is not None:
        k = min(len(left), len(inputs.broken))
        counts["replayed images"] = int((left[:k] & inputs.broken[:k]).sum())
        left[:k] &= ~inputs.broken[:k]
    before, after = int(accuracy.right_before(*further).sum()), int(left.sum())
    by_attack = ", ".join(f"{name} {count}" for name, count in counts.items())
    detail = f"AutoAttack leaves {before} of {accuracy.n}, further attacks then {after}; broken by {by_attack}"
    return Check("masked", before - after <= max(1, LEEWAY * accuracy.n), detail)


def more_steps(inputs: CheckInputs) -> Check:
    """Check that twice the steps of the strongest PGD break no more: the attack has converged."""
    strongest = inputs.pgd if inputs.only_pgd else PgdSettings.strong(inputs.threat)
    settings = replace(strongest, steps=2 * strongest.steps, loss=inputs.loss, best_of_steps=True)
    after = inputs.run_pgd(settings, None if inputs.only_pgd else inputs.noise("more steps"))
    return compare_survivors("more_steps", inputs, after, f"PGD with {settings.steps} steps")


def more_restarts(inputs: CheckInputs) -> Check:
    """Check that two more random starts break no more."""
    strong, left = PgdSettings.strong(inputs.threat, loss=inputs.loss), inputs.survivors
    for draw in range(2):
        left = left & inputs.run_pgd(strong, inputs.noise("more restarts", draw))
    return compare_survivors("more_restarts", inputs, left, f"2 random starts of {strong.steps} steps more")


def other_loss(inputs: CheckInputs) -> Check:
    """Check that another loss breaks no more: the margin keeps its gradient if cross-entropy saturates."""
    loss = "ce" if inputs.loss != "ce" else "margin"
    after = inputs.run_pgd(PgdSettings.strong(inputs.threat, loss=loss), inputs.noise("other loss"))
    return compare_survivors("other_loss", inputs, after, f"PGD on the loss {loss}")


def fgsm_weaker(inputs: CheckInputs) -> Check:
    """Check that one step of length eps breaks no more than many steps do."""
    after = inputs.attack_survivors(lambda x, y, _: fgsm(inputs.model, x, y, inputs.threat, loss=inputs.loss))
    return compare_survivors("fgsm_weaker", inputs, after, "FGSM")


def noise_weaker(inputs: CheckInputs) -> Check:
    """Check that random noise of the same size fools the model far less often than the attack.

    The two are compared image by image with an exact sign test: the attack must fool more, beyond chance (p < 0.05),
    unless it fooled all that noise fooled and all that is not proved.
    """
    left = inputs.right.clone()
    for draw in range(DRAWS):
        left &= predictions(inputs.model, _noisy_images(inputs, draw)) == inputs.y
    survivors = inputs.survivors
    only_attack, only_noise = int((left & ~survivors).sum()), int((survivors & ~left).sum())
    by_noise, by_attack = int((inputs.right & ~left).sum()), int((inputs.right & ~survivors).sum())
    detail = f"{DRAWS} draws of noise fool {by_noise}, the attack {by_attack}, of {int(inputs.right.sum())}"
    stronger = binomial_tail(only_attack, only_attack + only_noise) < 0.05
    if stronger or (not only_noise and not (survivors & ~inputs.proved).any()):
        return Check("noise_weaker", True, detail)
    if max(by_noise, by_attack) < 6:
        return Check("noise_weaker", None, f"{detail}: too few to tell")
    return Check("noise_weaker", False, detail)


def _noisy_images(inputs: CheckInputs, draw: int) -> Tensor:
    """Return random images on the ball's surface, in [0, 1]: corners for linf, else random directions of length eps."""
    noise, threat = inputs.noise("noise check", draw), inputs.threat
    if isinstance(threat, Linf):
        return (inputs.x + threat.eps * (1.0 - 2.0 * noise.integers(2, inputs.x.shape[1:]))).clamp(0, 1)
    start = inputs.x + noise.normal(inputs.x.shape[1:])
    return threat.project(start, inputs.x)


def eps_curve(inputs: CheckInputs) -> Check:
    """Check that accuracy falls as eps grows, and to almost 0 at the radius at which every image is allowed.

    PGD runs from the image at eps / 2, eps, 2 eps and the radius of the whole box, on the images that are not proved at
    eps. The check fails if accuracy at a larger radius is above the interval of that at a smaller one, or if it is
    above a tenth for the whole box.
    """
    rows = ~inputs.proved
    if not (inputs.right & rows).any():
        return Check("eps_curve", None, f"no image is right without a proof{_aside(int(inputs.proved.sum()))}")
    largest = inputs.threat.largest_eps(inputs.x[0].numel())
    radii = [radius for radius in (inputs.threat.eps * scale for scale in (0.5, 1, 2)) if radius < largest]
    m = int(rows.sum())
    counts = {radius: int(_survivors_at(inputs, radius).sum()) for radius in (*radii, largest)}
    shares = ", ".join(f"{count / m:.0%} at {radius:.3g}" for radius, count in counts.items())
    rises = any(b > a and b / m > wilson(a, m)[1] for a, b in pairwise(counts.values()))
    high = wilson(counts[largest], m)[0] > 0.1
    reason = "; rises with eps" if rises else "; not near 0 where every image is allowed" if high else ""
    return Check("eps_curve", not rises and not high, shares + _aside(int(inputs.proved.sum())) + reason)


def _survivors_at(inputs: CheckInputs, radius: float) -> Tensor:
    """Return (m,) verdicts under PGD within another radius; what is proved is not attacked."""
    left, threat = inputs.right & ~inputs.proved, inputs.threat.with_eps(radius)
    x, y = inputs.x[left], inputs.y[left]
    settings = PgdSettings.from_image(threat, 20, loss=inputs.loss)
    left[left.clone()] = predictions(inputs.model, settings.attack(inputs.model, x, y, threat)) == y
    return left


def transfer(inputs: CheckInputs) -> Check:
    """Check that adversarial images of another model break no more than those made with this model's gradients."""
    source = inputs.source
    if source is None:
        return Check("transfer", None, "no other model given (--transfer-from)")
    strong = PgdSettings.strong(inputs.threat)
    after = inputs.attack_survivors(lambda x, y, _: strong.attack(source, x, y, inputs.threat))
    return compare_survivors("transfer", inputs, after, "adversarial images of the other model")


CHECKS: tuple[Callable[[CheckInputs], Check], ...] = (
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
    masked,
    transfer,
)
