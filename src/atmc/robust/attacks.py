"""Attacks: functions of a model, clean images and labels that return adversarial images.

Every attack runs the model in evaluation mode and leaves it as it found it: no running statistics, no weight
gradients, training mode restored. Images are (n, c, h, w) float32 in [0, 1], labels (n,) int64.

Sources: FGSM, Goodfellow et al. 2015; PGD, Madry et al. 2018; WRM, Sinha, Namkoong and Duchi 2018; C&W, Carlini and
Wagner 2017; step sizes of the paper's attack, Gui et al. 2019, section 4 (1.25 eps / steps, no random start).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atmc.core.rng import Noise
from atmc.robust.threats import Threat

Loss = Callable[[Tensor, Tensor], Tensor]
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """(n,) cross-entropies of logits (n, classes)."""
    return F.cross_entropy(logits.float(), y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """(n,) largest wrong logit less the right one: positive where the example is fooled."""
    logits = logits.float()
    right = logits.gather(1, y[:, None])[:, 0]
    return logits.scatter(1, y[:, None], -torch.inf).amax(1) - right


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """(n,) margins over the distance from the largest to the third largest logit (Croce and Hein 2020, eq. 6).

    Neither a shift nor a scaling of the logits changes it. 0 where the three largest are equal.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"expected at least 3 classes for the DLR loss, got {logits.shape[1]}: take the margin")
    top = logits.float().topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def kl_from(logits: Tensor, log_probabilities: Tensor) -> Tensor:
    """(n,) Kullback-Leibler divergences of softmax(logits) from probabilities given as logarithms, (n, classes)."""
    return F.kl_div(logits.float().log_softmax(1), log_probabilities, reduction="none", log_target=True).sum(1)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dlr": dlr, "margin": margin}


@contextmanager
def attack_mode(model: nn.Module, *, batch_statistics: bool = False) -> Iterator[None]:
    """The model in evaluation mode; each module's own mode comes back, also after an error.

    With batch_statistics, batch norm layers normalize by the batch at hand (as the authors' program has it); their
    buffers are put back at the end.
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
    """Losses (n,) at adv and their gradient there, like adv; weight gradients are not even computed.

    Zero where the outputs do not depend on the image by way of anything differentiable.
    """
    adv = adv.detach().requires_grad_()
    with torch.enable_grad():
        values = loss(model(adv), y)
        if not values.requires_grad:
            return values, torch.zeros_like(adv)
        (grad,) = torch.autograd.grad(values.sum(), adv, allow_unused=True, materialize_grads=True)
    return values.detach(), grad


def fgsm(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, loss: str = "ce") -> Tensor:
    """One ascent step of length eps from x (Goodfellow et al. 2015): PGD with one step."""
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
    loss: str | Loss = "ce",
    best_of_steps: bool = False,
    batch_statistics: bool = False,
) -> Tensor:
    """Projected gradient ascent of the loss in the threat's norm; adversarial images like x.

    Args:
        steps: number of ascent steps, at least 1.
        step_size: length of a step in the threat's norm, pixel units.
        noise: random numbers for a random start (one stream an example); None starts at x.
        loss: a name in `LOSSES`, or a function (logits, y) -> (n,) losses; y is whatever that function takes.
        best_of_steps: return each example's iterate of highest loss instead of the last (one pass more).
        batch_statistics: let batch norm use the statistics of the attacked batch (see `attack_mode`).

    >>> from atmc.robust.threats import Linf
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> x = torch.full((3, 1, 2, 2), 0.5)
    >>> adv = pgd(model, x, torch.tensor([0, 1, 0]), Linf(0.1), steps=5, step_size=0.025)
    >>> bool(((adv - x).abs() <= 0.1 + 1e-6).all())
    True
    """
    if steps < 1:
        raise ValueError(f"expected steps >= 1, got {steps}")
    if not step_size > 0:
        raise ValueError(f"expected step_size > 0, got {step_size}")
    objective = LOSSES[loss] if isinstance(loss, str) else loss
    adv = x if noise is None else threat.project(threat.random_start(x, noise), x)
    best, best_value = adv, torch.full((len(x),), -torch.inf, device=x.device)
    with attack_mode(model, batch_statistics=batch_statistics):
        for _ in range(steps):
            value, grad = input_gradient(model, adv, y, objective)
            if best_of_steps:
                best, best_value = _better(best, best_value, adv, value)
            adv = threat.project(threat.ascent(adv, grad, step_size), x)
        if not best_of_steps:
            return adv.detach()
        with torch.no_grad():
            best, _ = _better(best, best_value, adv, objective(model(adv), y))
    return best.detach()


def _better(best: Tensor, best_value: Tensor, new: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    higher = value > best_value
    mask = higher.view(-1, *[1] * (new.dim() - 1))
    return torch.where(mask, new, best), torch.where(higher, value, best_value)


def wrm(model: nn.Module, x: Tensor, y: Tensor, *, penalty: float = 1.3, steps: int = 7) -> Tensor:
    """Gradient ascent of loss(x') - penalty * |x' - x|_2^2 over the box: no ball (Sinha et al. 2018, algorithm 1).

    Step t has size 1 / (2 penalty sqrt(t)): the first one lands on the maximizer of the linearized problem.

    Args:
        penalty: the price of squared Euclidean distance, > 0 (the paper's comparison uses 1.3).
        steps: ascent steps, at least 1 (the paper: 7).
    """
    if steps < 1:
        raise ValueError(f"expected steps >= 1, got {steps}")
    if not penalty > 0:
        raise ValueError(f"expected penalty > 0, got {penalty}")
    adv = x
    with attack_mode(model):
        for step in range(1, steps + 1):
            _, grad = input_gradient(model, adv, y, cross_entropy)
            uphill = grad - 2 * penalty * (adv - x)
            adv = (adv + uphill / (2 * penalty * step**0.5)).clamp(0, 1)
    return adv.detach()


def cw(
    model: nn.Module, x: Tensor, y: Tensor, *, steps: int = 200, searches: int = 9, learning_rate: float = 0.01
) -> Tensor:
    """The nearest image found that is classified wrong; x where none is (Carlini and Wagner 2017, section V, l2).

    Minimizes |x' - x|_2^2 + c max(0, right logit - largest wrong one) over w with x' = (1 + tanh w) / 2, by Adam; c by
    binary search for each example. It has no ball: whoever calls it measures the distance.

    Args:
        steps: of Adam, for each c, at least 1.
        searches: how many values of c are tried, at least 1.
    """
    if min(steps, searches) < 1:
        raise ValueError(f"expected steps >= 1 and searches >= 1, got {steps} and {searches}")
    shape = (-1, *[1] * (x.dim() - 1))
    start = torch.atanh((2 * x - 1) * 0.999999)
    best, best_distance = x.clone(), torch.full((len(x),), torch.inf, device=x.device)
    c, low, high = torch.ones_like(best_distance), torch.zeros_like(best_distance), torch.full_like(best_distance, 1e10)
    with attack_mode(model):
        for _ in range(searches):
            found = torch.zeros_like(best_distance, dtype=torch.bool)
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
                found |= margins > 0
                best = torch.where(better.view(shape), adv.detach(), best)
                best_distance = torch.where(better, distance.detach(), best_distance)
                w = _adam(w.detach(), grad, state, step, learning_rate)
            high = torch.where(found, torch.minimum(high, c), high)
            low = torch.where(found, low, torch.maximum(low, c))
            c = torch.where(high < 1e9, (low + high) / 2, c * 10)
    return best.detach()


def _adam(w: Tensor, grad: Tensor, state: tuple[Tensor, Tensor], step: int, learning_rate: float) -> Tensor:
    """One step of Adam (Kingma and Ba 2015), its moments updated in place; elementwise, so examples stay apart."""
    first, second = state
    first.mul_(0.9).add_(grad, alpha=0.1)
    second.mul_(0.999).addcmul_(grad, grad, value=0.001)
    return w - learning_rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
