"""Models that a run cannot train, copy or write are refused before it begins; those with odd habits go through."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import atmc
from atmc.data import Images
from atmc.training.rehearsal import rehearse

X, Y = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 4


class Small(nn.Module):
    """A convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Linear(288, 4)

    def features(self, x):
        return torch.relu(self.conv(x)).flatten(1)

    def forward(self, x):
        return self.head(self.features(x))


class KeepsActivations(Small):
    def forward(self, x):
        self.kept = self.features(x)
        self.log = {"all": [self.kept]}
        return self.head(self.kept)


class NormalizesInPlace(Small):
    def forward(self, x):
        return super().forward(x.sub_(0.5).mul_(2.0))


class FunctionalDropout(Small):
    def forward(self, x):
        return self.head(F.dropout(self.features(x), 0.5, self.training))


class CountsCalls(Small):
    """Has state of other kinds: a counter, a buffer that is not saved, and a bound method as an attribute."""

    def __init__(self):
        super().__init__()
        self.calls, self.run = 0, self.features
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x):
        self.calls += 1
        return self.head(self.run(x) * self.scale)


class AuxiliaryHead(Small):
    def forward(self, x):
        logits = super().forward(x)
        return (logits, logits) if self.training else logits


class Lock(Small):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class ExtraState(Small):
    def get_extra_state(self):
        return {"scale": 1}

    def set_extra_state(self, state):
        pass


class Detached(Small):
    def forward(self, x):
        return super().forward(x).detach()


class ClosesOverAnother(nn.Module):
    """Computes by a function that holds on to one model, which copies therefore share."""

    def __init__(self):
        super().__init__()
        self.inner = Small()
        inner = self.inner
        self.call = lambda x: inner(x)

    def forward(self, x):
        return self.call(x)


class FailsInTraining(Small):
    def forward(self, x):
        return super().forward(x if not self.training else x.flatten(1))


class RunningMeanElsewhere(Small):
    """Changes what its outputs depend on in training, outside of its state dict."""

    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(288)

    def forward(self, x):
        features = self.features(x)
        self.mean = features.detach().mean(0) + 1 if self.training else self.mean
        return self.head(features - self.mean)


class Squeezes(Small):
    def forward(self, x):
        return super().forward(x).squeeze()


def freeze(*names):
    model = Small()
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def in_inference_mode():
    with torch.inference_mode():
        return Small()


GO_THROUGH = [
    KeepsActivations,
    NormalizesInPlace,
    FunctionalDropout,
    CountsCalls,
    in_inference_mode,
    lambda: Small().double(),
    lambda: Small().bfloat16(),
    lambda: nn.DataParallel(Small()),
    lambda: torch.optim.swa_utils.AveragedModel(Small()),
    lambda: torch.compile(Small(), backend="eager"),
    lambda: freeze("conv.bias"),
    lambda: freeze("head.weight"),
    lambda: freeze("conv.weight", "conv.bias"),
]


def compress(model, **settings):
    return atmc.compress(
        model,
        (X, Y),
        (X, Y),
        threat="linf:0.03",
        budget=atmc.Budget(ratio=0.3, bits=4),
        epochs=1,
        batch_size=8,
        **{"objective": "pgd_at", "attack_steps": 1} | settings,
    )


@pytest.mark.parametrize("build", GO_THROUGH)
def test_models_with_odd_habits_are_compressed(build):
    result = compress(build())
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}
    given = X.clone()
    assert result.model(given).shape == (24, 4)
    assert torch.equal(given, X)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (AuxiliaryHead, r"in training mode, too, got a tuple; turn auxiliary heads off"),
        (Lock, "the model cannot be copied.*_thread.lock"),
        (ExtraState, "the model's state has _extra_state, a dict: a model file holds tensors only"),
        (Detached, "the model has no gradient in training mode"),
        (ClosesOverAnother, "no parameter of a copy of the model takes part in its outputs"),
        (FailsInTraining, "the model fails in training mode on 2 images"),
        (RunningMeanElsewhere, "the model's state dict does not hold all that its outputs depend on"),
        (Squeezes, r"expected logits of shape \(1, classes\) from the model, got \(4,\)"),
        (lambda: torch.jit.script(Small()), "a TorchScript model cannot be compressed"),
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), "1.weight has no shape yet: call the model once"),
        (lambda: Small().to("meta"), "conv.weight has no values"),
        (lambda: freeze("conv.weight", "conv.bias", "head.weight", "head.bias"), "all of the model's are frozen"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_models_that_cannot_be_trained_are_refused_before_it(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        compress(build(), on_event=pytest.fail)


@pytest.mark.parametrize("objective", ["pgd_at", "ibp"])
@pytest.mark.parametrize("frozen", [["conv.weight"], ["head.weight"], ["conv.weight", "conv.bias"], ["head.bias"]])
def test_what_is_frozen_stays_as_it_is(objective, frozen):
    """But for the file's rounding to float16."""
    model = freeze(*frozen)
    result = compress(model, objective=objective)
    for name in frozen:
        assert torch.equal(result.model.get_parameter(name), model.get_parameter(name).half().float())


def test_a_rehearsal_changes_neither_the_model_nor_the_generators():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    rehearse(model, Images(X, Y))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_runs_in_two_threads_make_the_files_that_they_make_alone():
    model = nn.Sequential(nn.Dropout(0.1), Small())

    def run(seed):
        return compress(model, seed=seed).data

    alone, together = [run(0), run(1)], {}
    threads = [threading.Thread(target=lambda seed=seed: together.update({seed: run(seed)})) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together.get(0), together.get(1)] == alone
