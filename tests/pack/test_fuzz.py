"""A short run of the fuzzer, benchmarks/fuzz_files.py; the long one's counts are in results/files/fuzz.json."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fuzzer():
    spec = importlib.util.spec_from_file_location("fuzz_files", ROOT / "benchmarks" / "fuzz_files.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_files"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fuzz_files"]


def test_damaged_files_are_errors_or_finite_models(fuzzer):
    counts = fuzzer.fuzz(2000, seed=20)
    assert counts.failures == []
    assert sum(counts.outcomes.values()) == 2000
    assert len(counts.mutations) > 25
    assert counts.outcomes["damaged: ChecksumMismatch"] > 700
    assert counts.outcomes["repaired: Malformed"] > 300
    assert counts.outcomes["repaired: another model"] > 50
    assert counts.outcomes["damaged: another model"] == 0


def test_a_wrong_model_would_be_noticed(fuzzer):
    """The fuzzer tells another model from the same one, and allows it only if checksums were repaired over damage."""
    base = fuzzer.make_bases()[1]
    parts = fuzzer.split_parts(base.data)
    other = fuzzer.seal([*parts[:-1], parts[-1][:-1] + bytes([parts[-1][-1] ^ 1])])
    assert fuzzer.try_file(base, other, False, inspecting=False) == ("another model", False)
    assert fuzzer.try_file(base, other, True, inspecting=False) == ("another model", True)
    assert fuzzer.try_file(base, base.data, False, inspecting=False) == ("the same model", True)


def test_the_committed_runs_have_no_failures():
    runs = [json.loads(path.read_text()) for path in sorted((ROOT / "results" / "files").glob("fuzz*.json"))]
    assert sum(run["files"] - run["outcomes"]["a whole file"] for run in runs) >= 200_000
    for run in runs:
        assert run["failures"] == []
        assert run["slowest_s"] < run["limit_s"]
        assert not any(name.startswith("damaged") and "model" in name for name in run["outcomes"])
