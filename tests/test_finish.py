"""What is decided after training: what has no effect is dropped, and nothing else."""

import torch
from torch import nn

from atmc.finish import drop_idle, smallest_model, to_final
from atmc.models import build
from atmc.pack import artifact


def network() -> nn.Module:
    """4 -> 6 -> 3 with a unit that nothing reads, one that is never awake, and one whose weights are pruned."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[1].weight.abs_()  # images are not negative: these units are awake
        model[1].bias.abs_()
        model[3].weight[:, 0] = 0.0  # nobody reads unit 0
        model[1].weight[1] = 0.0
        model[1].bias[1] = -0.5  # unit 1 is constant zero
        model[1].weight[2] = 0.0
        model[1].bias[2] = 0.5  # unit 2 is constant, but not zero
    return model


def test_only_what_has_no_effect_is_dropped():
    model, x = network(), torch.rand(64, 1, 2, 2)
    before, bias = model(x), model[1].bias.detach().clone()
    assert drop_idle(model, x) == 2
    assert torch.equal(model(x), before)
    assert model[1].bias[:2].tolist() == [0.0, 0.0]
    assert torch.equal(model[1].bias[2:], bias[2:])
    assert drop_idle(model, x) == 0


def test_measuring_leaves_the_model_alone():
    model = build("resnet18", 10, seed=0).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    final = to_final(model, torch.rand(4, 3, 32, 32))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p, p.half().float()) for p in final.parameters())


def test_the_smallest_file_has_something_in_every_layer():
    small = smallest_model("atmc", build("lenet", 10, seed=0), ())
    counts = [int(p.count_nonzero()) for p in small.parameters() if p.dim() >= 2]
    assert counts == [1, 1, 1, 1]
    assert all(bool(p.all()) for p in small.parameters() if p.dim() == 1)
    biases = sum(2 * p.numel() for p in small.parameters() if p.dim() == 1)
    assert 0.85 * biases < len(artifact.to_bytes(small)) < biases + 250
