"""A verification in several processes gives the verdicts of one; what was kept outlives a process that dies."""

import multiprocessing

import pytest
import torch
from small_networks import build_hidden
from torch import nn

import atmc
from atmc.evaluation.verify.verify import Verification, VerifyOptions, run_verification
from atmc.evaluation.verify.workers import WorkerEnded

EPS = 0.02


class Kept(dict):
    """Parts in memory."""

    def keep(self, name: str, value: object) -> None:
        self[name] = value


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return build_hidden()


def run(model: nn.Module, parts: Kept, **options: object) -> Verification:
    test = atmc.load_data("digits").test
    *_, result = run_verification(model, test, f"linf:{EPS}", VerifyOptions(n=60, **options), parts=parts)
    return result


def test_a_process_dies_and_two_give_the_verdicts_of_one(network):
    """The processes are killed after the first batch; what was kept is not measured again."""
    test, parts = atmc.load_data("digits").test, Kept()
    options = VerifyOptions(n=60, batch_size=6, processes=2)
    events = run_verification(network, test, f"linf:{EPS}", options, parts=parts)
    next(events)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        worker.kill()
    with pytest.raises(WorkerEnded, match="a process of the verification ended before it was done"):
        list(events)
    assert multiprocessing.active_children() == []
    before = dict(parts)
    assert 0 < len(before) < 10
    two = run(network, parts, batch_size=6, processes=2)
    assert multiprocessing.active_children() == []
    assert all(parts[name] is value for name, value in before.items())
    one = run(network, Kept(), batch_size=6)
    assert {"certified", "broken"} <= set(one.verdicts)
    assert (two.verdicts, two.decided_by, two.taken) == (one.verdicts, one.decided_by, one.taken)
    assert torch.equal(two.examples.adv, one.examples.adv)


def test_parts_of_other_images_are_not_used(network):
    """The parts have the same names, since they begin with the same images."""
    parts = Kept()
    run(network, parts, batch_size=7)
    other = run(network, parts, batch_size=5)
    fresh = run(network, Kept(), batch_size=5)
    assert (other.verdicts, other.decided_by, other.taken) == (fresh.verdicts, fresh.decided_by, fresh.taken)


def test_one_process_starts_none(network, monkeypatch):
    monkeypatch.setattr("atmc.evaluation.verify.workers.get_context", None)
    assert len(run(network, Kept()).verdicts) == 60


def test_a_model_that_cannot_be_sent(network):
    class Local(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return network(x)

    with pytest.raises(ValueError, match=r"the model cannot be sent to other processes .*: verify it with one process"):
        run(Local(), Kept(), processes=2)
