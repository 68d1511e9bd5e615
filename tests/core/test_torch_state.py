"""The contexts set torch's switches within and restore them after, also after an error. Nothing computes on CUDA."""

import os
from contextlib import contextmanager
from operator import attrgetter

import pytest
import torch
from torch import nn

import atmc
from atmc import api
from atmc.commands import run as runs
from atmc.commands.config import parse
from atmc.core.torch_state import deterministic, full_float32, prepared_torch
from atmc.data import Images
from atmc.evaluation.accuracy import clean_accuracy, robust_accuracy

CUDA = torch.device("cuda")
BACKENDS = [  # all that torch lets a user give a precision of their own (since 2.9)
    backend
    for name in ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv")
    if hasattr(backend := attrgetter(name)(torch.backends), "fp32_precision")
]


def precisions() -> dict[str, object]:
    """Return every switch of float32's precision."""
    return {
        "products": torch.get_float32_matmul_precision(),
        "cuda products": torch.backends.cuda.matmul.allow_tf32,
        "convolutions": torch.backends.cudnn.allow_tf32,
        "backends": [backend.fp32_precision for backend in BACKENDS],
    }


def algorithms() -> dict[str, object]:
    """Return every switch of determinism."""
    return {
        "benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.backends.cudnn.deterministic,
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn": torch.is_deterministic_algorithms_warn_only_enabled(),
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


FULL = {"products": "highest", "cuda products": False, "convolutions": False}
REPEATABLE = {"benchmark": False, "deterministic": True, "algorithms": True, "warn": True, "workspace": ":4096:8"}


@pytest.fixture(params=["torch's own", "highest", "high", "medium"])
def users(request):
    """Set a user's precision, and restore torch's own at the end."""
    own = precisions()
    if request.param != "torch's own":
        torch.set_float32_matmul_precision(request.param)
        torch.backends.cudnn.allow_tf32 = request.param != "highest"
    yield precisions()
    torch.set_float32_matmul_precision(own["products"])
    torch.backends.cudnn.allow_tf32 = own["convolutions"]
    for backend, precision in zip(BACKENDS, own["backends"], strict=True):
        backend.fp32_precision = precision
    assert precisions() == own


def is_full() -> bool:
    now = precisions()
    return all(now[name] == value for name, value in FULL.items()) and set(now["backends"]) <= {"ieee"}


def test_full_float32_within_and_the_users_setting_after(users):
    with full_float32():
        assert is_full()
        with full_float32():
            assert is_full()
        assert is_full()
    assert precisions() == users


def test_full_float32_ends_with_an_error(users):
    with pytest.raises(ZeroDivisionError), full_float32():
        raise ZeroDivisionError
    assert precisions() == users


def test_a_precision_that_only_the_newer_interface_can_say():
    before = [backend.fp32_precision for backend in BACKENDS]
    mixed = ["tf32", "ieee", "tf32", "ieee", "ieee"][: len(before)]
    try:
        for backend, precision in zip(BACKENDS, mixed, strict=True):
            backend.fp32_precision = precision
        with full_float32():
            assert is_full()
        assert [backend.fp32_precision for backend in BACKENDS] == mixed
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
        for backend, precision in zip(BACKENDS, before, strict=True):
            backend.fp32_precision = precision


class Watching(nn.Module):
    """Notes at every pass, the attacks' too, whether float32 was full."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.seen: list[bool] = []

    def forward(self, x):
        self.seen.append(is_full())
        return self.head(x.flatten(1))


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "pgd-strong", "wrm", None])
def test_accuracies_are_measured_in_full_float32(attack):
    own = precisions()
    torch.set_float32_matmul_precision("high")
    try:
        model, images = Watching(), Images(torch.rand(6, 1, 2, 2), torch.arange(6) % 2)
        if attack is None:
            clean_accuracy(model, images)
        else:
            robust_accuracy(model, images, atmc.Linf(0.1), attack)
        assert model.seen
        assert all(model.seen)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(own["products"])
        for backend, precision in zip(BACKENDS, own["backends"], strict=True):
            backend.fp32_precision = precision
    assert precisions() == own


class TestDeterministic:
    def test_within_and_after(self):
        before = algorithms()
        with deterministic(CUDA):
            assert algorithms() == REPEATABLE
        assert algorithms() == before
        with pytest.raises(ZeroDivisionError), deterministic(CUDA):
            raise ZeroDivisionError
        assert algorithms() == before

    def test_a_users_stricter_choice_stays(self, monkeypatch):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        torch.use_deterministic_algorithms(True)
        try:
            before = algorithms()
            with deterministic(CUDA):
                assert algorithms() == {**REPEATABLE, "warn": False, "workspace": ":16:8"}
            assert algorithms() == before
        finally:
            torch.use_deterministic_algorithms(False)

    def test_the_cpu_needs_none_of_it(self):
        before = algorithms()
        with deterministic(torch.device("cpu")):
            assert algorithms() == before

    def test_runs_and_compress_are_inside(self, few, tmp_path, monkeypatch):
        """Both pass their device to the context; tests run on the CPU."""
        entered = []

        def watched(device):
            entered.append(device.type)
            return deterministic(CUDA)

        for module in (runs, api):
            monkeypatch.setattr(module, "prepared_torch", watched)
        before, seen = algorithms(), []
        settings = {"model": "lenet", "data": "digits", "threat": "linf:0.1", "ratio": 0.1, "limit": 20, "eval_n": 5}
        config = parse({**settings, "device": "cpu", "training": {"epochs": 0, "val_n": 5}})
        for event in runs.run(config, tmp_path / "out"):
            if not isinstance(event, runs.Message) or "evaluating" in event.text:
                seen.append(event)
                assert isinstance(event, runs.Finished) or algorithms() == REPEATABLE
        assert len(seen) > 2
        assert algorithms() == before
        budget = atmc.Budget(ratio=0.1)
        atmc.compress(atmc.models.build("lenet", 10), *few, threat=atmc.Linf(0.1), budget=budget, epochs=0, val_n=5)
        assert entered == ["cpu", "cpu"]
        assert algorithms() == before


def switches():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
    )


USUAL = (True, False, torch.float32, False)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


CALLERS = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "another device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS)
def test_a_run_sees_the_same_state_whoever_calls_it(caller):
    with caller():
        before = switches()
        with prepared_torch(torch.device("cpu")):
            assert switches() == USUAL
            assert torch.zeros(1).device.type == "cpu"
        assert switches() == before
    assert switches() == USUAL


@pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS)
def test_figures_and_files_do_not_depend_on_the_callers_state(caller):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    x, y = torch.rand(24, 1, 8, 8), torch.arange(24) % 4
    budget = atmc.Budget(ratio=0.5)

    def measure():
        report = atmc.evaluate(model, (x, y), threat="linf:0.1", checks=False)
        settings = {"objective": "pgd_at", "epochs": 1, "batch_size": 8}
        result = atmc.compress(model, (x, y), (x, y), threat="linf:0.1", budget=budget, **settings)
        return report.to_json(), atmc.verify(model, (x, y), threat="linf:0.1").verdicts, result.data

    alone = measure()
    with caller():
        assert measure() == alone


def test_two_threads_that_overlap_leave_the_callers_state():
    before = precisions()
    first, second = full_float32(), full_float32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == "highest"
    second.__exit__(None, None, None)
    assert precisions() == before
