"""Batch norm in files and back in training: a scale and a shift, and statistics again."""

import pytest
import torch
from torch import nn

from atmc.data import Images
from atmc.models.batch_norm import is_affine, make_affine
from atmc.training.batch_norm import restore_batch_norm


def network() -> nn.Module:
    """Build a network with two batch norms, one before an activation, with random statistics, in evaluation mode."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 8), nn.BatchNorm1d(8)
    )
    for norm in (model[1], model[5]):
        with torch.no_grad():
            norm.weight.uniform_(0.2, 3)
            norm.bias.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.3, 4)
    return model.eval()


IMAGES = Images(torch.randint(0, 256, (300, 1, 8, 8), dtype=torch.uint8), torch.arange(300) % 8)


def test_scale_and_shift_compute_the_same():
    model, x = network(), torch.rand(50, 1, 8, 8)
    before = model(x)
    assert not is_affine(model)
    assert is_affine(make_affine(model))
    assert torch.allclose(model(x), before, atol=1e-5)
    assert torch.equal(model[1].running_mean, torch.zeros(6))


def test_restored_norms_compute_the_same_and_know_their_inputs():
    model, x = make_affine(network()), torch.rand(50, 1, 8, 8)
    before = model(x)
    assert restore_batch_norm(model, IMAGES, n=300)
    assert torch.allclose(model(x), before, atol=1e-5)
    inputs = model[0](IMAGES.float_pixels(torch.arange(300)))
    assert torch.allclose(model[1].running_mean, inputs.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(model[1].running_var, inputs.var((0, 2, 3), correction=0), rtol=1e-4)
    model.train()  # the whole set as one batch has the statistics that were restored
    whole = IMAGES.float_pixels(torch.arange(300))
    trained = model(whole)
    assert torch.allclose(trained, model.eval()(whole), atol=0.05)


def test_without_restoring_training_mode_computes_something_else():
    model, x = make_affine(network()), IMAGES.float_pixels(torch.arange(300))
    before = model(x)
    assert (model.train()(x) - before).abs().mean() > 0.2


@pytest.mark.parametrize("model", [network(), nn.Sequential(nn.Flatten(), nn.Linear(64, 2))])
def test_other_models_are_left_alone(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not restore_batch_norm(model, IMAGES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
