"""Perturbation balls around an image, inside the box [0, 1] of valid pixels.

A threat says what an adversary may do. It is all that an attack knows about the geometry: the attack draws a start
(`random_start`), takes steps that raise the loss (`ascent`) and projects onto the set (`project`).

Notation: x clean images, adv adversarial images, both (n, ...) float32 in [0, 1]; d values per image; eps the radius
in pixel units (8/255 = 0.0314).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from atmc.core.arguments import POSITIVE, parse_real
from atmc.core.errors import unknown
from atmc.core.rng import Noise


class Threat(Protocol):
    """The images that an adversary may use in place of x: the intersection of a ball of radius eps with [0, 1]."""

    name: ClassVar[str]

    @property
    def eps(self) -> float:
        """Radius, in pixel units."""

    def random_start(self, x: Tensor, noise: Noise) -> Tensor:
        """Draw a random point of the set for each image; (n, ...) like x."""

    def ascent(self, adv: Tensor, grad: Tensor, step_size: float) -> Tensor:
        """Move adv by a step of length step_size, in this norm, in the direction in which the loss rises most."""

    def project(self, adv: Tensor, x: Tensor) -> Tensor:
        """Return the point of the set that is nearest (Euclidean) to adv."""

    def distance(self, adv: Tensor, x: Tensor) -> Tensor:
        """Return the (n,) distances in this norm."""

    def with_eps(self, eps: float) -> Threat:
        """Return the same threat with another radius."""

    def largest_eps(self, pixels: int) -> float:
        """Return the radius from which on the ball holds the whole box, for images of `pixels` values."""


def _per_example(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (n,) to (n, 1, ..., 1) for broadcasting against like."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _format_threat(name: str, eps: float) -> str:
    """Return 'linf:8/255' if eps is a whole number of 255ths (and not a short decimal), else 'linf:0.2'."""
    steps = Fraction(eps * 255).limit_denominator(10)
    if float(f"{eps:.3g}") != eps and abs(float(steps) / 255 - eps) < 1e-12 and steps.denominator == 1:
        return f"{name}:{steps.numerator}/255"
    return f"{name}:{eps!r}"


@dataclass(frozen=True)
class Linf:
    """No pixel moves by more than eps.

    >>> str(Linf(8 / 255))
    'linf:8/255'
    """

    eps: float
    name: ClassVar[str] = "linf"

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", parse_real("a finite eps", self.eps, POSITIVE))

    def __str__(self) -> str:
        return _format_threat(self.name, self.eps)

    def random_start(self, x: Tensor, noise: Noise) -> Tensor:
        """Draw a uniform point of the ball, then clip to the box; (n, ...) like x."""
        return (x + (2 * noise.uniform(x.shape[1:]) - 1) * self.eps).clamp_(0, 1)

    def ascent(self, adv: Tensor, grad: Tensor, step_size: float) -> Tensor:
        """Move along the sign of the gradient, the direction of steepest ascent in the maximum norm."""
        return adv + step_size * grad.sign()

    def project(self, adv: Tensor, x: Tensor) -> Tensor:
        """Clip each pixel to [x - eps, x + eps] and [0, 1]; exact."""
        return torch.minimum(torch.maximum(adv, x - self.eps), x + self.eps).clamp_(0, 1)

    def distance(self, adv: Tensor, x: Tensor) -> Tensor:
        """Return the (n,) largest absolute differences."""
        return (adv - x).flatten(1).abs().amax(1)

    def with_eps(self, eps: float) -> Linf:
        """Return the same threat with another radius."""
        return Linf(eps)

    def largest_eps(self, pixels: int) -> float:
        """Return 1, the largest distance in the box."""
        return 1.0


@dataclass(frozen=True)
class L2:
    """The Euclidean length of the change is at most eps."""

    eps: float
    name: ClassVar[str] = "l2"

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", parse_real("a finite eps", self.eps, POSITIVE))

    def __str__(self) -> str:
        return _format_threat(self.name, self.eps)

    def random_start(self, x: Tensor, noise: Noise) -> Tensor:
        """Draw a uniform point of the ball (a normal direction times U^(1/d)), then clip to the box."""
        direction = noise.normal(x.shape[1:])
        length = direction.flatten(1).norm(dim=1).clamp_min(1e-12)
        radius = self.eps * noise.uniform(()) ** (1 / direction[0].numel())
        return (x + direction * _per_example(radius / length, x)).clamp_(0, 1)

    def ascent(self, adv: Tensor, grad: Tensor, step_size: float) -> Tensor:
        """Move along the gradient by the Euclidean length step_size, or not at all if the gradient is zero."""
        length = grad.flatten(1).norm(dim=1).clamp_min(1e-30)
        return adv + grad * _per_example(step_size / length, grad)

    def project(self, adv: Tensor, x: Tensor) -> Tensor:
        """Return the nearest point of ball and box.

        It is argmin |x' - adv|_2 subject to |x' - x|_2 <= eps and x' in [0, 1]: x plus the change divided by 1 + t,
        clipped, with the smallest t >= 0 that fits, by bisection.
        """
        eps = self.eps

        def at(t: Tensor) -> Tensor:
            return (x + (adv - x) / (1 + _per_example(t, x))).clamp_(0, 1)

        def fits(candidate: Tensor) -> Tensor:
            return self.distance(candidate, x) <= eps

        return _smallest_shrinkage(at, fits, limit=self.distance(adv, x) / eps)

    def distance(self, adv: Tensor, x: Tensor) -> Tensor:
        """Return the (n,) Euclidean distances."""
        lengths: Tensor = torch.linalg.vector_norm((adv - x).flatten(1), dim=1)
        return lengths

    def with_eps(self, eps: float) -> L2:
        """Return the same threat with another radius."""
        return L2(eps)

    def largest_eps(self, pixels: int) -> float:
        """Return the box's diagonal, sqrt(d)."""
        return math.sqrt(pixels)


@dataclass(frozen=True)
class L1:
    """The absolute changes of all pixels add up to at most eps."""

    eps: float
    name: ClassVar[str] = "l1"
    ascent_share: ClassVar[float] = 0.05  # share of the pixels that one ascent step moves

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", parse_real("a finite eps", self.eps, POSITIVE))

    def __str__(self) -> str:
        return _format_threat(self.name, self.eps)

    def random_start(self, x: Tensor, noise: Noise) -> Tensor:
        """Draw a uniform point of the ball (signed exponentials over their sum with one more), then clip to the box."""
        size = noise.exponential(x.shape[1:])
        sign = 1.0 - 2.0 * noise.integers(2, x.shape[1:])
        total = size.flatten(1).sum(1) + noise.exponential(())
        start: Tensor = x + sign * size * _per_example(self.eps / total, x)
        return start.clamp_(0, 1)

    def ascent(self, adv: Tensor, grad: Tensor, step_size: float) -> Tensor:
        """Move the pixels of the largest gradients by equal amounts that add up to step_size.

        This is sparse l1 descent (Tramer and Boneh 2019, section 4.1) without the pixels that the box keeps from
        moving (Croce and Hein 2021, "Mind the box").
        """
        stuck = ((grad > 0) & (adv >= 1)) | ((grad < 0) & (adv <= 0))
        strength = grad.abs().masked_fill(stuck, 0).flatten(1)
        count = max(1, round(self.ascent_share * strength.shape[1]))
        moves = torch.zeros_like(strength).scatter_(1, strength.topk(count, dim=1).indices, 1.0)
        return adv + step_size / count * moves.view_as(grad) * grad.sign()

    def project(self, adv: Tensor, x: Tensor) -> Tensor:
        """Return the nearest point of ball and box.

        It is argmin |x' - adv|_2 subject to |x' - x|_1 <= eps and x' in [0, 1]: x plus the change soft-thresholded by
        t, clipped, with the smallest t >= 0 that fits, by bisection.
        """
        eps = self.eps
        change = adv - x

        def at(t: Tensor) -> Tensor:
            size = (change.abs() - _per_example(t, x)).clamp_min_(0)
            return (x + size * change.sign()).clamp_(0, 1)

        def fits(candidate: Tensor) -> Tensor:
            return self.distance(candidate, x) <= eps

        return _smallest_shrinkage(at, fits, limit=change.flatten(1).abs().amax(1))

    def distance(self, adv: Tensor, x: Tensor) -> Tensor:
        """Return the (n,) sums of absolute differences."""
        return (adv - x).flatten(1).abs().sum(1)

    def with_eps(self, eps: float) -> L1:
        """Return the same threat with another radius."""
        return L1(eps)

    def largest_eps(self, pixels: int) -> float:
        """Return the number of values, d."""
        return float(pixels)


def _smallest_shrinkage(at: Callable[[Tensor], Tensor], fits: Callable[[Tensor], Tensor], limit: Tensor) -> Tensor:
    """Return at(t) for each example's smallest t in [0, limit] that fits, to 2^-30 of limit; at(limit) must fit."""
    low, high = torch.zeros_like(limit), limit * 1.0001 + 1e-6
    inside = fits(at(low))
    if bool(inside.all()):
        return at(low)
    for _ in range(30):
        middle = (low + high) / 2
        good = fits(at(middle))
        low, high = torch.where(good, low, middle), torch.where(good, middle, high)
    return at(torch.where(inside, torch.zeros_like(high), high))


BALLS: dict[str, type[Linf] | type[L2] | type[L1]] = {"linf": Linf, "l2": L2, "l1": L1}


def parse_threat(text: str) -> Threat:
    """Read a threat written as ``norm:radius``; the radius is a number or a fraction.

    >>> parse_threat("linf:8/255") == Linf(8 / 255)
    True

    Raises:
        ValueError: text of another form, an unknown norm, or a radius that is not finite and positive.
    """
    norm, colon, radius = text.strip().lower().partition(":")
    if not colon:
        raise ValueError(f"expected a threat like linf:8/255, l2:0.5 or l1:12, got {text!r}")
    if norm not in BALLS:
        raise unknown("norm", norm, BALLS)
    numerator, slash, denominator = radius.partition("/")
    try:
        eps = float(numerator) / (float(denominator) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"expected a radius like 8/255 or 0.03 in threat {text!r}, got {radius!r}") from None
    try:
        return BALLS[norm](eps)
    except ValueError as error:
        raise ValueError(f"threat {text!r}: {error}") from None


def as_threat(threat: object) -> Threat:
    """Return a threat that is given as itself or as its text; raise ValueError for anything else.

    >>> str(as_threat("l2:0.5"))
    'l2:0.5'
    """
    if isinstance(threat, str):
        return parse_threat(threat)
    missing = [name for name in ("eps", "random_start", "ascent", "project") if not hasattr(threat, name)]
    if missing:
        raise ValueError(f"expected a threat such as Linf(8 / 255) or 'linf:8/255', got {threat!r:.80}")
    return threat  # type: ignore[return-value]


def check_threat(threat: Threat, pixels: int) -> None:
    """Raise ValueError if eps is above the largest distance in the box, for images of `pixels` values."""
    largest = threat.largest_eps(pixels)
    if threat.eps > largest:
        hint = f"; is {threat.name}:{threat.eps:g}/255 meant?" if threat.eps / 255 <= largest else ""
        raise ValueError(
            f"eps {threat.eps:g} is above the largest {threat.name} distance in [0, 1]: "
            f"{largest:g} for images of {pixels} values{hint}"
        )
