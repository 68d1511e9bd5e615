"""Copies of modules, states and what wraps them."""

import pickle

import pytest
import torch
from torch import nn

from atmc.core.modules import copy_module, copy_state, protect_input, unwrap


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    ],
)
def test_wrappers_are_removed(wrap):
    inner = nn.Linear(2, 2)
    assert type(unwrap(wrap(inner))) is nn.Linear
    assert unwrap(inner) is inner


def test_a_copy_has_no_history():
    model = nn.Linear(3, 2)
    activation = model(torch.rand(4, 3))
    model.kept, model.more = activation, {"list": [activation.sum()]}
    copied = copy_module(model)
    assert not copied.kept.requires_grad
    assert torch.equal(copied.kept, activation)
    assert torch.equal(copied.more["list"][0], activation.sum())
    assert copied.weight is not model.weight
    assert torch.equal(copied.weight, model.weight)


def test_a_copy_keeps_what_is_shared_within():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    copied = copy_module(model)
    assert copied[1].weight is copied[0].weight


@torch.inference_mode()
def test_a_copy_can_be_trained_even_if_all_happened_in_inference_mode():
    model = nn.BatchNorm2d(2).requires_grad_(True)
    copied = copy_module(model)
    with torch.inference_mode(False):
        copied(torch.rand(2, 2, 3, 3)).square().sum().backward()
    assert copied.weight.grad is not None


def test_a_copied_state_keeps_the_versions_of_modules():
    state = nn.BatchNorm2d(2).state_dict()
    for copied in (copy_state(state), copy_state(copy_state(state), torch.neg)):
        assert copied._metadata == {"": {"version": 2}}
    assert torch.equal(copied["weight"], -state["weight"])
    assert copied["weight"].data_ptr() != state["weight"].data_ptr()


def test_a_protected_module_keeps_its_callers_input():
    class InPlace(nn.Module):
        def forward(self, x):
            return x.mul_(2)

    model = copy_module(protect_input(InPlace()))
    x = torch.ones(3, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0, 2.0]
    assert x.tolist() == [1.0, 1.0, 1.0]


def test_a_protected_module_can_be_sent_to_other_processes():
    assert pickle.loads(pickle.dumps(protect_input(nn.Linear(1, 1))))(torch.ones(1)).shape == (1,)
