"""Budgets in bytes: the file is never larger, nothing is ever emptied, and what cannot be is refused by its size."""

import copy
import json
import re
import sys

import pytest
import torch
from command_line import call
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import atmc
from atmc.compress.budget import Budget, distinct_nonzero, mean_bits, parse_size
from atmc.compress.constraints import NonzeroBudget
from atmc.compress.factorize import compressible_parameters, fold
from atmc.compress.rate_control import Allocation, BudgetTooSmall, RateControl
from atmc.data import Images
from atmc.training.job import Job
from atmc.training.runner import EpochDone, State
from atmc.training.settings import default_recipe


def control(max_bytes: int, smallest: int = 10) -> RateControl:
    return RateControl(
        max_bytes=max_bytes,
        smallest=smallest,
        projected_bytes=lambda model: 0,
        file_bytes=lambda model: 0,
        most_bits=None,
        layers=2,
        dense_weights=10**7,
    )


class TestSearch:
    """`RateControl.largest_that_fits` on lengths that are known."""

    @given(
        st.integers(50, 10**6),
        st.integers(1, 10**7),
        st.floats(0.01, 4),
        st.floats(0, 0.03),
        st.integers(1, 10**6),
        st.integers(0, 99),
    )
    @settings(max_examples=300, deadline=None)
    def test_the_result_fits(self, max_bytes, high, per_nonzero, noise, start, seed):
        """The length rises with k, or nearly; it is measured a few dozen times at most."""
        calls: dict[int, int] = {}

        def length(k: int) -> int:
            wobble = 1 + noise * ((k * 7919 + seed) % 101 / 50 - 1)
            return calls.setdefault(k, int(10 + per_nonzero * k * wobble))

        if length(1) > max_bytes:
            with pytest.raises(BudgetTooSmall, match=f"below the smallest file here, {length(1):,} bytes"):
                control(max_bytes).largest_that_fits(length, 1, high, start=start)
            return
        k, size = control(max_bytes).largest_that_fits(length, 1, high, start=start)
        assert size == length(k) <= max_bytes
        assert 1 <= k <= high
        assert len(calls) <= 41
        assert k == high or size >= 0.985 * max_bytes or length(k + 1) > max_bytes

    @pytest.mark.parametrize("edge", [1, 2, 99, 5000, 123_456, 999_999])
    @pytest.mark.parametrize("over", [1, 500])
    def test_steps(self, edge, over):
        """The length jumps once and is constant elsewhere."""

        def length(k: int) -> int:
            return 900 if k <= edge else 1000 + over

        k, size = control(1000).largest_that_fits(length, 1, 1_000_000, start=1_000_000)
        assert (k, size) == (edge, 900)

    def test_nothing_fits(self):
        with pytest.raises(BudgetTooSmall, match="a budget of 1,000 bytes is below the smallest file here, 1,001"):
            control(1000).largest_that_fits(lambda k: 1001, 3, 10**6, start=500)


@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 6), st.sampled_from([0.001, 1, 1000])), min_size=1, max_size=5
    ),
    st.data(),
)
@settings(max_examples=100, deadline=None)
def test_a_budget_of_nonzeros_is_exact_and_leaves_no_layer_empty(sizes, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    tensors = {}
    for i, (rows, columns, scale) in enumerate(sizes):
        tensors[f"{i}.weight"] = scale * torch.randn(rows, columns, generator=generator)
        if i % 2:  # factorized: the wide side holds W
            tensors |= {f"{i}.weight.U": torch.zeros(rows, rows), f"{i}.weight.V": tensors.pop(f"{i}.weight")}
            tensors[f"{i}.weight.C"] = torch.randn(rows, columns, generator=generator)
            if rows > columns:
                tensors[f"{i}.weight.U"], tensors[f"{i}.weight.V"] = (
                    tensors[f"{i}.weight.V"],
                    torch.zeros(columns, columns),
                )
    nonzeros = sum(int(tensor.count_nonzero()) for tensor in tensors.values())
    k = data.draw(st.integers(len(sizes), nonzeros))
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    kept = NonzeroBudget(k, keep_alive=True).project(tensors)
    assert all(torch.equal(before[name], tensors[name]) for name in tensors)
    assert sum(int(tensor.count_nonzero()) for tensor in kept.values()) == k
    for i in range(len(sizes)):
        assert any(bool(kept[name].any()) for name in kept if name.startswith(f"{i}."))
    for name, tensor in kept.items():
        assert torch.equal(tensor, torch.where(tensor != 0, before[name], 0))
    assert all(
        torch.equal(value, kept[name]) for name, value in NonzeroBudget(k, keep_alive=True).project(kept).items()
    )
    if len(sizes) > 1:
        with pytest.raises(ValueError, match=f"at least {len(sizes)} nonzeros, one per layer|at least 1"):
            NonzeroBudget(1, keep_alive=True).project({name: tensor * 0 + 1 for name, tensor in tensors.items()})


def test_kernels_in_channels_last_keep_their_largest_entry():
    """The layout in memory is another than the order of entries."""
    small = torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last) * 1e-3
    kept = NonzeroBudget(2, keep_alive=True).project({"a": small, "b": torch.randn(9, 9)})
    assert int(kept["a"].count_nonzero()) == 1
    assert kept["a"].abs().max() == small.abs().max()


@pytest.mark.parametrize(
    ("text", "size"),
    [("24kB", 24_000), ("24KiB", 24_576), ("1.5MB", 1_500_000), ("1MiB", 2**20), ("900B", 900), ("900", 900), (7, 7)],
)
def test_sizes(text, size):
    assert parse_size(text) == size
    assert parse_size(f" {text} ") == size


@pytest.mark.parametrize("text", ["", "kB", "4 kb", "-3kB", "0", "0.2B", "nan", "infB", "4GB", "1e999kB"])
def test_texts_that_are_no_size(text):
    with pytest.raises(ValueError, match="expected a size such as 24kB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of ratio, nonzeros and max_bytes"),
        ({"ratio": 0.1, "max_bytes": 10}, "exactly one"),
        ({"nonzeros": 5, "max_bytes": 10}, "exactly one"),
        ({"max_bytes": 0}, "max_bytes >= 1"),
        ({"max_bytes": 10, "bits": 9}, "bits >= 1 and <= 8"),
    ],
)
def test_budgets_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        Budget(**arguments)


def test_an_allocation_is_a_constraint():
    torch.manual_seed(0)
    tensors = {"a": torch.randn(20, 20), "b": 1e-4 * torch.randn(20, 20)}
    kept = Allocation(50, {"a": 2, "b": 3}).constraint().project(tensors)
    assert sum(int(tensor.count_nonzero()) for tensor in kept.values()) == 50
    assert distinct_nonzero(kept["a"]) == 4
    assert distinct_nonzero(kept["b"]) == 1  # its largest entry alone
    assert mean_bits(kept, {"a": 2, "b": 3}) == pytest.approx((2 * 49 + 3) / 50, abs=1e-3)
    plain = Allocation(50).constraint().project(tensors)
    assert distinct_nonzero(plain["a"]) == 49


EPOCHS = {"dense": 1, "l0": 1, "admm": 1, "tune": 1}


def tiny(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 5, stride=5), nn.ReLU(), nn.Flatten(), nn.Linear(100, 10))


def images(few: tuple[Images, Images], n: int = 64) -> tuple[Images, Images]:
    return few[0].take(slice(0, n)), few[1].take(slice(0, 20))


def job(few, max_bytes: int, *, method: str = "atmc", bits: int | None = None, seed: int = 0, model=None) -> Job:
    model = model or tiny(seed)
    recipe = default_recipe(model, epochs=EPOCHS, batch_size=32, attack_steps=1, seed=seed)
    return Job(
        model,
        *images(few),
        threat=atmc.Linf(0.1),
        budget=Budget(max_bytes=max_bytes, bits=bits),
        method=method,
        recipe=recipe,
        device=torch.device("cpu"),
    )


def smallest(few, method: str, **options) -> int:
    """Return the smallest possible size, which the error for a budget of one byte names."""
    with pytest.raises(BudgetTooSmall, match="is below the smallest file of this model and method") as caught:
        job(few, 1, method=method, **options)
    return int(re.findall(r"([\d,]+) bytes", str(caught.value))[-1].replace(",", ""))


CASES = [
    ("atmc", None),
    ("atmc", 2),
    ("al0", None),
    ("al0q", None),
    ("al0q", 3),
    ("ap", None),
    ("nap", None),
    ("alr", None),
]


@pytest.mark.parametrize(("method", "bits"), CASES)
def test_the_file_is_never_larger_than_its_budget(few, method, bits):
    least = smallest(few, method, bits=bits)
    budget = least + (450 if method == "alr" else 250)
    work = job(few, budget, method=method, bits=bits)
    list(work.run())
    if method in ("atmc", "al0q"):  # in the end factors may be merged, and their values added
        most = 2 ** (bits or 8)
        assert all(distinct_nonzero(tensor) <= most for tensor in compressible_parameters(work.runner.model).values())
    result = work.result()
    assert 0.6 * budget < len(result.data) <= budget
    for path, weight in compressible_parameters(fold(result.model)).items():
        assert weight.any(), path
    sizes = [record.file_bytes for record in work.records if record.phase in ("l0", "admm")]
    assert all(size <= budget for size in sizes)
    assert bool(sizes) == (method not in ("ap", "alr"))
    if method in ("atmc", "al0q"):
        assert 1 <= result.decided.size.bits <= (bits or 8)
    else:
        assert result.decided.size.bits is None


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("method", ["atmc", "al0"])
def test_the_smallest_budget_that_is_named_is_reached(few, method, seed):
    """A random model, at the very edge."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 3 + seed), nn.ReLU(), nn.Linear(3 + seed, 10))
    least = smallest(few, method, model=model)
    with pytest.raises(BudgetTooSmall, match=f"below the smallest file of this model and method, {least:,} bytes"):
        job(few, least - 1, method=method, model=model)
    work = job(few, least, method=method, seed=seed, model=model)
    list(work.run())
    result = work.result()
    assert len(result.data) <= least
    assert result.model[1].weight.any()
    assert result.model[3].weight.any()


def test_da_takes_no_budget(few):
    with pytest.raises(ValueError, match="'da' keeps every weight"):
        job(few, 10**6, method="da")


def test_from_python_in_one_call(few):
    train, val = images(few)
    result = atmc.compress(
        tiny(), train, val, threat=atmc.Linf(0.1), budget=Budget(max_bytes=700), epochs=EPOCHS, attack_steps=1
    )
    assert len(result.data) <= 700
    with pytest.raises(BudgetTooSmall, match="a budget of 50 bytes is below the smallest file"):
        atmc.compress(tiny(), train, val, threat=atmc.Linf(0.1), budget=Budget(max_bytes=50))


def test_resumed_anywhere_the_file_is_the_same(few):
    whole = job(few, 700)
    ends = [copy.deepcopy(event.state) for event in whole.run() if isinstance(event, EpochDone)]
    data = whole.result().data
    assert len(ends) == 5  # of four epochs, and the start of the last phase
    for end in ends[1:-1]:
        resumed = job(few, 700)
        list(resumed.run(State(**vars(end))))
        assert resumed.result().data == data


CONFIG = """
model = "rate_models:build"
data = "digits"
threat = "linf:0.1"
precision = "fp32"
threads = 1
eval_n = 10
limit = 60

[training]
objective = "mixed"
epochs = 1
attack_steps = 1
val_n = 10
batch_size = 30
"""
MODELS = """
from torch import nn

def build(num_classes):
    return nn.Sequential(nn.Conv2d(1, 4, 5, stride=5), nn.ReLU(), nn.Flatten(), nn.Linear(100, num_classes))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "rate_models.py").write_text(MODELS)
    (tmp_path / "run.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("rate_models", None)


@pytest.mark.parametrize("options", [[], ["--bits", 3]])
def test_on_the_command_line(here, monkeypatch, options):
    command = ["compress", "--config", "run.toml", "--out", "out", "--max-bytes", "0.8kB", *options]
    assert call(*command) == 0
    metrics = json.loads((here / "out" / "metrics.json").read_text())
    assert metrics["file_bytes"] == (here / "out" / "model.atmc").stat().st_size <= 800
    log = [json.loads(line) for line in (here / "out" / "log.jsonl").read_text().splitlines()]
    assert all(line["file_bytes"] <= 800 for line in log if line["phase"] in ("l0", "admm"))
    assert 0 < metrics["bits"] <= (options[1] if options else 8)
    assert metrics["validation"]["pruned_to_fit"] >= 0


def test_too_small_on_the_command_line(here, monkeypatch, capsys):
    assert call("compress", "--config", "run.toml", "--out", "out", "--max-bytes", "40B") == 2
    message = capsys.readouterr().err.splitlines()
    assert len(message) == 1
    assert re.search(r"a budget of 40 bytes is below the smallest file of this model and method, \d+ bytes", message[0])
    assert not (here / "out").exists()
    for wrong in ("4GB", "-1", "much"):
        assert call("compress", "--config", "run.toml", "--out", "out", "--max-bytes", wrong) == 2
        assert "expected a size such as 24kB" in capsys.readouterr().err
