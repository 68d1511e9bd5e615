"""Equalized layers: the same outputs, equal norms into and out of channels, and no layer that is pruned away."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from atmc import models
from atmc.compress.factorize import factorize
from atmc.training.equalize import equalize


class Residual(nn.Module):
    """Two convolutions around which the images of a third one are added; then a linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.outer = (nn.Conv2d(c, 4, 3, padding=1) for c in (1, 4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.relu(x + self.outer(F.relu(self.inner(x))))
        return self.head(x.mean((2, 3)))


class Own(nn.Module):
    """A layer of its own that calls F.linear with parameters of other names, and a weight that is used twice."""

    def __init__(self):
        super().__init__()
        self.w, self.shift = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16))
        self.twice, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = F.relu(F.linear(x.flatten(1), self.w, self.shift))
        return self.head(F.relu(self.twice(F.relu(self.twice(x)))))


def lenet():
    return models.build("lenet", num_classes=10)


MODELS = {
    "lenet": (
        lenet,
        (1, 28, 28),
        [("conv1.weight", "conv2.weight"), ("conv2.weight", "fc1.weight"), ("fc1.weight", "fc2.weight")],
    ),
    "average pooling": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.AvgPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4, bias=False)
        ),
        (1, 8, 8),
        [("0.weight", "4.weight")],
    ),
    "residual": (Residual, (1, 5, 5), [("inner.weight", "outer.weight")]),
    "batch norm between": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)),
        (1, 5, 5),
        [],
    ),
    "a ceiling between": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU6(), nn.Linear(8, 3)),
        (1, 4, 4),
        [],
    ),
    "own layers": (Own, (1, 4, 4), []),
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(4, 3)
        ),
        (1, 5, 5),
        [("2.weight", "4.weight")],
    ),
    "factorized": (lambda: factorize(lenet()), (1, 28, 28), []),
    "not traceable": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Softsign(), nn.Linear(8, 3)),
        (1, 4, 4),
        [],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_stay_and_norms_into_and_out_of_channels_become_equal(name):
    torch.manual_seed(0)
    build, shape, pairs = MODELS[name]
    model = build().eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.data.mul_(10.0 ** (index % 3 - 1))
    x = torch.rand(5, *shape)
    with torch.no_grad():
        before, weights = model(x), {key: value.clone() for key, value in model.state_dict().items()}
        assert equalize(model, shape) == pairs
        after = model(x)
    margins = (logits - logits[:, :1] for logits in (after, before))
    assert torch.allclose(*margins, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
    parameters = {key: value.detach() for key, value in model.named_parameters()}
    for first, second in pairs:
        into = parameters[first].flatten(1).norm(dim=1)
        out_of = parameters[second].view(len(parameters[second]), len(into), -1).transpose(0, 1).flatten(1).norm(dim=1)
        assert torch.allclose(into, out_of, rtol=1e-3)
    if not pairs:
        head = list(weights)[-2]
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items() if key != head)


def test_the_last_layer_is_centered_to_few_large_weights():
    """Most entries of a column are equal: they become zero, and the differences of logits stay."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5))
    with torch.no_grad():
        model[3].weight.copy_(torch.tensor([[0.7, -2.0, 1.0]] * 5))
        model[3].weight[2, 1] = 3.0
        x = torch.rand(6, 1, 2, 2)
        before = model(x).log_softmax(1)
        equalize(model, (1, 2, 2))
        assert torch.allclose(model(x).log_softmax(1), before, atol=1e-5)
    assert model[3].weight.count_nonzero() == 1
    assert model[3].weight[2, 1] != 0


def test_a_layer_of_small_weights_is_not_pruned_away():
    def kept(equalized):
        torch.manual_seed(0)
        model = lenet()
        model.conv1.weight.data.mul_(0.01)
        model.conv2.weight.data.mul_(100.0)
        if equalized:
            equalize(model, (1, 28, 28))
        weights = torch.cat([layer.weight.detach().abs().flatten() for layer in (model.conv1, model.conv2, model.fc1)])
        threshold = weights.topk(1000).values[-1]
        return int((model.conv1.weight.detach().abs() >= threshold).sum())

    assert kept(False) == 0
    assert kept(True) > 50


def test_channels_without_weights_stay_as_they_are():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model[1].weight.data[0] = 0
    model[3].weight.data[:, 1] = 0
    before = {key: value.clone() for key, value in model.state_dict().items()}
    equalize(model, (1, 2, 2))
    after = model.state_dict()
    for channel, same in ((0, True), (1, True), (2, False)):
        assert torch.equal(after["1.bias"][channel], before["1.bias"][channel]) == same
        assert torch.equal(after["1.weight"][channel], before["1.weight"][channel]) == same
        margins = (state["3.weight"][:, channel].diff() for state in (after, before))
        assert torch.allclose(*margins) == same
