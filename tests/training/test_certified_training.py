"""Training for interval bounds: its defaults, what it validates by, what it refuses, and that it certifies images."""

import json

import pytest
import torch
from torch import nn

import atmc
from atmc.commands.config import parse
from atmc.commands.run import run
from atmc.evaluation.accuracy import clean_accuracy, interval_accuracy
from atmc.training.loop import StepDone
from atmc.training.settings import default_recipe


def tiny() -> nn.Module:
    """Build a network for 28x28 digits that trains in a second."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))


@pytest.mark.parametrize("objective", ["ibp", "mtl_ibp"])
def test_defaults_of_certified_objectives(objective):
    recipe = default_recipe(tiny(), objective=objective, epochs={"dense": 12})
    assert (recipe.eps_ramp, recipe.clip_norm) == (6.0, 10.0)
    assert default_recipe(tiny(), objective=objective, eps_ramp=0.0, clip_norm=None).clip_norm is None
    assert default_recipe(tiny(), objective="pgd_at").clip_norm is None


def test_intervals_certify_what_was_trained_for_them(digits):
    """A small network certifies most of what it classifies at a small radius, through every phase and a codebook."""
    settings = {"epochs": {"dense": 20, "l0": 4, "admm": 2, "tune": 1}, "batch_size": 32, "learning_rate": 5e-3}
    result = atmc.compress(
        tiny(),
        digits.train,
        digits.val,
        threat="linf:0.05",
        budget=atmc.Budget(ratio=0.3, bits=4),
        objective="ibp",
        **settings,
    )
    threat = atmc.Linf(0.05)
    certified = interval_accuracy(result.model, digits.test, threat)
    assert certified.accuracy > 0.6
    assert not (certified.right & ~clean_accuracy(result.model, digits.test).right).any()
    untrained = interval_accuracy(tiny().eval(), digits.test, threat)
    assert certified.accuracy > untrained.accuracy + 0.3


def test_validation_is_by_intervals(few, tmp_path):
    config = {"model": "lenet", "data": "digits", "threat": "linf:0.1", "ratio": 0.05, "limit": 64, "checks": False}
    config |= {"eval_n": 5, "precision": "fp32", "threads": 1}
    config["training"] = {"objective": "ibp", "epochs": 1, "val_n": 20, "attack_steps": 1}
    list(run(parse(config), tmp_path / "run"))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["validation"]["interval"]["n"] == metrics["validation"]["before_rounding"]["interval"]["n"] == 20
    assert "quick" not in metrics["validation"]
    assert metrics["objective"] == "ibp"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "certified by intervals" in page
    assert "under the attack</td>" not in page


def test_a_network_without_bounds_is_refused_before_training(few):
    train, val = few
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.GELU(), nn.Linear(16, 10))
    with pytest.raises(ValueError, match="cannot be bounded by intervals: unknown operation 'gelu'"):
        atmc.compress(model, train, val, threat="linf:0.1", budget=atmc.Budget(ratio=0.5), objective="ibp")


def test_gradients_are_clipped(few, monkeypatch):
    """The gradient that the optimizer sees is no longer than clip_norm, and the same without it."""
    train, val = few
    lengths = []

    class Watching(torch.optim.AdamW):
        def step(self, closure=None):
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            lengths.append(float(torch.stack([grad.norm() for grad in grads]).norm()))
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Watching)
    for clip_norm in (None, 0.01):
        events = []
        atmc.compress(
            tiny(),
            train,
            val,
            threat="linf:0.1",
            budget=atmc.Budget(ratio=1.0),
            method="al0",
            objective="natural",
            epochs={"dense": 1, "l0": 0, "tune": 0},
            clip_norm=clip_norm,
            on_event=events.append,
        )
        assert any(isinstance(event, StepDone) for event in events)
        if clip_norm is None:
            assert min(lengths) > 0.01
            lengths.clear()
    assert max(lengths) <= 0.01 + 1e-6
