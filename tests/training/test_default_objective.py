"""What is taken if it is not named, the same in Python and in a configuration: objective and images per step."""

import pytest
import torch
from torch import nn

import atmc
from atmc.commands.config import parse
from atmc.data import Images
from atmc.models import build
from atmc.training import settings as module
from atmc.training.settings import choose_batch_size, choose_objective

CASES = [
    ("linf:0.2", {}, "ibp"),
    ("linf:0.1", {}, "ibp"),
    ("linf:0.0999", {}, "mixed"),
    ("linf:8/255", {}, "mixed"),
    ("l2:5", {}, "mixed"),
    ("l1:100", {}, "mixed"),
    ("linf:0.2", {"natural": True}, "natural"),
]
LONG = {"dense": 300}


class Scaled(nn.Module):
    """A network whose code needs a tensor, which interval bounds do not give it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits of images scaled by their largest pixel."""
        if not isinstance(x, torch.Tensor):
            raise RuntimeError("expected a tensor")
        return self.layer(x.flatten(1) / x.amax())


@pytest.mark.parametrize(("threat", "settings", "expected"), CASES)
def test_by_threat(few, lenet, threat, settings, expected):
    choice = choose_objective(lenet, few[0], atmc.parse_threat(threat), epochs=LONG, **settings)
    assert choice.name == expected
    assert choice.reason


def test_by_steps_of_the_dense_phase(few, lenet):
    """256 images are two steps of 128, or eight of 32: 600 steps are 300 or 75 epochs."""
    for epochs, batch_size, expected in ((300, 128, "ibp"), (299, 128, "mixed"), (75, 32, "ibp"), (74, 32, "mixed")):
        for given in (epochs, {"dense": epochs}):
            choice = choose_objective(lenet, few[0], atmc.Linf(0.2), epochs=given, batch_size=batch_size)
            assert choice.name == expected
    assert choice.reason == "training for proofs takes 600 steps or more, and the dense phase has 592"


def test_few_images_make_smaller_batches_and_so_enough_steps(few, lenet):
    assert [choose_batch_size(lenet, n) for n in (1, 2559, 2560, 5119, 5120)] == [32, 32, 64, 64, 128]
    assert choose_batch_size(build("resnet18", 10), 256) == 128  # batch norm
    for epochs, expected in ((75, "ibp"), (74, "mixed")):  # 256 images are eight steps of 32
        assert choose_objective(lenet, few[0], atmc.Linf(0.2), epochs=epochs).name == expected


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.GELU(), nn.Linear(16, 10)), "unknown operation 'gelu'"),
        (Scaled(), "expected a tensor"),
    ],
)
def test_a_network_without_bounds_is_trained_against_attacks(few, model, reason):
    choice = choose_objective(model, few[0], atmc.Linf(0.2), epochs=LONG)
    assert choice.name == "mixed"
    assert reason in choice.reason


def test_weights_that_come_trained_for_something_else(few):
    """Without dense epochs `ibp` is for weights that certify images already: here dark ones from bright ones."""
    values = torch.tensor([0.0, 1.0]).repeat(10)
    images = Images(values[:, None, None, None].expand(-1, 1, 4, 4).contiguous(), (values > 0.5).long())
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(-1, 16))
        model[1].bias.copy_(torch.tensor([8.0, -8.0]))  # the sum of the pixels, 0 or 16, against 8
    for eps, epochs, expected in (
        (0.49, {"dense": 0}, "ibp"),
        (0.51, {"dense": 0}, "mixed"),
        (0.51, 0, "mixed"),
        (0.51, LONG | {"l0": 0}, "mixed"),
        (0.51, {"dense": 600}, "ibp"),
    ):
        assert choose_objective(model, images, atmc.Linf(eps), epochs=epochs).name == expected, (eps, epochs)


def test_python_and_configurations_choose_alike(few, monkeypatch):
    """The default gives the file of the objective that it is said to be, byte for byte."""
    train, val = (part.take(slice(0, 60)) for part in few)
    monkeypatch.setattr(module, "FEWEST_STEPS", 2)
    settings = {"epochs": {"dense": 1, "l0": 0, "admm": 0, "tune": 0}, "attack_steps": 1, "batch_size": 30}
    files = []
    for given in ({}, {"objective": "ibp"}, {"objective": "mixed"}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        budget = atmc.Budget(ratio=0.3)
        files.append(atmc.compress(model, train, val, threat="linf:0.2", budget=budget, **settings, **given).data)
    assert files[0] == files[1] != files[2]
    run = {"model": "lenet", "data": "digits", "threat": "linf:0.2", "ratio": 0.1, "training": settings}
    checkpoint = {"checkpoint": "a.pt", "training": {}}  # has no dense phase
    for changes, expected in (
        ({}, "ibp"),
        ({"training": settings | {"batch_size": 60}}, "mixed"),
        (checkpoint, "mixed"),
        ({"threat": "l2:1"}, "mixed"),
        ({"method": "nap"}, "natural"),
    ):
        assert parse(run | changes).choose_objective(model, train).name == expected


def test_wrong_settings_are_refused(few, lenet):
    with pytest.raises(ValueError, match="unknown phase of epochs 'dens'"):
        choose_objective(lenet, few[0], atmc.Linf(0.2), epochs={"dens": 1})
    with pytest.raises(ValueError, match="expected batch_size >= 1, got 0"):
        choose_objective(lenet, few[0], atmc.Linf(0.2), batch_size=0)
