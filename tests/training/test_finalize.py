"""After training: dead weights become zero, values become float16, and nothing else changes."""

import pytest
import torch
from torch import nn

from atmc.compress.constraints import NonzeroBudget
from atmc.compress.factorize import compressible_parameters, factorize
from atmc.evaluation.statistics import Accuracy
from atmc.models import build
from atmc.models.batch_norm import make_affine
from atmc.pack import artifact
from atmc.training.dead_weights import zero_dead_weights
from atmc.training.finalize import finalize, finalize_copy, smallest_model
from atmc.training.loop import assign


def network() -> nn.Module:
    """Build a network 4 -> 6 -> 3 with a unit that no layer reads, one that is never active, and a pruned one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[1].weight.abs_()  # images are not negative: these units are active
        model[1].bias.abs_()
        model[3].weight[:, 0] = 0.0  # no layer reads unit 0
        model[1].weight[1] = 0.0
        model[1].bias[1] = -0.5  # unit 1 is constant zero
        model[1].weight[2] = 0.0
        model[1].bias[2] = 0.5  # unit 2 is constant, but not zero
    return model


def test_only_dead_weights_become_zero():
    model, x = network(), torch.rand(64, 1, 2, 2)
    before, weight, bias = model(x), model[1].weight.detach().clone(), model[1].bias.detach().clone()
    reading = model[3].weight.detach().clone()
    assert zero_dead_weights(model, x) == 4 + 1 + 1  # weights and bias of unit 0, the bias of unit 1
    assert torch.allclose(model(x), before, atol=1e-6)
    assert not model[1].weight[0].any()
    assert torch.equal(model[1].weight[1:], weight[1:])
    assert model[1].bias[:2].tolist() == [0.0, 0.0]
    assert torch.equal(model[1].bias[2:], bias[2:])
    assert zero_dead_weights(model, x) == 3  # the weights that read unit 1, which is constant zero now
    assert torch.equal(model[3].weight[:, 2:], reading[:, 2:])
    assert zero_dead_weights(model, x) == 0


def test_a_unit_that_is_inactive_on_these_images_only_is_kept():
    model, x = network(), torch.rand(64, 1, 2, 2)
    with torch.no_grad():
        model[1].bias[4] = -100.0
    zero_dead_weights(model, x)
    assert model[1].bias[4] == -100.0
    assert model[1].weight[4].all()


def test_a_positive_constant_that_keeps_a_later_unit_off_stays_and_does_not_spare_the_others():
    """Unit 0 has no weights and a bias of 2, which keeps unit 0 of the next layer at -1: neither has a gradient."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 + torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)))
        model[1].weight[:2] = 0.0
        model[1].bias.copy_(torch.tensor([2.0, -1.0, 0.5]))  # unit 1 is constant zero
        model[3].weight[:, 0] = torch.tensor([-3.0, 0.0])
    x = torch.rand(64, 1, 2, 2)
    before = model(x)
    zero_dead_weights(model, x)
    assert model[1].bias[:2].tolist() == [2.0, 0.0]
    assert torch.allclose(model(x), before, atol=1e-6)


@pytest.mark.parametrize("name", ["lenet", "resnet18", "wrn-10-1", "mobilenetv2"])
def test_a_dense_network_has_no_dead_weights(name):
    model = make_affine(build(name, 10, seed=0)).eval()
    shape = (4, 1, 28, 28) if name == "lenet" else (4, 3, 32, 32)
    with torch.no_grad():
        for vector in (p for p in model.parameters() if p.dim() == 1):
            vector.add_(0.1)
    assert zero_dead_weights(model, torch.rand(shape)) == 0


def test_a_pruned_network_computes_the_same_without_its_dead_weights():
    model = factorize(build("lenet", 10, seed=0))
    tensors = compressible_parameters(model)
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(t.shape, generator=generator) for name, t in tensors.items() if name.endswith("V")}
    assign(tensors, {**{n: torch.zeros_like(t) for n, t in tensors.items()}, **NonzeroBudget(800).project(values)})
    x = torch.rand(100, 1, 28, 28)
    before = model.eval()(x)
    assert zero_dead_weights(model, x[:10]) > 50
    assert torch.allclose(model(x), before, atol=1e-5 * float(before.detach().abs().max()))


def test_a_weight_tensor_does_not_become_zero_altogether():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model[3].weight.zero_()
    weight = model[1].weight.detach().clone()
    zero_dead_weights(model, torch.rand(8, 1, 2, 2))
    assert torch.equal(model[1].weight, weight)


def test_finalizing_a_copy_does_not_change_the_model():
    model = build("resnet18", 10, seed=0).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    final = finalize_copy(model, torch.rand(4, 3, 32, 32))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p, p.half().float()) for p in final.parameters())


def test_the_smallest_model_has_one_nonzero_in_every_layer():
    small = smallest_model(build("lenet", 10, seed=0), ())
    counts = [int(p.count_nonzero()) for p in small.parameters() if p.dim() >= 2]
    assert counts == [1, 1, 1, 1]
    assert all(bool(p.all()) for p in small.parameters() if p.dim() == 1)
    biases = sum(2 * p.numel() for p in small.parameters() if p.dim() == 1)
    assert 0.85 * biases < len(artifact.to_bytes(small)) < biases + 250


@pytest.mark.parametrize(
    ("lost", "gained", "fp16"),
    [
        ({"clean": 0, "robust": 0}, 0, True),
        ({"clean": 1, "robust": 0}, 0, True),  # a single image of 200
        ({"clean": 9, "robust": 8}, 7, True),  # as many turn one way as the other
        ({"clean": 9, "robust": 0}, 0, False),
        ({"clean": 0, "robust": 9}, 0, False),
    ],
)
def test_values_become_float16_unless_that_costs_accuracy(lost, gained, fp16):
    def validate(model):
        rounded = all(torch.equal(value, value.half().float()) for value in model.state_dict().values())
        accuracies = []
        for name in ("clean", "robust"):
            right = torch.arange(200) < 150
            if rounded:
                right[: lost[name]] = False
                right[150 : 150 + gained] = True
            accuracies.append(Accuracy.of(right))
        return tuple(accuracies)

    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) / 3 + 0.1)
    options = {"exclude": (), "bits": None, "score": lambda clean, robust: 0.0, "reestimate": lambda model: False}
    model, choices = finalize(model, validate=validate, rate=None, probe=torch.rand(4, 1, 2, 2), **options)
    assert choices.fp16 is fp16
    assert all(torch.equal(p, p.half().float()) for p in model.parameters()) is fp16
    assert choices.robust.accuracy == (validate(model)[1]).accuracy
    assert choices.unrounded[0].accuracy == 0.75
