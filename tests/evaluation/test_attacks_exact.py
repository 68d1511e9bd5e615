"""Attacks on models whose nearest adversarial examples are known: a linear model and a small ReLU network.

No attack may break an image at 98 % of its exact radius, and the worst case over attacks must break it at 102 %.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, nnls
from torch import nn

from atmc.core.rng import Noise
from atmc.data import Images
from atmc.evaluation import attacks, autoattack, corner
from atmc.evaluation.accuracy import robust_accuracy
from atmc.evaluation.attacks import ATTACKS
from atmc.evaluation.statistics import worst_case
from atmc.robust.attacks import margin
from atmc.robust.threats import BALLS, L2, Linf

DUAL = {"linf": 1, "l2": 2, "l1": math.inf}


def of_norm(norm: str, side: int) -> list[str]:
    """Return the attacks in a ball for a norm and images of side x side: Square needs 5x5, except for linf.

    An attack that adds to AutoAttack's stages those of other attacks is left out: all of them are tried by themselves.
    """
    small = side < 5 and norm != "linf"
    specs = {name: spec for name, spec in ATTACKS.items() if spec.bounded and norm in (spec.norms or (norm,))}
    return [name for name, spec in specs.items() if not spec.further and not (small and spec.gradient_free)]


@pytest.fixture
def few_queries(monkeypatch):
    """Let the attacks that count queries take few of them."""
    for module, name, queries in (
        (autoattack, "QUERIES", 500),
        (autoattack, "LONG_QUERIES", 50),
        (corner, "QUERIES", 500),
    ):
        monkeypatch.setattr(module, name, queries)


def linear_model(classes: int, side: int) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(side * side, classes))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(classes, side * side, generator=torch.Generator().manual_seed(1)))
        model[1].bias.zero_()
    return model


def at_radius(model: nn.Module, norm: str, radius: float, n: int, side: int) -> Images:
    """Build images at the exact distance radius to the nearest wrong class, far enough from the faces of the box.

    Towards class t the margin falls by at most the dual norm of w_y - w_t per unit of distance. The margins are set by
    moving along the pseudoinverse, to radius * dual norm for one class and to three times as much for the others.
    """
    weight = model[1].weight.detach()
    pixels, labels = [], torch.arange(n) % len(weight)
    for i, y in enumerate(labels.tolist()):
        others = [t for t in range(len(weight)) if t != y]
        rows = weight[y] - weight[others]
        wanted = radius * torch.linalg.vector_norm(rows, ord=DUAL[norm], dim=1)
        wanted[torch.arange(len(others)) != i % len(others)] *= 3
        start = torch.full((side * side,), 0.5)
        pixels.append(start + torch.linalg.pinv(rows) @ (wanted - rows @ start))
    x = torch.stack(pixels).view(n, 1, side, side)
    assert x.min() > 1.1 * radius
    assert x.max() < 1 - 1.1 * radius
    return Images(x, labels)


@pytest.mark.usefixtures("few_queries")
@pytest.mark.parametrize(("norm", "radius"), [("linf", 0.004), ("l2", 0.02), ("l1", 0.04)])
@pytest.mark.parametrize("classes", [2, 5])
def test_linear_model(norm, radius, classes):
    model = linear_model(classes, side=6)
    images = at_radius(model, norm, radius, n=2, side=6)
    inside, outside = BALLS[norm](0.98 * radius), BALLS[norm](1.02 * radius)
    names = of_norm(norm, side=6)
    for name in names:
        assert robust_accuracy(model, images, inside, name).accuracy == 1.0, f"{name} broke what cannot be broken"
    broken = [robust_accuracy(model, images, outside, name) for name in names if not ATTACKS[name].gradient_free]
    assert worst_case(broken).accuracy == 0.0
    assert robust_accuracy(model, images, outside, "fab").accuracy == 0.0
    if norm == "linf":
        for name in ("interval-pgd", "corner"):
            assert robust_accuracy(model, images, outside, name).accuracy == 0.0


def network() -> nn.Module:
    """Build a network of 4 pixels, 5 hidden units and 3 classes."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def exact_radius(model: nn.Module, x: np.ndarray, y: int, norm: str) -> float:
    """Return the distance to the nearest image in [0, 1] that the network gives another class.

    Over all activation patterns: within one the network is affine, and the nearest point of the pattern's polytope with
    a wrong logit on top solves a linear program (linf, l1) or a least distance problem (l2).
    """
    first, second = (
        (m.weight.detach().double().numpy(), m.bias.detach().double().numpy()) for m in (model[1], model[3])
    )
    best, d = math.inf, len(x)
    for pattern in itertools.product((0.0, 1.0), repeat=len(first[1])):
        on = np.array(pattern)
        sign = 2 * on - 1
        w, b = second[0] @ (on[:, None] * first[0]), second[0] @ (on * first[1]) + second[1]
        for target in range(len(b)):
            if target == y:
                continue
            # G delta >= h: the pattern holds, the target is not below y, and the box
            g = np.concatenate([sign[:, None] * first[0], (w[target] - w[y])[None], np.eye(d), -np.eye(d)])
            h = -np.concatenate(
                [sign * (first[0] @ x + first[1]), [(w[target] - w[y]) @ x + b[target] - b[y]], x, 1 - x]
            )
            best = min(best, nearest(g, h, norm))
    return best


def nearest(g: np.ndarray, h: np.ndarray, norm: str) -> float:
    """Return min |delta| subject to g delta >= h; infinity if no delta satisfies it."""
    d = g.shape[1]
    if norm == "l2":  # Lawson and Hanson 1974, chapter 23: least distance programming by nonnegative least squares
        stacked = np.concatenate([g.T, h[None]])
        target = np.eye(d + 1)[-1]
        solution, residual = nnls(stacked, target)
        if residual < 1e-9:
            return math.inf
        r = stacked @ solution - target
        return float(np.linalg.norm(-r[:-1] / r[-1]))
    extra = 1 if norm == "linf" else d  # one bound for all pixels, or one for each
    cost = np.concatenate([np.zeros(d), np.ones(extra)])
    bound = np.ones((d, 1)) if norm == "linf" else np.eye(d)
    below = np.concatenate(
        [np.hstack([-g, np.zeros((len(g), extra))]), np.hstack([np.eye(d), -bound]), np.hstack([-np.eye(d), -bound])]
    )
    program = linprog(cost, below, np.concatenate([-h, np.zeros(2 * d)]), bounds=[(None, None)] * (d + extra))
    return float(program.fun) if program.success else math.inf


@pytest.mark.usefixtures("few_queries")
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_relu_network(norm):
    model, side = network(), 2
    x = torch.rand(12, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model(x).argmax(1)
    radii = [
        exact_radius(model, image.flatten().double().numpy(), int(label), norm)
        for image, label in zip(x, y, strict=True)
    ]
    names = of_norm(norm, side)
    cheap = [name for name in names if not ATTACKS[name].gradient_free]
    tried = [i for i, radius in enumerate(radii) if 0.02 < radius < 0.5 * BALLS[norm](0.1).largest_eps(4)][:4]
    assert len(tried) == 4
    for position, i in enumerate(tried):
        one = Images(x[i : i + 1], y[i : i + 1])
        for name in names if position == 0 else ("pgd", "apgd-ce", "fab"):
            inside = robust_accuracy(model, one, BALLS[norm](0.98 * radii[i]), name)
            assert inside.accuracy == 1.0, f"{name} claims to break example {i} inside its exact radius"
        ball = BALLS[norm](1.02 * radii[i])
        outside = [robust_accuracy(model, one, ball, name) for name in cheap]
        custom = {"steps": 60, "restarts": 60, "step_size": ball.eps / 40, "loss": "margin"}
        outside.append(robust_accuracy(model, one, ball, **custom))
        assert worst_case(outside).accuracy == 0.0, f"nothing breaks example {i} at 1.02 of its exact radius"


def test_exact_radius_of_a_linear_model_agrees_with_its_closed_form():
    """The solver of this file agrees with the formula of this file."""
    rows, margin = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)).double().numpy(), 0.3
    for norm, dual in DUAL.items():
        distance = nearest(-rows, np.array([margin]), norm)
        assert distance == pytest.approx(margin / np.linalg.norm(rows[0], ord=dual), rel=1e-6)
    assert nearest(np.array([[1.0], [-1.0]]), np.array([1.0, 1.0]), "l2") == math.inf


def test_a_lying_attack_would_be_seen(monkeypatch):
    """An image beyond the radius does not count, whatever the attack says."""
    model = linear_model(2, side=6)
    images = at_radius(model, "linf", 0.004, n=2, side=6)
    monkeypatch.setattr(attacks, "fgsm", lambda model, x, y, threat: 1 - x.round())
    lying = robust_accuracy(model, images, Linf(0.0039), "fgsm")
    assert lying.accuracy == 1.0
    assert lying.refused == 2


def test_corner_search_finds_the_best_corner():
    """The largest margin over all 512 corners of images of 9 pixels, by enumeration, or an image that is wrong."""
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 3)).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x, threat = torch.rand(20, 1, 3, 3, generator=generator), Linf(0.15)
    y, index = model(x).argmax(1), torch.arange(20)
    ends = torch.tensor(list(itertools.product((False, True), repeat=9))).view(-1, 1, 3, 3)
    low, high = (x - threat.eps).clamp(0, 1), (x + threat.eps).clamp(0, 1)
    best = torch.stack([margin(model(torch.where(ends, high[i], low[i])), y[i].expand(512)).amax() for i in index])
    seen = torch.zeros(1, dtype=torch.int64)

    def logits(images: torch.Tensor) -> torch.Tensor:
        seen.add_(len(images))
        return model(images)

    noise = Noise(index, seed=0, purpose="test")
    adv = corner.search_corners(logits, x, y, threat, noise=noise, queries=400)
    assert torch.equal(adv, torch.where(adv > x, high, low))
    reached = margin(model(adv), y)
    assert 0 < int((best > 0).sum()) < 20
    assert torch.equal(reached > 0, best > 0)
    assert torch.allclose(reached[best <= 0], best[best <= 0], atol=1e-5)
    assert (
        int((best <= 0).sum()) * 400 <= int(seen) < 20 * 400
    )  # no more than allowed, and none after an image is wrong
    alone = corner.search_corners(model, x[7:8], y[7:8], threat, noise=noise.take(index[7:8]), queries=400)
    assert torch.equal(alone[0], adv[7])


def test_cw_finds_the_nearest():
    model = linear_model(3, side=6)
    images = at_radius(model, "l2", 0.05, n=6, side=6)
    assert robust_accuracy(model, images, L2(0.051), "cw").accuracy == 0.0
    assert robust_accuracy(model, images, L2(0.049), "cw").accuracy == 1.0
