"""Models with odd habits are evaluated and verified as their plain counterparts are."""

import threading

import pytest
import torch
from torch import nn

import atmc

X = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(384, 10))

    def forward(self, x):
        return self.body((x - 0.5) * 0.5)


class InPlace(Plain):
    def forward(self, x):
        return self.body(x.sub_(0.5).mul_(0.5))


class Lock(Plain):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class KeepsActivations(Plain):
    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


def in_inference_mode():
    with torch.inference_mode():
        return Plain()


MODELS = {
    "in place": InPlace,
    "a lock": Lock,
    "activations": KeepsActivations,
    "inference mode": in_inference_mode,
    "double": lambda: Plain().double(),
    "frozen": lambda: Plain().requires_grad_(False),
    "training mode": lambda: Plain().train(),
    "compiled": lambda: torch.compile(Plain(), backend="eager"),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(Plain()),
    "script": lambda: torch.jit.script(Plain()),
}
ATTACKS = ("fgsm", "pgd", "square", "apgd-ce")


def measure(model):
    labels = Plain()(X).argmax(1)
    report = atmc.evaluate(model, (X, labels), threat="linf:0.05", attack=ATTACKS, n=8, checks=False)
    figures = report.to_json()
    return {"clean": figures["clean"], "attacks": {name: a["accuracy"] for name, a in figures["attacks"].items()}}


@pytest.fixture(scope="module")
def plain():
    return measure(Plain())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_the_figures_are_those_of_the_plain_model(build, plain):
    images = X.clone()
    model = build()
    mode = model.training
    assert measure(model) == plain
    assert torch.equal(X, images)
    assert model.training == mode


@pytest.mark.parametrize("build", [InPlace, KeepsActivations, in_inference_mode])
def test_proofs_are_those_of_the_plain_model(build):
    labels = Plain()(X).argmax(1)
    verdicts = [atmc.verify(model, (X, labels), threat="linf:0.005", n=6).verdicts for model in (build(), Plain())]
    assert verdicts[0] == verdicts[1]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(kind):
    """The weights are those of the user, rounded by him, and all else is float32."""
    model = Plain().to(kind)
    report = atmc.evaluate(model, (X, Plain()(X).argmax(1)), threat="linf:0.05", attack="pgd", checks=False)
    assert report.clean.accuracy > 0.9
    assert model.body[0].weight.dtype == kind
