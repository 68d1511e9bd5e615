"""Training losses: (model, x, y, perturb) -> scalar loss.

`perturb(x, y)` returns adversarial images. It attacks the model in evaluation mode and changes nothing in it, so that
batch norm's running statistics see only the passes of the objective itself. Images x are (n, c, h, w) in [0, 1],
labels y (n,) int64.

The number of forward passes matters to batch norm: `mixed` makes two, clean and adversarial, each normalized by its
own statistics, as the reference implementation of the paper does, and `mtl_ibp` an adversarial one and one with bounds;
every other objective makes one (`trades` and `mart` on the clean and the adversarial images together).

To add an objective, write its function and one `ObjectiveSpec` in `OBJECTIVES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atmc.core.arguments import NOT_NEGATIVE, POSITIVE, Bounds
from atmc.core.errors import unknown
from atmc.core.rng import Noise
from atmc.robust.attacks import Loss, attack_mode, kl_from, pgd
from atmc.robust.intervals import Interval, bound_logits, collect_preactivations, imbalance, looseness, margins
from atmc.robust.threats import Threat


class Perturb(Protocol):
    """An attack on a model for one batch, with the threat's ball at the size that it has in this step."""

    @property
    def threat(self) -> Threat:
        """The ball; it grows to its full size while `ramp` rises."""

    @property
    def ramp(self) -> float:
        """How far the ball has grown, in (0, 1]; 1 outside a ramp."""

    def __call__(self, x: Tensor, y: Tensor, *, loss: str | Loss = "ce", start_noise: float = 0.0) -> Tensor:
        """Return adversarial images (n, c, h, w) that maximize the loss of x and y.

        Args:
            start_noise: standard deviation of what is added to x where the ascent starts, unless it starts at random.
        """

    def noisy(self, x: Tensor, deviation: float | None = None) -> Tensor:
        """Return x plus Gaussian noise of a standard deviation, by default the threat's eps, not clipped to the box."""


Objective = Callable[[nn.Module, Tensor, Tensor, Perturb], Tensor]
KL_START = 1e-3  # standard deviation of the noise from which `trades` attacks (the authors' program)


@dataclass(frozen=True)
class TrainingAttack:
    """PGD as training uses it, with steps of relative_step * eps / steps (Madry et al. 2018).

    Args:
        threat: the ball.
        steps: ascent steps, at least 1.
        relative_step: length of all steps together, in units of eps; the paper's is 1.25.
        random_start: start at a random point of the ball; the paper starts at the image.
        batch_statistics: let batch norm use the attacked batch's statistics (buffers are restored).
    """

    threat: Threat
    steps: int
    relative_step: float = 2.0
    random_start: bool = True
    batch_statistics: bool = False

    def on(self, model: nn.Module, noise: Noise, *, eps_scale: float = 1.0) -> Perturb:
        """Return this attack on a model; eps_scale in (0, 1] shrinks the ball (for a ramp at the start of training)."""
        return Perturbation(self, model, noise, self.threat.with_eps(self.threat.eps * eps_scale), eps_scale)


@dataclass(frozen=True)
class Perturbation:
    """A `TrainingAttack` on one model, with the random numbers of one batch: see `Perturb`."""

    attack: TrainingAttack
    model: nn.Module
    noise: Noise
    threat: Threat
    ramp: float = 1.0

    def __call__(self, x: Tensor, y: Tensor, *, loss: str | Loss = "ce", start_noise: float = 0.0) -> Tensor:
        """Return adversarial images (n, c, h, w) that maximize the loss of x and y; see `Perturb`."""
        attack = self.attack
        noisy = start_noise > 0 and not attack.random_start
        return pgd(
            self.model,
            x,
            y,
            self.threat,
            steps=attack.steps,
            step_size=attack.relative_step * self.threat.eps / attack.steps,
            noise=self.noise if attack.random_start else None,
            start=self.noisy(x, start_noise) if noisy else None,
            loss=loss,
            batch_statistics=attack.batch_statistics,
        )

    def noisy(self, x: Tensor, deviation: float | None = None) -> Tensor:
        """Return x plus Gaussian noise of a standard deviation, by default the threat's eps, not clipped to the box."""
        return x + (self.threat.eps if deviation is None else deviation) * self.noise.normal(x.shape[1:])


def natural(model: nn.Module, x: Tensor, y: Tensor, perturb: Perturb) -> Tensor:
    """Return the cross-entropy on clean images, without an attack. One pass."""
    return F.cross_entropy(model(x).float(), y)


def pgd_at(model: nn.Module, x: Tensor, y: Tensor, perturb: Perturb) -> Tensor:
    """Return the cross-entropy on adversarial images (Madry et al. 2018). One pass."""
    return F.cross_entropy(model(perturb(x, y)).float(), y)


def gaussian(model: nn.Module, x: Tensor, y: Tensor, perturb: Perturb) -> Tensor:
    """Return the cross-entropy on images with noise N(0, eps^2), for a smoothed classifier (Cohen et al. 2019).

    One pass. The eps of an l2 threat is the standard deviation: train with ``l2:0.25`` to certify with sigma 0.25.
    """
    return F.cross_entropy(model(perturb.noisy(x)).float(), y)


def mixed(model: nn.Module, x: Tensor, y: Tensor, perturb: Perturb) -> Tensor:
    """Return the mean of the clean and the adversarial cross-entropy, the paper's loss. Two passes."""
    adv = perturb(x, y)
    return (F.cross_entropy(model(x).float(), y) + F.cross_entropy(model(adv).float(), y)) / 2


def _clean_and_adversarial(model: nn.Module, x: Tensor, adv: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits (n, classes) of clean and of adversarial images, from one pass over all 2n."""
    clean, adversarial = model(torch.cat((x, adv))).float().chunk(2)
    return clean, adversarial


def trades(model: nn.Module, x: Tensor, y: Tensor, perturb: Perturb, *, beta: float) -> Tensor:
    """Return clean cross-entropy + beta * KL(clean || adversarial), attacked on the KL (Zhang et al. 2019, eq. 5).

    At x itself the KL has no gradient: an attack without a random start begins at x plus noise, as theirs does.
    """
    target = _evaluation_log_probabilities(model, x)
    adv = perturb(x, target, loss=kl_from, start_noise=KL_START)
    clean, adversarial = _clean_and_adversarial(model, x, adv)
    return F.cross_entropy(clean, y) + beta * kl_from(adversarial, clean.log_softmax(1)).mean()


def mart(model: nn.Module, x: Tensor, y: Tensor, perturb: Perturb, *, weight: float) -> Tensor:
    """Return MART's boosted adversarial cross-entropy + weight * KL(clean || adversarial) (Wang et al. 2020).

    The KL of each example is weighted by 1 - the clean probability of its label.
    """
    clean, adversarial = _clean_and_adversarial(model, x, perturb(x, y))
    wrong = adversarial.softmax(1).scatter(1, y[:, None], 0.0).amax(1)
    boosted = F.cross_entropy(adversarial, y) - torch.log1p(-wrong.clamp_max(1 - 1e-6)).mean()
    log_probabilities = clean.log_softmax(1)
    doubt = 1 - log_probabilities.gather(1, y[:, None])[:, 0].exp()
    return boosted + weight * (kl_from(adversarial, log_probabilities) * doubt).mean()


def ibp(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    perturb: Perturb,
    *,
    kappa: float,
    eps_factor: float,
    l1: float,
    regularizer: float,
) -> Tensor:
    """Return kappa times the clean cross-entropy plus 1 - kappa times that of the worst logits (Gowal et al. 2018).

    The worst logits are bounded by intervals over the ball, so that no attack is needed. kappa falls from 1 to its
    value while the ball grows. One pass, in float32.

    Args:
        kappa: weight of the clean images once the ball has its full size.
        eps_factor: radius in training over the threat's.
        l1: price of the sum of the absolute values of all weights.
        regularizer: price, at the start of the ramp, of bounds that widen and of ReLUs that are all on one side (Shi et
            al. 2021, section 4.2). It falls to 0 while the ball grows.
    """
    bounded = _bound_worst(model, x, y, perturb, eps_factor, regularizer)
    clean_weight = 1 - (1 - kappa) * perturb.ramp
    loss = clean_weight * F.cross_entropy(bounded.clean, y) + (1 - clean_weight) * F.cross_entropy(bounded.worst, y)
    return loss + bounded.penalty + (l1 * _absolute_weights(model) if l1 else 0.0)


def mtl_ibp(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    perturb: Perturb,
    *,
    alpha: float,
    eps_factor: float,
    l1: float,
    regularizer: float,
) -> Tensor:
    """Return alpha times the cross-entropy of the worst logits plus 1 - alpha times the adversarial one.

    Source: De Palma et al. 2024, "Expressive losses", MTL-IBP. Two passes, the bounds' one in float32.

    Args:
        alpha: weight of the bounds; 1 leaves them alone, 0 is `pgd_at`.
        eps_factor: radius of the bounds over the threat's.
        l1: price of the sum of the absolute values of all weights.
        regularizer: as in `ibp`.
    """
    bounded = _bound_worst(model, x, y, perturb, eps_factor, regularizer)
    adversarial = F.cross_entropy(model(perturb(x, y)).float(), y)
    loss = alpha * F.cross_entropy(bounded.worst, y) + (1 - alpha) * adversarial
    return loss + bounded.penalty + (l1 * _absolute_weights(model) if l1 else 0.0)


@dataclass(frozen=True)
class BoundedLogits:
    """Clean logits (n, classes), the worst ones less that of the label, and a penalty for loose bounds, a scalar."""

    clean: Tensor
    worst: Tensor
    penalty: Tensor | float


def _bound_worst(
    model: nn.Module, x: Tensor, y: Tensor, perturb: Perturb, eps_factor: float, regularizer: float
) -> BoundedLogits:
    """Bound the logits by intervals, in float32; the penalty falls to 0 while the ball grows."""
    largest = perturb.threat.largest_eps(x[0].numel())
    threat = perturb.threat.with_eps(min(perturb.threat.eps * eps_factor, largest))
    price = regularizer * (1 - perturb.ramp)
    with torch.autocast(x.device.type, enabled=False), collect_preactivations() as preactivations:
        logits = bound_logits(model, x, threat)
        penalty: Tensor | float = 0.0
        if price:
            penalty = price * (looseness(Interval.of(x, threat), preactivations) + imbalance(preactivations))
        return BoundedLogits(logits.clean, margins(logits, y), penalty)


def _absolute_weights(model: nn.Module) -> Tensor:
    """Return the sum of the absolute values of all parameters of two dimensions or more."""
    return torch.stack([weight.abs().sum() for weight in model.parameters() if weight.dim() > 1]).sum()


def _evaluation_log_probabilities(model: nn.Module, x: Tensor) -> Tensor:
    """Return the (n, classes) log-softmax outputs in evaluation mode, without gradients; the model keeps its modes."""
    with attack_mode(model), torch.no_grad():
        log_probabilities: Tensor = model(x).float().log_softmax(1)
    return log_probabilities


@dataclass(frozen=True)
class Option:
    """A number that an objective takes: its default, the values that it may have, and its meaning in one line."""

    default: float
    bounds: Bounds
    help: str


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec:
    """A training objective as users name it.

    Args:
        loss: the function (model, x, y, perturb, **options) -> scalar loss.
        help: its meaning in one line.
        options: keyword argument of the function -> `Option`.
        norms: names of the threats that it is for; None for every one.
        adversarial: whether validation counts robust accuracy, too; if not, it chooses by clean accuracy alone.
        certified: whether it trains for interval bounds; validation then counts the images that they certify, and
            takes the place of an attack.
    """

    loss: Callable[..., Tensor]
    help: str
    options: Mapping[str, Option] = field(default_factory=dict)
    norms: tuple[str, ...] | None = None
    adversarial: bool = True
    certified: bool = False

    def check_options(self, name: str, options: Mapping[str, float]) -> None:
        """Raise ValueError for an option that the objective does not have, or a value that it cannot take."""
        for key, value in options.items():
            if not self.options:
                raise ValueError(f"objective {name!r} has no options, got {key!r}")
            if key not in self.options:
                raise unknown(f"option of objective {name!r}", key, self.options)
            bounds = self.options[key].bounds
            if isinstance(value, bool) or not isinstance(value, int | float) or not bounds.contain(value):
                raise ValueError(f"expected {key} {bounds} for objective {name!r}, got {value!r}")

    def fill_options(self, name: str, given: Mapping[str, float] | None) -> dict[str, float]:
        """Return all options with their values, given or default.

        Raises:
            ValueError: as `check_options`.
        """
        self.check_options(name, given or {})
        return {key: float(option.default) for key, option in self.options.items()} | dict(given or {})

    def check_threat(self, name: str, threat: Threat) -> None:
        """Raise ValueError if the objective is not for the threat's norm."""
        if self.norms is not None and threat.name not in self.norms:
            raise ValueError(f"objective {name!r} is for {', '.join(self.norms)} threats, got {threat}")

    def build(self, options: Mapping[str, float]) -> Objective:
        """Return the loss with its options set."""
        return partial(self.loss, **options)


FRACTION = Bounds(low=0, high=1)
OBJECTIVES: dict[str, ObjectiveSpec] = {
    "natural": ObjectiveSpec(loss=natural, help="cross-entropy on clean images", adversarial=False),
    "gaussian": ObjectiveSpec(
        loss=gaussian, help="cross-entropy on images with noise N(0, eps^2), for smoothing", norms=("l2",)
    ),
    "mixed": ObjectiveSpec(loss=mixed, help="half clean, half adversarial cross-entropy (the paper's)"),
    "pgd_at": ObjectiveSpec(loss=pgd_at, help="adversarial cross-entropy (Madry et al. 2018)"),
    "trades": ObjectiveSpec(
        loss=trades,
        help="clean cross-entropy plus beta times the divergence under attack (Zhang et al. 2019)",
        options={"beta": Option(6.0, NOT_NEGATIVE, "weight of the divergence of adversarial from clean outputs")},
    ),
    "mart": ObjectiveSpec(
        loss=mart,
        help="boosted adversarial cross-entropy plus a weighted divergence (Wang et al. 2020)",
        options={
            "weight": Option(
                5.0, NOT_NEGATIVE, "weight of the divergence, which counts more for images of low confidence"
            )
        },
    ),
    "ibp": ObjectiveSpec(
        loss=ibp,
        help="cross-entropy of the worst logits by intervals, beside the clean one (Gowal et al. 2018)",
        options={
            "kappa": Option(0.3, FRACTION, "weight of the clean cross-entropy at the end of the ramp"),
            "eps_factor": Option(1.01, POSITIVE, "radius in training over the threat's"),
            "l1": Option(0.0, NOT_NEGATIVE, "price of the absolute values of the weights"),
            "regularizer": Option(0.5, NOT_NEGATIVE, "price of loose bounds and one-sided ReLUs while the ball grows"),
        },
        certified=True,
    ),
    "mtl_ibp": ObjectiveSpec(
        loss=mtl_ibp,
        help="cross-entropy of the worst logits by intervals, beside the adversarial one (De Palma et al. 2024)",
        options={
            "alpha": Option(0.5, FRACTION, "weight of the intervals' cross-entropy"),
            "eps_factor": Option(1.01, POSITIVE, "radius of the intervals over the threat's"),
            "l1": Option(0.0, NOT_NEGATIVE, "price of the absolute values of the weights"),
            "regularizer": Option(0.5, NOT_NEGATIVE, "price of loose bounds and one-sided ReLUs while the ball grows"),
        },
        certified=True,
    ),
}


def parse_objective(text: str) -> tuple[str, dict[str, float]]:
    """Read an objective with its options, ``name`` or ``name:option=value,option=value``.

    >>> parse_objective("trades:beta=3")
    ('trades', {'beta': 3.0})

    Raises:
        ValueError: an unknown objective or option, a value that it cannot take, or text of another form.
    """
    name, colon, listed = text.strip().partition(":")
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    options: dict[str, float] = {}
    for pair in listed.split(",") if colon else []:
        key, _, value = pair.partition("=")
        try:
            options[key.strip()] = float(value)
        except ValueError:
            raise ValueError(f"expected an objective such as trades:beta=6, got {text!r}") from None
    OBJECTIVES[name].check_options(name, options)
    return name, options
