"""What entries are ranked by: effects on W and mean squared gradients, against their definitions."""

import pytest
import torch
from torch import nn

from atmc.compress.constraints import NonzeroBudget
from atmc.compress.factorize import compressible_parameters, factorize
from atmc.compress.metric import FEWEST_STEPS, SILENT_STEPS, Metric, Moments, measure_metric


def factorized(form: str) -> nn.Linear:
    """Return a linear layer in a form, with random factors."""
    torch.manual_seed(0)
    shape = (5, 7) if form == "right" else (7, 5)  # torch's order: in, out
    model = factorize(nn.Linear(*shape), start="svd" if form == "svd" else "identity")
    with torch.no_grad():
        for parameter in compressible_parameters(model).values():
            parameter.normal_()
    return model


def moments_of(model: nn.Module, seed: int = 0, steps: int = FEWEST_STEPS) -> Moments:
    """Return the moments after some steps of random gradients."""
    generator, moments = torch.Generator().manual_seed(seed), Moments()
    tensors = compressible_parameters(model)
    for _ in range(steps):
        for tensor in tensors.values():
            tensor.grad = torch.randn(tensor.shape, generator=generator)
        moments.update(tensors)
    return moments


def settings(**changed):
    return {"sensitivity": 0.0, "effects": True, "weighted": False} | changed


@pytest.mark.parametrize("form", ["left", "right", "svd"])
def test_an_effect_is_the_size_of_the_change_of_w_without_the_entry(form):
    model = factorized(form)
    tensors = compressible_parameters(model)
    scores = measure_metric(model, tensors, Moments(), **settings()).scores(tensors)
    with torch.no_grad():
        w = model.weight.clone()
        for name, tensor in tensors.items():
            for index in range(tensor.numel()):
                position = tuple(torch.unravel_index(torch.tensor(index), tensor.shape))
                value = tensor[position].clone()
                tensor[position] = 0
                assert torch.allclose((model.weight - w).norm(), scores[name][position], rtol=1e-4, atol=1e-6)
                tensor[position] = value


def test_by_magnitude_the_scores_are_magnitudes():
    model = factorized("left")
    tensors = compressible_parameters(model)
    scores = measure_metric(model, tensors, moments_of(model), **settings(effects=False)).scores(tensors)
    assert all(torch.equal(scores[name], tensor.abs()) for name, tensor in tensors.items())


def test_full_sensitivity_does_not_depend_on_the_scale_of_a_layer():
    """If a weight is multiplied by c its gradients are divided by c, and |x| sqrt(v) stays."""
    plain, scaled = nn.Linear(4, 3), nn.Linear(4, 3)
    scaled.weight.data.copy_(plain.weight.data * 100)
    moments = moments_of(plain)
    tensors, larger = compressible_parameters(plain), compressible_parameters(scaled)
    smaller_gradients = Moments({"weight": moments.sums["weight"] / 100**2}, dict(moments.steps), dict(moments.silent))
    one = measure_metric(plain, tensors, moments, **settings(sensitivity=1.0)).scores(tensors)
    two = measure_metric(scaled, larger, smaller_gradients, **settings(sensitivity=1.0)).scores(larger)
    assert torch.allclose(one["weight"], two["weight"], rtol=1e-4)


def test_an_entry_that_the_loss_never_sees_goes_first():
    model = nn.Linear(4, 3)
    tensors = compressible_parameters(model)
    moments = moments_of(model)
    with torch.no_grad():
        model.weight.fill_(0.5)
        model.weight[1, 2] = 0.9
    moments.sums["weight"][1, 2] = 0
    metric = measure_metric(model, tensors, moments, **settings(sensitivity=0.1))
    assert NonzeroBudget(11).project(tensors, metric)["weight"][1, 2] == 0
    assert NonzeroBudget(11).project(tensors)["weight"][1, 2] != 0


def test_units_that_are_off_for_many_steps_leave_first_and_no_output_changes():
    """Unit 0 is off for every image in [0, 1], and nothing leads to unit 1; both would win by their size."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    tensors, moments = compressible_parameters(model), Moments()
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0] = -5.0, -0.1
        model[0].weight[1], model[0].bias[1], model[2].weight[:, 1] = 0.0, 0.0, 7.0
        model[0].bias[2:] = 1.0
    live = model[0].weight[2:].numel() + model[2].weight[:, 2:].numel()

    def pruned() -> dict[str, torch.Tensor]:
        metric = measure_metric(model, tensors, moments, **settings(sensitivity=0.1))
        everything = NonzeroBudget(100).project(tensors, metric)
        assert all(torch.equal(everything[name], tensor) for name, tensor in tensors.items())
        return NonzeroBudget(live).project(tensors, metric)

    for x in torch.rand(SILENT_STEPS, 8, 3, generator=torch.Generator().manual_seed(0)):
        assert pruned()["2.weight"][:, 1].all()
        model.zero_grad()
        model(x).square().sum().backward()
        moments.update(tensors)
    kept = pruned()
    assert not kept["0.weight"][:2].any()
    assert not kept["2.weight"][:, :2].any()
    assert torch.equal(kept["0.weight"][2:], model[0].weight[2:])
    before = model(x)
    model.load_state_dict(kept, strict=False)
    assert torch.equal(model(x), before)


def test_moments_count_only_when_they_cover_every_tensor():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    tensors = compressible_parameters(model)
    young = moments_of(model, steps=FEWEST_STEPS - 1)
    asked = settings(sensitivity=0.5, weighted=True)
    assert measure_metric(model, tensors, young, **asked) == Metric()
    grown = moments_of(model)
    metric = measure_metric(model, tensors, grown, **asked)
    assert set(metric.ranking) == set(metric.rounding) == set(tensors)
    grown.keep({"0.weight": tensors["0.weight"]})
    assert measure_metric(model, tensors, grown, **asked) == Metric()


def test_moments_are_adams_and_survive_a_round_trip():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters())
    tensors, moments = {"weight": model.weight}, Moments()
    for step in range(5):
        optimizer.zero_grad()
        (model(torch.rand(8, 4, generator=torch.Generator().manual_seed(step))) ** 2).sum().backward()
        moments.update(tensors)
        optimizer.step()
    assert torch.allclose(moments.sums["weight"], optimizer.state[model.weight]["exp_avg_sq"], rtol=1e-5)
    again = Moments.restored(moments.state())
    assert torch.equal(again.sums["weight"], moments.sums["weight"])
    assert torch.equal(again.silent["weight"], moments.silent["weight"])
    assert again.steps == {"weight": 5}
    assert Moments.restored({}) == Moments()


def test_rounding_weighs_errors_by_the_root_of_the_mean_squared_gradient():
    model = nn.Linear(4, 3)
    moments = moments_of(model)
    metric = measure_metric(model, {"weight": model.weight}, moments, **settings(weighted=True))
    assert torch.allclose(metric.rounding["weight"].square(), moments.sums["weight"])


def test_a_frozen_parameter_is_not_silent():
    frozen, live = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
    live.grad = torch.zeros(2)
    moments = Moments()
    for _ in range(SILENT_STEPS):
        moments.update({"frozen": frozen, "live": live})
    assert moments.silent["frozen"].tolist() == [0, 0]
    assert moments.silent["live"].tolist() == [SILENT_STEPS] * 2
