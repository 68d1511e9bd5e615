"""Threats, attacks and objectives: contracts that every ball and attack keeps, and closed forms on linear models."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from atmc.compress.factorize import factorize
from atmc.core.rng import Noise
from atmc.data import Images
from atmc.evaluation import accuracy as evaluation
from atmc.evaluation import attacks, autoattack, corner
from atmc.robust.attacks import LOSSES, attack_mode, cross_entropy, fgsm, interval_pgd, kl_from, margin, pgd, wrm
from atmc.robust.objectives import OBJECTIVES, Objective, TrainingAttack, mart, parse_objective, trades
from atmc.robust.threats import L1, L2, Linf, check_threat, parse_threat

BALLS = [Linf(0.1), L2(0.8), L1(3.0)]
SLACK = 1e-5


def noise(n: int, seed: int = 0, epoch: int = 0) -> Noise:
    return Noise(torch.arange(n), seed=seed, purpose="test", epoch=epoch)


def images(n: int = 8, seed: int = 0) -> torch.Tensor:
    return noise(n, seed=seed + 100).uniform((2, 5, 5))


def linear_model(seed: int = 0, classes: int = 2, pixels: int = 50) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(classes, pixels, generator=generator))
    return model


def network() -> nn.Module:
    """Build a small network with modules that an attack might disturb: batch norm, dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(36, 3)
    )


ATTACKS = {
    "fgsm": lambda model, x, y, ball: fgsm(model, x, y, ball),
    "pgd": lambda model, x, y, ball: pgd(model, x, y, ball, steps=5, step_size=ball.eps / 4, best_of_steps=True),
    "pgd random": lambda model, x, y, ball: pgd(
        model, x, y, ball, steps=5, step_size=ball.eps / 4, noise=noise(len(x))
    ),
    "pgd margin": lambda model, x, y, ball: pgd(model, x, y, ball, steps=3, step_size=ball.eps / 2, loss="margin"),
    "pgd batch statistics": lambda model, x, y, ball: pgd(
        model, x, y, ball, steps=2, step_size=ball.eps / 2, batch_statistics=True
    ),
    "interval_pgd": lambda model, x, y, ball: interval_pgd(model, x, y, ball, steps=8),
    "interval_pgd random": lambda model, x, y, ball: interval_pgd(model, x, y, ball, steps=8, noise=noise(len(x))),
}


@pytest.mark.parametrize("ball", BALLS, ids=str)
class TestBalls:
    def test_random_start_is_feasible_and_fills_the_ball(self, ball):
        x = torch.full((400, 2, 5, 5), 0.5)
        start = ball.random_start(x, noise(400))
        distance = ball.distance(start, x)
        assert distance.max() <= ball.eps + SLACK
        assert distance.mean() > 0.8 * ball.eps  # in 50 dimensions nearly all of the volume is far out
        assert start.min() >= 0
        assert start.max() <= 1
        assert (start - x).mean().abs() < 0.02 * ball.eps

    def test_projection_is_feasible_idempotent_and_identity_inside(self, ball):
        x = images()
        outside = x + noise(8, seed=3).normal((2, 5, 5))
        projected = ball.project(outside, x)
        assert ball.distance(projected, x).max() <= ball.eps + SLACK
        assert projected.min() >= 0
        assert projected.max() <= 1
        assert torch.allclose(ball.project(projected, x), projected, atol=1e-6)
        inside = (x + 0.3 * (projected - x)).clamp(0, 1)
        assert torch.equal(ball.project(inside, x), inside)

    @given(seed=st.integers(0, 10_000))
    @settings(max_examples=25, deadline=None)
    def test_no_sampled_feasible_point_is_nearer(self, ball, seed):
        x = images(4, seed)
        outside = x + noise(4, seed=seed + 1).normal((2, 5, 5))
        nearest = (ball.project(outside, x) - outside).flatten(1).norm(dim=1)
        for epoch in range(5):
            other = ball.random_start(x, noise(4, seed=seed + 2, epoch=epoch))
            toward = ball.project(x + 0.999 * (ball.project(outside, x) - x), x)
            for candidate in (other, toward, ball.project(0.9 * outside + 0.1 * other, x)):
                assert ((candidate - outside).flatten(1).norm(dim=1) >= nearest - 1e-4).all()

    def test_ascent_has_the_length_of_the_step(self, ball):
        x = torch.full((3, 2, 5, 5), 0.5)
        grad = noise(3, seed=5).normal((2, 5, 5))
        moved = ball.ascent(x, grad, 0.01)
        assert torch.allclose(ball.distance(moved, x), torch.full((3,), 0.01), rtol=1e-3)
        assert ((moved - x) * grad).sum() > 0

    def test_text_round_trip(self, ball):
        assert parse_threat(str(ball)) == ball

    def test_zero_gradient_does_not_break_the_step(self, ball):
        x = images()
        assert ball.ascent(x, torch.zeros_like(x), 0.1).isfinite().all()


def assert_untouched(model: nn.Module, attack: Callable[[], object]) -> None:
    """Check that an attack changes no mode, value, buffer, gradient (with and without some) or frozen parameter."""
    next(model.parameters()).requires_grad_(False)
    for grads in (False, True):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 3.0) if grads else None
        modes = [module.training for module in model.modules()]
        frozen = [parameter.requires_grad for parameter in model.parameters()]
        before = copy.deepcopy(model.state_dict())
        attack()
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert [parameter.requires_grad for parameter in model.parameters()] == frozen
        for parameter in model.parameters():
            assert bool((parameter.grad == 3).all()) if grads else parameter.grad is None


@pytest.mark.parametrize("attack", [*attacks.ATTACKS, "clean", "wrm itself"])
def test_measuring_leaves_the_model_as_it_was(attack, monkeypatch):
    """The model may have factorized weights or be in training mode."""
    for module, name in ((autoattack, "QUERIES"), (autoattack, "LONG_QUERIES"), (corner, "QUERIES")):
        monkeypatch.setattr(module, name, 20)
    spec = attacks.ATTACKS.get(attack)
    ball = Linf(0.1) if spec and spec.norms == ("linf",) else L2(0.5)
    model, some = factorize(network()).train(), Images(images(), torch.arange(8) % 3)
    model[3].eval()
    assert_untouched(
        model,
        {
            "clean": lambda: evaluation.clean_accuracy(model, some),
            "wrm itself": lambda: wrm(model, some.pixels, some.labels),
        }.get(attack, lambda: evaluation.robust_accuracy(model, some, ball, attack)),
    )


@pytest.mark.parametrize("ball", BALLS, ids=str)
@pytest.mark.parametrize("attack", ATTACKS)
class TestAttackContract:
    def test_stays_inside_ball_and_box_and_does_not_lower_the_loss(self, ball, attack):
        model, x = network().eval(), images()
        y = torch.arange(8) % 3
        adv = ATTACKS[attack](model, x, y, ball)
        assert ball.distance(adv, x).max() <= ball.eps + SLACK
        assert adv.min() >= 0
        assert adv.max() <= 1
        with torch.no_grad():
            before, after = (cross_entropy(model(z), y) for z in (x, adv))
        assert after.mean() > before.mean()
        if attack == "pgd":
            assert (after >= before - 1e-6).all()

    def test_leaves_the_model_as_it_was(self, ball, attack):
        model = network().train()
        model[1].eval()  # a user may have frozen one layer
        model(images(seed=9))
        assert_untouched(model, lambda: ATTACKS[attack](model, images(), torch.zeros(8, dtype=torch.int64), ball))


def test_interval_bounds_lead_to_units_that_are_off():
    """The wrong logit is 10 relu(mean pixel - 0.7), the right one 0.5: only bounds have a gradient at images of 0.5."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 1), nn.ReLU(), nn.Linear(1, 2)).requires_grad_(False)
    for parameter, value in zip(model.parameters(), (0.02, -0.7, [[0.0], [10.0]], [0.5, 0.0]), strict=True):
        parameter.copy_(torch.tensor(value).expand(parameter.shape))
    x, y = torch.full((3, 2, 5, 5), 0.5), torch.zeros(3, dtype=torch.int64)
    for eps, ends in ((0.3, True), (0.24, False)):  # the margin is 0 at 0.25
        ball = Linf(eps)
        assert torch.equal(pgd(model, x, y, ball, steps=20, step_size=0.05), x)
        adv = interval_pgd(model, x, y, ball, steps=40)
        assert bool((margin(model(adv), y) > 0).all()) is ends
        assert bool((ball.distance(adv, x) <= eps + SLACK).all())
    with pytest.raises(ValueError, match="expected steps >= 1, got 0"):
        interval_pgd(model, x, y, ball, steps=0)


@pytest.mark.parametrize(("ball", "dual"), [(Linf(0.05), 1), (L2(0.3), 2), (L1(0.4), math.inf)])
def test_linear_model_worst_loss_in_closed_form(ball, dual):
    """In the box's middle a linear margin grows by eps times the dual norm of the weight difference.

    The l1 attack moves the 5 % largest gradients together, here 2 of 50 pixels, so it reaches their mean.
    """
    model, x = linear_model(), torch.full((1, 2, 5, 5), 0.5)
    y = torch.tensor([0])
    weight = model[1].weight
    best = ball.eps * torch.linalg.vector_norm(weight[1] - weight[0], ord=dual)
    if isinstance(ball, L1):
        best = ball.eps * (weight[1] - weight[0]).abs().topk(2).values.mean()
    adv = pgd(model, x, y, ball, steps=200, step_size=ball.eps / 10, loss="margin", best_of_steps=True)
    gain = margin(model(adv), y) - margin(model(x), y)
    assert gain.item() <= best.item() * 1.0001
    assert gain.item() >= best.item() * 0.999


def test_linear_model_is_fooled_just_beyond_its_nearest_boundary_point():
    model, x = linear_model(seed=4), torch.full((1, 2, 5, 5), 0.5)
    y = model(x).argmax(1)
    weight = model[1].weight[1 - y] - model[1].weight[y]
    distance = (-margin(model(x), y) / weight.abs().sum()).item()
    for eps, fooled in ((0.98 * distance, False), (1.02 * distance, True)):
        adv = pgd(model, x, y, Linf(eps), steps=10, step_size=eps / 4)
        assert (model(adv).argmax(1) != y).item() == fooled


def test_wrm_solves_the_penalized_problem_of_a_linear_model():
    """max w <g, d> - |d|^2 / 2 has its maximum at d = w g; a tiny weight keeps the cross-entropy linear."""
    model, x = linear_model(), torch.full((2, 2, 5, 5), 0.5)
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
    y = torch.tensor([0, 1])
    adv = wrm(model, x, y, steps=7)
    z = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(cross_entropy(model(z), y).sum(), z)
    assert torch.allclose(adv - x, 1.3 * grad, rtol=2e-2, atol=1e-7)


def test_random_starts_are_keyed_by_example_not_by_batch():
    model, x, y = linear_model(), images(6), torch.zeros(6, dtype=torch.int64)
    arguments = {"steps": 1, "step_size": 1e-3}
    whole = pgd(model, x, y, Linf(0.1), noise=noise(6), **arguments)
    alone = Noise(torch.tensor([4]), seed=0, purpose="test")
    assert torch.equal(pgd(model, x[4:5], y[:1], Linf(0.1), noise=alone, **arguments)[0], whole[4])
    other = pgd(model, x, y, Linf(0.1), noise=noise(6, epoch=1), **arguments)
    assert (other != whole).float().mean() > 0.5


def test_mode_is_restored_after_an_error():
    model = network().train()

    def fails(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        pgd(model, images(), torch.zeros(8, dtype=torch.int64), Linf(0.1), steps=1, step_size=0.1, loss=fails)
    assert model.training
    with attack_mode(model):
        assert not model.training


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_an_attack_that_fails_leaves_the_model_as_it_was(batch_statistics):
    model = network().train()
    model[1].eval()

    def fails(logits, y):
        raise RuntimeError("stop")

    def attack():
        x, y = images(), torch.zeros(8, dtype=torch.int64)
        with pytest.raises(RuntimeError, match="stop"):
            pgd(model, x, y, Linf(0.1), steps=1, step_size=0.1, loss=fails, batch_statistics=batch_statistics)

    assert_untouched(model, attack)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("linf", "expected a threat like"),
        ("", "expected a threat like"),
        ("lnf:0.1", "did you mean 'linf'"),
        ("linf:", "expected a radius"),
        ("linf:8/0", "expected a radius"),
        ("linf:abc", "expected a radius"),
        ("linf:0", "finite eps > 0"),
        ("l2:-1", "finite eps > 0"),
        ("l2:nan", "finite eps > 0"),
        ("l1:inf", "finite eps > 0"),
    ],
)
def test_threat_text_that_makes_no_sense(text, message):
    with pytest.raises(ValueError, match=message):
        parse_threat(text)


@pytest.mark.parametrize(("ball", "limit"), [(Linf, 1.0), (L2, 28.0), (L1, 784.0)])
def test_eps_above_what_the_box_allows(ball, limit):
    check_threat(ball(limit), 784)
    with pytest.raises(ValueError, match="above the largest"):
        check_threat(ball(limit * 1.001), 784)


@pytest.mark.parametrize(
    ("settings", "message"), [({"steps": 0}, "steps >= 1, got 0"), ({"step_size": 0}, "step size > 0")]
)
def test_attack_arguments_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        pgd(
            linear_model(),
            images(),
            torch.zeros(8, dtype=torch.int64),
            Linf(0.1),
            **{"steps": 1, "step_size": 0.1, **settings},
        )
    with pytest.raises(ValueError, match="loss_weight > 0"):
        wrm(linear_model(), images(), torch.zeros(8, dtype=torch.int64), loss_weight=0)
    with pytest.raises(ValueError, match="steps >= 1"):
        wrm(linear_model(), images(), torch.zeros(8, dtype=torch.int64), steps=0)


def objective(name: str, **options: float) -> Objective:
    """Return a loss with these options, the others at their defaults."""
    spec = OBJECTIVES[name]
    return spec.build(spec.fill_options(name, options))


def recorded(perturb, results):
    """Return the attack, which also appends its images to a list."""

    def attack(x, y, **settings):
        results.append(perturb(x, y, **settings))
        return results[-1]

    return attack


class TestObjectives:
    def perturb(self, model, ball=None, **settings):
        return TrainingAttack(ball or Linf(0.1), steps=3, **settings).on(model, noise(8))

    @pytest.mark.parametrize("name", OBJECTIVES)
    def test_gradients_reach_every_weight_and_buffers_move_only_by_its_own_passes(self, name):
        model = network().train()
        y = torch.arange(8) % 3
        loss = objective(name)(model, images(), y, self.perturb(model))
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        assert model[1].num_batches_tracked == (2 if name in ("mixed", "mtl_ibp") else 1)
        assert model.training

    def test_values_are_their_definitions(self):
        model, x, y = linear_model(classes=3), images(), torch.arange(8) % 3
        perturb = self.perturb(model, random_start=False)
        adv = pgd(model, x, y, Linf(0.1), steps=3, step_size=0.2 / 3)
        clean, attacked = F.cross_entropy(model(x), y), F.cross_entropy(model(adv), y)
        assert torch.allclose(objective("natural")(model, x, y, perturb), clean)
        assert torch.allclose(objective("pgd_at")(model, x, y, perturb), attacked)
        assert torch.allclose(objective("mixed")(model, x, y, perturb), (clean + attacked) / 2)
        assert attacked > clean

    def test_trades_and_mart_are_their_definitions(self):
        model, x, y = linear_model(classes=3), images(), torch.arange(8) % 3
        perturb = self.perturb(model)
        p = model(x).softmax(1)
        adv = perturb(x, p.detach().log(), loss=kl_from)
        q = model(adv).softmax(1)
        divergence = (p * (p.log() - q.log())).sum(1)
        expected = F.cross_entropy(model(x), y) + 4 * divergence.mean()
        assert torch.allclose(trades(model, x, y, self.perturb(model), beta=4), expected, rtol=1e-4)
        q = model(self.perturb(model)(x, y)).softmax(1)
        right, rows = torch.arange(8), y
        wrong = q.clone()
        wrong[right, rows] = 0
        boosted = -(q[right, rows].log()) - (1 - wrong.amax(1)).log()
        weighted = (p * (p.log() - q.log())).sum(1) * (1 - p[right, rows])
        expected = boosted.mean() + 2 * weighted.mean()
        assert torch.allclose(mart(model, x, y, self.perturb(model), weight=2), expected, rtol=1e-3)

    def test_trades_moves_every_image_without_a_random_start(self):
        """At the clean images the divergence from their outputs has no gradient, but for rounding: some never move."""
        model, x = linear_model(classes=3), images(64)
        attack = TrainingAttack(Linf(0.1), steps=3, random_start=False)
        target = model(x).log_softmax(1).detach()
        moved = []
        trades(model, x, torch.arange(64) % 3, recorded(attack.on(model, noise(64)), moved), beta=4)
        without_noise = attack.on(model, noise(64))(x, target, loss=kl_from)
        assert (without_noise == x).flatten(1).all(1).any()
        assert (moved[0] - x).abs().flatten(1).amax(1).min() > 0.05
        assert (moved[0] - x).abs().max() <= 0.1 + 1e-6

    def test_certified_objectives_are_their_definitions(self):
        """On a linear model the bounds through the last layer are exact: every margin falls by eps |w_j - w_y|_1."""
        model, x, y = linear_model(classes=3), images(), torch.arange(8) % 3
        weight, z = model[1].weight, model(x)
        box = [F.relu(x - 0.1).flatten(1), (x + 0.1).clamp_max(1).flatten(1)]
        middle, radius = (box[0] + box[1]) / 2, (box[1] - box[0]) / 2
        rows = weight[None] - weight[y][:, None]
        worst = (rows @ middle[:, :, None])[:, :, 0] + (rows.abs() @ radius[:, :, None])[:, :, 0]
        worst = worst + model[1].bias - model[1].bias[y][:, None]
        clean, bounded = F.cross_entropy(z, y), F.cross_entropy(worst, y)
        l1 = 0.5 * weight.abs().sum()
        perturb = self.perturb(model)
        loss = objective("ibp", kappa=0.2, eps_factor=1.0, l1=0.5)(model, x, y, perturb)
        assert torch.allclose(loss, 0.2 * clean + 0.8 * bounded + l1, rtol=1e-4)
        attacked = F.cross_entropy(model(self.perturb(model)(x, y)), y)
        loss = objective("mtl_ibp", alpha=0.25, eps_factor=1.0)(model, x, y, self.perturb(model))
        assert torch.allclose(loss, 0.25 * bounded + 0.75 * attacked, rtol=1e-4)

    def test_kappa_falls_and_the_ball_grows_with_the_ramp(self):
        model, x, y = linear_model(classes=3), images(), torch.arange(8) % 3
        ramped = TrainingAttack(Linf(0.4), steps=1).on(model, noise(8), eps_scale=0.25)
        whole = TrainingAttack(Linf(0.1), steps=1).on(model, noise(8))
        at_quarter = objective("ibp", kappa=0.2)(model, x, y, ramped)
        assert torch.allclose(at_quarter, objective("ibp", kappa=0.8)(model, x, y, whole), rtol=1e-5)

    @pytest.mark.parametrize("name", ["trades", "mart"])
    def test_gradients_stay_finite_if_the_softmax_underflows(self, name):
        model = linear_model(classes=3)
        with torch.no_grad():
            model[1].weight.mul_(1e4)
        objective(name)(model, images(), torch.arange(8) % 3, self.perturb(model)).backward()
        assert model[1].weight.grad.isfinite().all()

    @pytest.mark.parametrize(("name", "option"), [(n, o) for n, spec in OBJECTIVES.items() for o in spec.options])
    def test_options_reach_the_loss(self, name, option):
        """A loss with another value of an option is another one, and the default is the one of the table."""
        torch.manual_seed(0)
        x, y = images(), torch.arange(8) % 3
        model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 6), nn.ReLU(), nn.Linear(6, 3))
        attack = TrainingAttack(Linf(0.1), steps=2)
        value = OBJECTIVES[name].options[option].default
        default, same, other = (
            objective(name, **options)(model, x, y, attack.on(model, noise(8), eps_scale=0.5))  # the ball is growing
            for options in ({}, {option: value}, {option: value / 2 if value else 0.01})
        )
        assert default == same
        assert not torch.allclose(default, other, rtol=1e-4)

    @pytest.mark.parametrize(("name", "option"), [("trades", "beta"), ("mart", "weight")])
    def test_the_loss_is_linear_in_the_weight_of_the_divergence(self, name, option):
        model, y = linear_model(classes=3), torch.arange(8) % 3
        values = {
            size: objective(name, **{option: size})(model, images(), y, self.perturb(model)) for size in (0, 1, 2)
        }
        assert values[1] > values[0]
        assert torch.allclose(values[2] - values[1], values[1] - values[0], rtol=1e-4)

    @pytest.mark.parametrize("name", OBJECTIVES)
    def test_options_are_filled(self, name):
        options = OBJECTIVES[name].options
        assert OBJECTIVES[name].fill_options(name, None) == {key: one.default for key, one in options.items()}
        for key in options:
            half = options[key].default / 2
            assert OBJECTIVES[name].fill_options(name, {key: half})[key] == half

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("natural", ("natural", {})),
            (" trades ", ("trades", {})),
            ("trades:beta=3", ("trades", {"beta": 3.0})),
            ("mart: weight = 0.5", ("mart", {"weight": 0.5})),
        ],
    )
    def test_objectives_as_text(self, text, expected):
        assert parse_objective(text) == expected

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("trade", "unknown objective 'trade'.*did you mean 'trades'"),
            ("trades:betta=3", "unknown option of objective 'trades' 'betta'.*did you mean 'beta'"),
            ("natural:beta=3", "objective 'natural' has no options, got 'beta'"),
            ("trades:beta=-1", "expected beta >= 0 for objective 'trades', got -1.0"),
            ("trades:beta=nan", "expected beta >= 0"),
            ("trades:beta=inf", "expected beta >= 0"),
            ("trades:beta", "an objective such as trades:beta=6"),
            ("trades:", "an objective such as trades:beta=6"),
            ("trades:beta=x", "an objective such as trades:beta=6"),
        ],
    )
    def test_objectives_that_are_refused(self, text, message):
        with pytest.raises(ValueError, match=message):
            parse_objective(text)

    @pytest.mark.parametrize("value", [True, "6", None])
    def test_options_are_numbers(self, value):
        with pytest.raises(ValueError, match="expected beta >= 0"):
            OBJECTIVES["trades"].check_options("trades", {"beta": value})

    @pytest.mark.parametrize("name", OBJECTIVES)
    def test_norms(self, name):
        norms = OBJECTIVES[name].norms
        for ball in BALLS:
            if norms is None or ball.name in norms:
                OBJECTIVES[name].check_threat(name, ball)
            else:
                with pytest.raises(ValueError, match=f"objective {name!r} is for {', '.join(norms)} threats"):
                    OBJECTIVES[name].check_threat(name, ball)

    def test_eps_scale_shrinks_the_ball(self):
        model, x = linear_model(), images()
        perturb = TrainingAttack(Linf(0.2), steps=4).on(model, noise(8), eps_scale=0.25)
        assert Linf(0.2).distance(perturb(x, torch.zeros(8, dtype=torch.int64)), x).max() <= 0.05 + 1e-6


def test_losses_in_closed_form():
    logits, y = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([0])
    assert margin(logits, y).item() == 2.0
    assert cross_entropy(logits, y).item() == pytest.approx(math.log(math.e**1 + math.e**3 + math.e**2) - 1)
    assert set(LOSSES) == {"ce", "dlr", "margin"}
    assert kl_from(logits, logits.log_softmax(1)).item() == pytest.approx(0, abs=1e-6)
