"""Figures: intervals against closed forms, worst cases, and independence of batches."""

import math

import pytest
import torch
from torch import nn

from atmc.core.rng import Noise, derived_seed, permutation
from atmc.data import Images
from atmc.evaluation import corner
from atmc.evaluation.accuracy import clean_accuracy, predictions, robust_accuracy
from atmc.evaluation.statistics import Accuracy, wilson
from atmc.robust.attacks import PgdSettings
from atmc.robust.threats import L1, L2, Linf


def threshold_model() -> nn.Module:
    """Build a model of class 1 if the first pixel is above 0.5: linf fools it if the pixel is within eps."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].weight[1, 0] = 10.0
        model[1].bias.copy_(torch.tensor([5.0, 0.0]))
    return model


def ramp(n: int = 100) -> Images:
    """Build images with first pixels 0.005, 0.015 ... 0.995, and the right labels."""
    pixels = torch.full((n, 1, 2, 2), 0.5)
    pixels[:, 0, 0, 0] = (torch.arange(n) + 0.5) / n
    return Images(pixels, (pixels[:, 0, 0, 0] > 0.5).long())


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "pgd-strong"])
def test_robust_accuracy_in_closed_form(attack):
    result = robust_accuracy(threshold_model(), ramp(), Linf(0.1), attack)
    assert result.accuracy == pytest.approx(0.8)  # the 20 within 0.1 of the threshold are fooled
    assert result.n == 100
    assert result.settings["eps"] == 0.1
    assert [i for i, right in enumerate(result.right.tolist()) if not right] == list(range(40, 60))


def test_clean_and_first_n():
    assert clean_accuracy(threshold_model(), ramp()).accuracy == 1.0
    wrong_first = Images(ramp().pixels, (ramp().pixels[:, 0, 0, 0] > 0.5).long().index_fill(0, torch.arange(5), 1))
    few = clean_accuracy(threshold_model(), wrong_first, n=10)
    assert (few.accuracy, few.n, few.right.tolist()) == (0.5, 10, [False] * 5 + [True] * 5)
    assert clean_accuracy(threshold_model(), wrong_first, n=1000).n == 100
    assert robust_accuracy(threshold_model(), ramp(), Linf(0.1), n=45).accuracy == pytest.approx(40 / 45)
    assert robust_accuracy(threshold_model(), ramp(), Linf(0.1), n=1000).n == 100


@pytest.mark.parametrize(
    ("attack", "ball"), [("pgd-strong", L2(0.2)), ("interval-pgd", Linf(0.1)), ("corner", Linf(0.1))]
)
def test_batches_do_not_matter(attack, ball, monkeypatch):
    monkeypatch.setattr(corner, "QUERIES", 12)
    torch.manual_seed(5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
    x = Noise(torch.arange(60), seed=0, purpose="x").uniform((1, 2, 2))
    images = Images(x, predictions(model, x))
    one = robust_accuracy(model, images, ball, attack, batch_size=60, keep=True)
    two = robust_accuracy(model, images, ball, attack, batch_size=7, keep=True)
    assert torch.equal(one.right, two.right)
    assert torch.allclose(one.adv, two.adv, atol=1e-6)
    assert 0 < one.accuracy < 1


def test_strong_is_never_weaker_than_pgd():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    images = Images(torch.rand(80, 1, 2, 2), torch.arange(80) % 2)
    for ball in (Linf(0.1), L2(0.2), L1(0.3)):
        weak, strong = (robust_accuracy(model, images, ball, name).right for name in ("pgd", "pgd-strong"))
        assert not (strong & ~weak).any()


def test_wrm_reports_its_distances():
    settings = robust_accuracy(threshold_model(), ramp(), Linf(0.1), "wrm").to_json()
    assert settings["maximizes"] == "loss_weight * loss - |x' - x|^2 / 2"
    assert settings["loss_weight"] == 1.3
    assert "eps" not in settings
    assert 0 < settings["mean_linf"] <= settings["mean_l2"] + 1e-9


def test_settings_of_the_papers_attack():
    settings = robust_accuracy(threshold_model(), ramp(), Linf(76 / 255)).to_json()
    assert settings["steps"] == 16
    assert settings["step_size"] == pytest.approx(1.25 * 76 / 255 / 16)
    assert settings["random_start"] is False
    assert PgdSettings.paper(Linf(4 / 255)).steps == 7
    assert PgdSettings.paper(L2(0.05)).steps == 16


def test_an_output_that_is_not_a_number_is_no_class():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].bias[0] = torch.nan
    assert predictions(model, torch.zeros(3, 1, 2, 2)).tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("name", "settings", "message"), [("pdg", {}, "did you mean 'pgd'"), ("pgd", {"n": 0}, "n >= 1")]
)
def test_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        robust_accuracy(threshold_model(), ramp(), Linf(0.1), name, **settings)


class TestWilson:
    @pytest.mark.parametrize(("successes", "n"), [(0, 10), (5, 10), (9000, 10_000), (10, 10)])
    def test_bounds_solve_the_score_equation(self, successes, n):
        for bound in wilson(successes, n):
            if 1e-9 < bound < 1 - 1e-9:
                z = abs(successes / n - bound) / math.sqrt(bound * (1 - bound) / n)
                assert z == pytest.approx(1.959964, rel=1e-6)

    def test_extremes(self):
        assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-12)
        assert wilson(10, 10)[1] == pytest.approx(1)
        with pytest.raises(ValueError, match="at least 1"):
            wilson(0, 0)

    def test_json(self):
        right = torch.tensor([True] * 3 + [False])
        assert Accuracy.of(right, eps=0.1).to_json() == {
            "accuracy": 0.75,
            "n": 4,
            "ci95": [round(bound, 4) for bound in wilson(3, 4)],
            "eps": 0.1,
        }


class TestNoise:
    def noise(self, n=2000, **keys) -> Noise:
        return Noise(torch.arange(n), **{"seed": 0, "purpose": "test", **keys})

    def test_moments(self):
        uniform, normal = self.noise().uniform((50,)), self.noise().normal((50,))
        assert uniform.mean() == pytest.approx(0.5, abs=0.005)
        assert uniform.var() == pytest.approx(1 / 12, abs=0.002)
        assert uniform.min() >= 0
        assert uniform.max() < 1
        assert normal.mean() == pytest.approx(0, abs=0.02)
        assert normal.std() == pytest.approx(1, abs=0.02)
        assert self.noise().exponential((50,)).mean() == pytest.approx(1, abs=0.02)
        counts = self.noise().integers(7, (70,)).flatten().bincount()
        assert len(counts) == 7
        assert (counts - 20_000).abs().max() < 5 * math.sqrt(20_000)

    def test_streams_are_unrelated(self):
        table = torch.stack(
            [
                self.noise(1).uniform((4000,))[0],
                self.noise(1, seed=1).uniform((4000,))[0],
                self.noise(1, epoch=1).uniform((4000,))[0],
                self.noise(1, purpose="other").uniform((4000,))[0],
                self.noise(2).uniform((4000,))[1],
            ]
        )
        correlations = torch.corrcoef(table) - torch.eye(5)
        assert correlations.abs().max() < 5 / math.sqrt(4000)

    def test_each_call_continues_the_stream(self):
        noise = self.noise(3)
        assert not torch.equal(noise.uniform((5,)), noise.uniform((5,)))
        assert len(noise) == 3

    def test_permutation(self):
        order = permutation(1000, seed=0, purpose="test")
        assert torch.equal(order.sort().values, torch.arange(1000))
        assert torch.equal(order, permutation(1000, seed=0, purpose="test"))
        assert not torch.equal(order, permutation(1000, seed=0, purpose="test", epoch=1))

    def test_refused_and_seeds(self):
        with pytest.raises(ValueError, match=r"high < 2\*\*31"):
            self.noise().integers(0, (1,))
        assert derived_seed(0, 1) != derived_seed(1, 0)
        assert 0 <= derived_seed(2**40, 5) < 2**63
