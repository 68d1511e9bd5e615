"""Modules of users in files: wrapped, versioned, with tied weights, with state that is no tensor."""

import pytest
import torch
from torch import nn

import atmc


class Versioned(nn.Module):
    """Asks for its version when it is loaded, as torchvision's MNASNet does."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        return self.head(x.flatten(1))

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version") != 2:
            raise ValueError(f"version should be 2 instead of {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.head(torch.relu(self.two(torch.relu(self.one(x.flatten(1))))))


class ExtraState(Versioned):
    def get_extra_state(self):
        return {"scale": 1}

    def set_extra_state(self, state):
        pass


X, Y = torch.rand(24, 1, 8, 8), torch.arange(24) % 4


def save_and_load(model, build, path):
    atmc.save(model, path, input_shape=(1, 8, 8), classes=4)
    return atmc.load(path, factory=lambda num_classes: build())


def test_a_module_that_asks_for_its_version(tmp_path):
    model = Versioned().eval()
    assert torch.allclose(save_and_load(model, Versioned, tmp_path / "a.atmc")(X), model(X))
    result = atmc.compress(model, (X, Y), (X, Y), threat="linf:0.03", budget=atmc.Budget(ratio=0.3), epochs=1)
    assert result.model(X).shape == (24, 4)


def test_weights_that_are_tied_stay_tied(tmp_path):
    model = Tied().eval()
    loaded = save_and_load(model, Tied, tmp_path / "a.atmc")
    assert loaded.two.weight is loaded.one.weight
    assert torch.allclose(loaded(X), model(X))


def test_a_file_of_untied_weights_unties_them(tmp_path):
    model = Tied().eval()
    model.two.weight = nn.Parameter(torch.rand(64, 64))
    assert torch.allclose(save_and_load(model, Tied, tmp_path / "a.atmc")(X), model(X))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
    ],
)
def test_a_wrapped_model_of_the_zoo_is_saved_as_itself(tmp_path, wrap):
    model = atmc.models.build("lenet", 10, seed=0)
    atmc.save(wrap(model), tmp_path / "a.atmc")
    loaded = atmc.load(tmp_path / "a.atmc")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_state_that_is_no_tensor_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the model's state has _extra_state, a dict: a model file holds tensors only"):
        atmc.save(ExtraState(), tmp_path / "a.atmc", input_shape=(1, 8, 8), classes=4)
    assert not (tmp_path / "a.atmc").exists()
