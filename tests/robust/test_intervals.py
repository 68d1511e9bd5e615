"""Interval bounds: no point of the box leaves them, for any operation; exact where they are; one error for the rest."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from atmc import models
from atmc.compress.factorize import factorize
from atmc.core.rng import Noise
from atmc.robust import intervals
from atmc.robust.intervals import (
    Interval,
    UnsupportedOperation,
    bound_logits,
    certified,
    imbalance,
    initialize_weights,
    looseness,
    margins,
)
from atmc.robust.objectives import OBJECTIVES, TrainingAttack
from atmc.robust.threats import L1, L2, Linf

THREATS = [Linf(0.1), L2(0.7), L1(2.0)]


class Function(nn.Module):
    """Images (n, 3, 6, 6) -> a convolution -> a function under test -> a linear layer of 4 logits."""

    def __init__(self, function, features):
        super().__init__()
        self.function = function
        self.conv, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.linear = nn.Linear(features, 4)

    def forward(self, x):
        return self.linear(torch.flatten(self.function(self.conv(x), self.other(x)), 1))


class Pair(nn.Module):
    def forward(self, x):
        return x, x


FUNCTIONS = {
    "relu": (lambda a, b: F.relu(a), 288),
    "relu method": (lambda a, b: a.relu(), 288),
    "relu in place": (lambda a, b: F.relu(a, inplace=True), 288),
    "leaky_relu": (lambda a, b: F.leaky_relu(a, 0.2), 288),
    "relu6": (lambda a, b: F.relu6(3 * a), 288),
    "hardtanh": (lambda a, b: F.hardtanh(a, -0.3, 0.2), 288),
    "sigmoid": (lambda a, b: torch.sigmoid(a), 288),
    "tanh": (lambda a, b: a.tanh(), 288),
    "softplus": (lambda a, b: F.softplus(a), 288),
    "elu": (lambda a, b: F.elu(a), 288),
    "clamp": (lambda a, b: a.clamp(-0.2, 0.3), 288),
    "max_pool2d": (lambda a, b: F.max_pool2d(a, 2), 72),
    "avg_pool2d": (lambda a, b: F.avg_pool2d(a, 3, padding=1), 32),
    "adaptive_avg_pool2d": (lambda a, b: F.adaptive_avg_pool2d(a, 2), 32),
    "adaptive_max_pool2d": (lambda a, b: F.adaptive_max_pool2d(a, 2), 32),
    "mean": (lambda a, b: a.mean((2, 3)), 8),
    "sum": (lambda a, b: a.sum(3), 48),
    "add": (lambda a, b: a + b, 288),
    "add in place": (lambda a, b: a.__iadd__(b), 288),
    "sub": (lambda a, b: a - b, 288),
    "neg": (lambda a, b: -a, 288),
    "constants": (lambda a, b: 1 - (2 * a - 0.5) / -4 + 1, 288),
    "per channel": (lambda a, b: a * torch.linspace(-1, 1, 8).view(8, 1, 1), 288),
    "cat": (lambda a, b: torch.cat((a, b), 1), 576),
    "chunk": (lambda a, b: a.chunk(2, 1)[0] - a.chunk(2, dim=1)[1], 144),
    "index": (lambda a, b: a[:, 1:3], 72),
    "permute": (lambda a, b: a.permute(0, 2, 3, 1).reshape(len(a), -1), 288),
    "transpose": (lambda a, b: a.transpose(2, 3).contiguous(), 288),
    "view": (lambda a, b: a.view(a.size(0), 8, -1).unsqueeze(1).squeeze(1), 288),
    "pad": (lambda a, b: F.pad(a, (1, 0, 0, 1)), 392),
    "dropout in evaluation": (lambda a, b: F.dropout(a, 0.5, False), 288),
}


def images(n: int = 4, shape: tuple[int, ...] = (3, 6, 6)) -> torch.Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))


def random_points(x, threat, count):
    """Points of the set: random ones, and for l-infinity corners, where affine functions are extreme."""
    for draw in range(count):
        noise = Noise(torch.arange(len(x)), seed=draw, purpose="points")
        yield threat.project(threat.random_start(x, noise), x)
        sign = 1.0 - 2.0 * noise.integers(2, x.shape[1:])
        yield threat.project(x + threat.eps * sign, x)


def network(name, seed=0):
    torch.manual_seed(seed)
    function, features = FUNCTIONS[name]
    return Function(function, features).eval()


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_point_leaves_the_bounds(name, threat):
    model, x = network(name), images()
    with torch.no_grad():
        logits = bound_logits(model, x, threat)
        assert torch.allclose(logits.clean, model(x), atol=1e-5)
        for point in random_points(x, threat, 20):
            assert (model(point) >= logits.lower - 1e-4).all()
            assert (model(point) <= logits.upper + 1e-4).all()
            for y in range(4):
                y = torch.full((4,), y)
                bounds = margins(logits, y)
                assert (model(point) - model(point).gather(1, y[:, None]) <= bounds + 1e-4).all()


@pytest.mark.parametrize("name", ["lenet", "resnet18", "wrn-10-1", "mobilenetv2"])
@pytest.mark.parametrize("training", [False, True])
def test_the_zoo_is_bounded_and_learns_from_the_bounds(name, training):
    channels = 1 if name == "lenet" else 3
    model = models.build(name, 10, seed=0, mean=[0.4] * channels, std=[0.3] * channels).train(training)
    x = images(2, tuple(model.atmc_spec["input_shape"]))
    logits = bound_logits(model, x, Linf(1e-3))
    assert (logits.lower <= logits.clean + 1e-3).all()
    assert (logits.clean <= logits.upper + 1e-3).all()
    F.cross_entropy(margins(logits, torch.tensor([1, 2])), torch.tensor([1, 2])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_a_linear_model_has_its_closed_form(threat):
    """Away from the box's walls the margin of a linear model falls by eps times the dual norm of the difference."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), 0.4 + 0.2 * images(5, (3, 2, 2))
    threat = threat.with_eps(0.05)
    y = torch.tensor([0, 1, 2, 0, 1])
    weight, z = model[1].weight, model(x)
    dual = {"linf": 1, "l2": 2, "l1": torch.inf}[threat.name]
    exact = z - z.gather(1, y[:, None]) + 0.05 * (weight[None] - weight[y][:, None]).norm(dual, dim=2)
    logits = bound_logits(model, x, threat)
    reach = 0.05 * weight.norm(dual, dim=1)
    assert torch.allclose(logits.upper, z + reach, atol=1e-5)
    assert torch.allclose(logits.lower, z - reach, atol=1e-5)
    if threat.name == "linf":  # the last layer's differences go through the box, not through the ball
        assert torch.allclose(margins(logits, y), exact, atol=1e-5)


def test_eps_of_nothing_gives_the_clean_logits():
    model, x = models.build("lenet", 10, seed=0).eval(), images(3, (1, 28, 28))
    logits = bound_logits(model, x, Linf(1e-12))
    assert torch.allclose(logits.lower, logits.clean, atol=1e-5)
    assert torch.allclose(logits.upper, model(x), atol=1e-5)


def test_the_last_layer_is_bounded_by_differences():
    model, x, y = network("relu"), images(), torch.tensor([0, 1, 2, 3])
    logits = bound_logits(model, x, Linf(0.05))
    apart = logits.upper - logits.lower.gather(1, y[:, None])
    assert (margins(logits, y) <= apart.scatter(1, y[:, None], 0.0) + 1e-5).all()
    assert (margins(logits, y) < apart - 1e-3).any()


def test_factors_are_bounded_through_the_composed_weight():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    before = bound_logits(plain, images(), Linf(0.1)).upper
    factors = factorize(plain, start="svd")
    after = bound_logits(factors, images(), Linf(0.1))
    assert torch.allclose(before, after.upper, atol=1e-4)
    after.upper.sum().backward()
    assert all(parameter.grad is not None for parameter in factors.parameters())


def test_batch_norm_counts_the_clean_images_once():
    model, x = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 2)).train(), images()
    other = nn.BatchNorm2d(3).train()
    normed = other(x)
    logits = bound_logits(model, x, Linf(0.1))
    assert torch.allclose(model[0].running_mean, other.running_mean)
    assert torch.allclose(model[0].running_var, other.running_var)
    assert model[0].num_batches_tracked == 1
    assert torch.allclose(logits.clean, model[2](normed.flatten(1)), atol=1e-5)


def test_certified_images_withstand_every_point():
    model, x = network("max_pool2d"), images(16)
    y, threat = model(x).argmax(1), Linf(0.01)
    holds = certified(model, x, y, threat)
    assert int(holds.sum()) > 0
    assert not certified(model, x, (y + 1) % 4, threat).any()
    for point in random_points(x, threat, 20):
        assert (model(point).argmax(1) == y)[holds].all()


def test_a_tie_is_not_certified():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    assert not certified(model, torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64), Linf(0.1)).any()


def test_a_wrong_rule_is_seen(monkeypatch):
    """The contract above catches a rule whose bounds are a tenth too narrow."""

    def narrow(inputs):
        shrunk = (0.1 * (inputs.upper - inputs.lower)).clamp_min(0)
        return Interval(inputs.clean.relu(), (inputs.lower + shrunk).relu(), (inputs.upper - shrunk).relu())

    monkeypatch.setitem(intervals.RULES, "relu", lambda inputs, inplace=False: narrow(inputs))
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.ReLU(), nn.Linear(4, 1, bias=False)), images()
    nn.init.eye_(model[1].weight)
    nn.init.ones_(model[1].bias)
    nn.init.ones_(model[3].weight)
    with torch.no_grad():
        upper = bound_logits(model, x, Linf(0.1)).upper
        assert any((model(point) > upper + 1e-4).any() for point in random_points(x, Linf(0.1), 20))


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (lambda a, b: F.gelu(a), "gelu"),
        (lambda a, b: torch.softmax(a, 1), "softmax"),
        (lambda a, b: a * b, "mul of two values"),
        (lambda a, b: 1 / a, "div by a value"),
        (lambda a, b: F.leaky_relu(a, -0.1), "leaky_relu with a negative slope"),
        (lambda a, b: a.cumsum(1), "cumsum"),
    ],
)
def test_an_operation_without_a_rule_is_named(function, word):
    with pytest.raises(UnsupportedOperation, match=f"cannot be bounded by intervals: unknown operation '{word}"):
        bound_logits(Function(function, 288), images(), Linf(0.1))


def test_a_model_that_returns_something_else_is_refused():
    with pytest.raises(ValueError, match=r"expected logits of shape \(4, classes\) from the model, got \(4, 3, 6, 6\)"):
        bound_logits(nn.Identity(), images(), Linf(0.1))
    with pytest.raises(ValueError, match="got tuple"):
        bound_logits(Pair(), images(), Linf(0.1))


class TestWarmUp:
    """The initialization and the penalties of Shi et al. 2021."""

    def test_initialization_keeps_the_width_of_bounds_through_deep_networks(self):
        def widths(initialize):
            torch.manual_seed(0)
            layers = [layer for _ in range(6) for layer in (nn.Linear(256, 256), nn.ReLU())]
            model = nn.Sequential(nn.Flatten(), *layers)
            if initialize:
                initialize_weights(model, seed=0)
            else:
                for layer in model:
                    if isinstance(layer, nn.Linear):
                        nn.init.kaiming_normal_(layer.weight)
            box = Interval.of(torch.rand(4, 1, 16, 16), Linf(0.01))
            with torch.no_grad():
                bounds = model(box)
            return float((bounds.upper - bounds.lower).mean() / (box.upper - box.lower).mean())

        assert 0.2 < widths(True) < 5
        assert widths(False) > 1e3

    def test_initialization_depends_on_the_seed_alone(self):
        models = [nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)) for _ in range(3)]
        for model, seed in zip(models, (1, 1, 2), strict=True):
            initialize_weights(model, seed)
        one, same, other = ([weight.detach().clone() for weight in model.parameters()] for model in models)
        assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
        assert not torch.equal(one[0], other[0])
        assert not one[1].any()  # biases
        assert not one[3].any()

    def test_penalties_of_known_bounds(self):
        def interval(lower, upper):
            ends = torch.tensor(lower), torch.tensor(upper)
            return Interval((ends[0] + ends[1]) / 2, *ends)

        images = interval([[0.0, 0.0]], [[0.1, 0.1]])  # width 0.1
        wide = interval([[-1.0, 1.0]], [[-0.6, 1.4]])  # width 0.4: a ratio of 1/4; centers -0.8 and 1.2
        narrow = interval([[1.0, 2.0]], [[1.1, 2.1]])  # width 0.1; nothing inactive
        assert float(looseness(images, [wide])) == pytest.approx(0.25)
        assert float(looseness(images, [wide, narrow])) == pytest.approx(0.125)
        assert float(imbalance([wide])) == 0  # sums 0.8 and 1.2; equal distances to the mean
        assert float(imbalance([narrow])) == pytest.approx(1.0)  # both ratios are 0
        skewed = interval([[-0.3, 1.0]], [[-0.1, 1.0]])  # centers -0.2 and 1: ratios 0.2 and 1
        assert float(imbalance([skewed])) == pytest.approx(0.3)
        assert float(looseness(images, [])) == float(imbalance([])) == 0

    def test_penalties_fall_to_zero_with_the_ramp(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
        x, y = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
        attack = TrainingAttack(Linf(0.1), steps=1)

        def price(scale):
            perturb = attack.on(model, Noise(torch.arange(4), seed=0, purpose="attack"), eps_scale=scale)
            losses = [OBJECTIVES["ibp"].build({**defaults, "regularizer": r})(model, x, y, perturb) for r in (1.0, 0.0)]
            return float((losses[0] - losses[1]).detach())

        defaults = OBJECTIVES["ibp"].fill_options("ibp", None)
        assert price(0.01) > price(0.5) > 0
        assert price(1.0) == 0
