"""Attacks: functions of a model, clean images and labels that return adversarial images.

Every attack runs the model in evaluation mode and leaves it unchanged: running statistics, weight gradients and the
mode of each module stay. Images are (n, c, h, w) float32 in [0, 1], labels (n,) int64.

Sources: FGSM, Goodfellow et al. 2015; PGD, Madry et al. 2018; WRM, Sinha, Namkoong and Duchi 2018; C&W, Carlini and
Wagner 2017; interval bounds, Gowal et al. 2018. "The paper" is Gui et al. 2019, whose section 4 has the settings of
`PgdSettings.paper`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atmc.core.errors import unknown
from atmc.core.rng import Noise
from atmc.robust.intervals import bound_logits, margins
from atmc.robust.threats import Threat

Loss = Callable[[Tensor, Tensor], Tensor]
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the (n,) cross-entropies of logits (n, classes)."""
    return F.cross_entropy(logits.float(), y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return the (n,) largest wrong logits minus the right one: positive if the example is fooled."""
    logits = logits.float()
    right = logits.gather(1, y[:, None])[:, 0]
    return logits.scatter(1, y[:, None], -torch.inf).amax(1) - right


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Return the (n,) difference of logits ratios (Croce and Hein 2020, eq. 6).

    The ratio is the margin over the distance from the largest to the third largest logit. Neither a shift nor a
    scaling of the logits changes it. It is 0 if the three largest logits are equal.

    Raises:
        ValueError: fewer than 3 classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"the DLR loss needs at least 3 classes, got {logits.shape[1]}: use the margin instead")
    top = logits.float().topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def kl_from(logits: Tensor, log_probabilities: Tensor) -> Tensor:
    """Return the (n,) Kullback-Leibler divergences KL(p || softmax(logits)) of p given as logarithms, (n, classes)."""
    return F.kl_div(logits.float().log_softmax(1), log_probabilities, reduction="none", log_target=True).sum(1)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dlr": dlr, "margin": margin}


@contextmanager
def attack_mode(model: nn.Module, *, batch_statistics: bool = False) -> Iterator[None]:
    """Put the model into evaluation mode and restore the mode of each module at the end, after an error too.

    Args:
        batch_statistics: let batch norm layers normalize by the current batch, as the reference implementation of the
            paper does; their buffers are restored at the end.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS)] if batch_statistics else []
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for buffer, before in buffers:
            buffer.copy_(before)


def input_gradient(model: nn.Module, adv: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Return the losses (n,) at adv and their gradients, of the shape of adv; compute no weight gradients.

    The gradient is zero if the outputs do not depend on the image through differentiable operations.
    """
    adv = adv.detach().requires_grad_()
    with torch.enable_grad():
        values = loss(model(adv), y)
        if not values.requires_grad:
            return values, torch.zeros_like(adv)
        (grad,) = torch.autograd.grad(values.sum(), adv, allow_unused=True, materialize_grads=True)
    return values.detach(), grad


def fgsm(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, loss: str = "ce") -> Tensor:
    """Take one ascent step of length eps from x (Goodfellow et al. 2015): PGD with one step."""
    return pgd(model, x, y, threat, steps=1, step_size=threat.eps, loss=loss)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    steps: int,
    step_size: float,
    noise: Noise | None = None,
    start: Tensor | None = None,
    loss: str | Loss = "ce",
    best_of_steps: bool = False,
    batch_statistics: bool = False,
) -> Tensor:
    """Maximize the loss by projected gradient ascent in the threat's norm; return images of the shape of x.

    Args:
        steps: number of ascent steps, at least 1.
        step_size: length of a step in the threat's norm, pixel units.
        noise: random numbers for a random start, one stream per example; None starts at `start`.
        start: images like x, which are projected on the ball and the box first; None starts at x.
        loss: a name in `LOSSES`, or a function (logits, y) -> (n,) losses; y is whatever that function takes.
        best_of_steps: return each example's iterate of highest loss instead of the last (one more forward pass).
        batch_statistics: let batch norm use the statistics of the attacked batch (see `attack_mode`).

    >>> from atmc.robust.threats import Linf
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> x = torch.full((3, 1, 2, 2), 0.5)
    >>> adv = pgd(model, x, torch.tensor([0, 1, 0]), Linf(0.1), steps=5, step_size=0.025)
    >>> bool(((adv - x).abs() <= 0.1 + 1e-6).all())
    True
    """
    check_pgd(steps=steps, step_size=step_size)
    objective = LOSSES[loss] if isinstance(loss, str) else loss
    if noise is not None:
        start = threat.random_start(x, noise)
    adv = x if start is None else threat.project(start, x)
    best, best_value = adv, torch.full((len(x),), -torch.inf, device=x.device)
    with attack_mode(model, batch_statistics=batch_statistics):
        for _ in range(steps):
            value, grad = input_gradient(model, adv, y, objective)
            if best_of_steps:
                best, best_value = _keep_better(best, best_value, adv, value)
            adv = threat.project(threat.ascent(adv, grad, step_size), x)
        if not best_of_steps:
            return adv.detach()
        with torch.no_grad():
            best, _ = _keep_better(best, best_value, adv, objective(model(adv), y))
    return best.detach()


def _keep_better(best: Tensor, best_value: Tensor, new: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each example, the image of the higher value, and that value."""
    higher = value > best_value
    mask = higher.view(-1, *[1] * (new.dim() - 1))
    return torch.where(mask, new, best), torch.where(higher, value, best_value)


def interval_pgd(
    model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, steps: int, noise: Noise | None = None
) -> Tensor:
    """Maximize the margin by gradients of its upper bound over a ball around the iterate, which shrinks to a point.

    A network whose units are off at an image has no gradient there, or one that ignores all that an attack could turn
    on. An interval bound has a gradient through every unit that is on anywhere in the ball. Step k of K, from 0, bounds
    the largest difference of a wrong logit and the right one over the ball of radius eps (1 - k / K)^2 around the
    iterate, ascends on that bound by eps / 4 (1 - k / K), and projects onto the threat's own ball around x. The first
    steps therefore see the whole threat, and the last ones are those of PGD on the margin. The bounds prove nothing
    here. Each example's iterate of largest margin is returned, an image of the shape of x.

    Args:
        steps: number of ascent steps, at least 1.
        noise: random numbers for a random start, one stream per example; None starts at x.

    Raises:
        UnsupportedOperation: `robust.intervals` has no rule for an operation of the model.

    >>> from atmc.robust.threats import Linf
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> x = torch.full((3, 1, 2, 2), 0.5)
    >>> adv = interval_pgd(model, x, torch.tensor([0, 1, 0]), Linf(0.1), steps=10)
    >>> bool(((adv - x).abs() <= 0.1 + 1e-6).all())
    True
    """
    check_pgd(steps=steps)
    adv = x if noise is None else threat.project(threat.random_start(x, noise), x)
    best, best_value = adv, torch.full((len(x),), -torch.inf, device=x.device)
    with attack_mode(model):
        for step in range(steps):
            left = 1 - step / steps
            adv = adv.detach().requires_grad_()
            with torch.enable_grad():
                logits = bound_logits(model, adv, threat.with_eps(threat.eps * left**2))
                bounds = margins(logits, y).scatter(1, y[:, None], -torch.inf).amax(1)
                (grad,) = torch.autograd.grad(bounds.sum(), adv)
            best, best_value = _keep_better(best, best_value, adv.detach(), margin(logits.clean.detach(), y))
            adv = threat.project(threat.ascent(adv.detach(), grad, threat.eps / 4 * left), x)
        with torch.no_grad():
            best, _ = _keep_better(best, best_value, adv, margin(model(adv), y))
    return best


def check_pgd(*, steps: int | None = None, step_size: float | None = None, restarts: int = 1, loss: str = "ce") -> None:
    """Raise ValueError for a setting of PGD that makes no sense; a setting that is None is not checked."""
    if steps is not None and steps < 1:
        raise ValueError(f"expected steps >= 1, got {steps}")
    if step_size is not None and not 0 < step_size < math.inf:
        raise ValueError(f"expected a step size > 0, in pixel units, got {step_size}")
    if restarts < 1:
        raise ValueError(f"expected restarts >= 1, got {restarts}")
    if loss not in LOSSES:
        raise unknown("loss", loss, LOSSES)


@dataclass(frozen=True, kw_only=True)
class PgdSettings:
    """Settings of `pgd` as an evaluation uses it.

    Args:
        steps: ascent steps, at least 1.
        step_size: length of a step in the threat's norm, pixel units.
        restarts: number of starts.
        random_start: whether the first start is a random point of the ball too; if not, it is the image. All later
            starts are random.
        loss: a name in `LOSSES`.
        best_of_steps: whether each example's iterate of highest loss counts, or the last one.

    Raises:
        ValueError: a setting that makes no sense.
    """

    steps: int
    step_size: float
    restarts: int = 1
    random_start: bool = False
    loss: str = "ce"
    best_of_steps: bool = False

    def __post_init__(self) -> None:
        check_pgd(steps=self.steps, step_size=self.step_size, restarts=self.restarts, loss=self.loss)

    @classmethod
    def paper(
        cls,
        threat: Threat,
        *,
        steps: int | None = None,
        step_size: float | None = None,
        restarts: int = 1,
        loss: str = "ce",
    ) -> PgdSettings:
        """Return the paper's attack (Gui et al. 2019, section 4), with the given settings in place of the paper's.

        The paper takes 7 steps at its CIFAR-10 radii (l-infinity below 0.1) and 16 at MNIST's and elsewhere, of size
        1.25 eps / steps, from the image, and keeps the last iterate. With another number of steps the last iterate
        counts too; with any other setting changed, the iterate of highest loss counts.

        Raises:
            ValueError: a setting that makes no sense.
        """
        check_pgd(steps=steps, step_size=step_size, restarts=restarts, loss=loss)
        steps = steps or (7 if threat.name == "linf" and threat.eps < 0.1 else 16)
        return cls(
            steps=steps,
            step_size=step_size or 1.25 * threat.eps / steps,
            restarts=restarts,
            loss=loss,
            best_of_steps=step_size is not None or restarts > 1 or loss != "ce",
        )

    @classmethod
    def strong(cls, threat: Threat, *, loss: str = "ce") -> PgdSettings:
        """Return 5 random starts of 40 steps of eps / 10, of which the iterate of highest loss counts."""
        return cls(steps=40, step_size=threat.eps / 10, restarts=5, random_start=True, loss=loss, best_of_steps=True)

    @classmethod
    def from_image(cls, threat: Threat, steps: int, *, loss: str = "ce", best_of_steps: bool = True) -> PgdSettings:
        """Return one start at the image with steps of 2.5 eps / steps, which can cross the ball more than once."""
        return cls(steps=steps, step_size=2.5 * threat.eps / steps, loss=loss, best_of_steps=best_of_steps)

    def attack(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, noise: Noise | None = None) -> Tensor:
        """Attack from one start, at a random point of the ball if noise is given, else at x; see `pgd`."""
        return pgd(
            model,
            x,
            y,
            threat,
            steps=self.steps,
            step_size=self.step_size,
            noise=noise,
            loss=self.loss,
            best_of_steps=self.best_of_steps,
        )


def wrm(model: nn.Module, x: Tensor, y: Tensor, *, loss_weight: float = 1.3, steps: int = 7) -> Tensor:
    """Maximize loss_weight * loss(x') - |x' - x|_2^2 / 2 over the box by gradient ascent.

    Source: Sinha et al. 2018, algorithm 1. There is no ball. Step t has size 1 / sqrt(t): the first one ends at the
    maximizer of the linearized problem. The reference implementation of Gui et al. 2019 weighs the loss by 1.3, too;
    Sinha et al. write the same problem as loss - gamma |x' - x|^2 with gamma = 1 / (2 loss_weight).

    Args:
        loss_weight: what the loss counts beside half the squared Euclidean distance, > 0.
        steps: ascent steps, at least 1; the default is the paper's.

    Raises:
        ValueError: a setting that makes no sense.
    """
    if steps < 1:
        raise ValueError(f"expected steps >= 1, got {steps}")
    if not loss_weight > 0:
        raise ValueError(f"expected loss_weight > 0, got {loss_weight}")
    adv = x
    with attack_mode(model):
        for step in range(1, steps + 1):
            _, grad = input_gradient(model, adv, y, cross_entropy)
            uphill = loss_weight * grad - (adv - x)
            adv = (adv + uphill / step**0.5).clamp(0, 1)
    return adv.detach()


def cw(
    model: nn.Module, x: Tensor, y: Tensor, *, steps: int = 200, searches: int = 9, learning_rate: float = 0.01
) -> Tensor:
    """Search for the nearest image that is classified wrong, and return x if there is none.

    The l2 attack of Carlini and Wagner 2017, section V: minimize |x' - x|_2^2 + c max(0, right logit - largest wrong
    logit) over w with x' = (1 + tanh w) / 2 by Adam, and find c for each example by binary search. The result may be
    at any distance: the caller measures it.

    Args:
        steps: steps of Adam per value of c, at least 1.
        searches: values of c that are tried, at least 1.
        learning_rate: the step size of Adam.

    Raises:
        ValueError: a setting that makes no sense.
    """
    if min(steps, searches) < 1:
        raise ValueError(f"expected steps >= 1 and searches >= 1, got {steps} and {searches}")
    shape = (-1, *[1] * (x.dim() - 1))
    start = torch.atanh((2 * x - 1) * 0.999999)
    best, best_distance = x.clone(), torch.full((len(x),), torch.inf, device=x.device)
    c, low, high = torch.ones_like(best_distance), torch.zeros_like(best_distance), torch.full_like(best_distance, 1e10)
    with attack_mode(model):
        for _ in range(searches):
            broken = torch.zeros_like(best_distance, dtype=torch.bool)  # whether any step with this c fooled the model
            w, state = start.clone(), (torch.zeros_like(x), torch.zeros_like(x))
            for step in range(1, steps + 1):
                with torch.enable_grad():
                    w.requires_grad_()
                    adv = (1 + torch.tanh(w)) / 2
                    distance = (adv - x).flatten(1).square().sum(1)
                    margins = margin(model(adv), y)
                    loss = distance + c * (-margins).clamp_min(0)
                    (grad,) = torch.autograd.grad(loss.sum(), w)
                better = (margins > 0) & (distance < best_distance)
                broken |= margins > 0
                best = torch.where(better.view(shape), adv.detach(), best)
                best_distance = torch.where(better, distance.detach(), best_distance)
                w = _adam(w.detach(), grad, state, step, learning_rate)
            high = torch.where(broken, torch.minimum(high, c), high)
            low = torch.where(broken, low, torch.maximum(low, c))
            c = torch.where(high < 1e9, (low + high) / 2, c * 10)
    return best.detach()


def _adam(w: Tensor, grad: Tensor, state: tuple[Tensor, Tensor], step: int, learning_rate: float) -> Tensor:
    """Take one step of Adam (Kingma and Ba 2015) and update its moments in place.

    All operations are elementwise, so that the examples of a batch do not influence each other.
    """
    first, second = state
    first.mul_(0.9).add_(grad, alpha=0.1)
    second.mul_(0.999).addcmul_(grad, grad, value=0.001)
    return w - learning_rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
