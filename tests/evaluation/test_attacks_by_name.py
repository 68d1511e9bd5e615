"""Attacks by name: contracts of all of them, AutoAttack against pyautoattack itself, settings, refusals."""

import copy
import logging
import sys

import numpy as np
import pytest
import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from atmc.core.rng import Noise
from atmc.data import Images
from atmc.deploy.engine.engine import Engine
from atmc.evaluation import autoattack, corner
from atmc.evaluation.accuracy import predictions, robust_accuracy, run_protocol, summarize
from atmc.evaluation.attacks import ATTACKS, build_protocol, check_norm
from atmc.evaluation.fast_logits import choose_logits
from atmc.evaluation.verdicts import Verdicts
from atmc.robust.attacks import PgdSettings, dlr, margin
from atmc.robust.threats import L1, L2, Linf

BALLS = [Linf(0.08), L2(0.4), L1(1.5)]
SHAPE = (2, 5, 5)


class Net(nn.Module):
    """Batch norm and dropout, and a count of the images it saw."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(classes)
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
        self.head = nn.Linear(36, classes)
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        logits: Tensor = 3 * self.head(self.body(x))
        return logits


def images(model: nn.Module, n: int, wrong: int = 0) -> Images:
    """Draw images with the model's own predictions as labels, except for the first `wrong` ones."""
    x = Noise(torch.arange(n), seed=9, purpose="test").uniform(SHAPE)
    y = predictions(model, x)
    y[:wrong] = (y[:wrong] + 1) % int(model.head.out_features)
    return Images(x, y)


@pytest.fixture
def few_queries(monkeypatch):
    """Let the attacks that count queries take 100 of them."""
    names = ((autoattack, "QUERIES"), (autoattack, "LONG_QUERIES"), (autoattack, "QUICK_QUERIES"), (corner, "QUERIES"))
    for module, name in names:
        monkeypatch.setattr(module, name, 100)


@pytest.mark.usefixtures("few_queries")
@pytest.mark.parametrize("ball", BALLS, ids=str)
@pytest.mark.parametrize("attack", ATTACKS)
def test_contract(attack, ball, capfd, caplog):
    """Images stay in the ball and the box, the model and torch's generators unchanged, nothing is printed or logged."""
    model = Net(3).train()
    data = images(model, 6, wrong=2)
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    spec = ATTACKS[attack]
    if spec.norms and ball.name not in spec.norms:
        with pytest.raises(ValueError, match=f"attack '{attack}' exists for {', '.join(spec.norms)} only"):
            robust_accuracy(model, data, ball, attack)
        return
    with caplog.at_level(logging.DEBUG):
        result = robust_accuracy(model, data, ball, attack, keep=True)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name != "torch.__trace"]  # what torch.export leaves
    assert not result.right[:2].any()
    assert torch.equal(result.fooled_by[:2], torch.full((2,), -1, dtype=torch.int8))
    assert torch.equal(result.adv[:2], data.pixels[:2])
    x, fooled = data.pixels, result.fooled_by >= 0
    assert torch.equal(predictions(model, result.adv)[2:] == data.labels[2:], result.right[2:])
    assert ((result.adv != x).flatten(1).any(1) == fooled).all()
    assert result.adv.min() >= 0
    assert result.adv.max() <= 1
    if spec.bounded:
        assert ball.distance(result.adv, x).max() <= ball.eps * 1.0001
        assert result.largest == pytest.approx(float(ball.distance(result.adv, x).max()), rel=1e-4, abs=1e-7)
    assert result.refused == 0


@pytest.fixture
def keep_trace():
    """Restore the trace function: pyautoattack's checks end with sys.settrace(None), which would stop coverage."""
    trace = sys.gettrace()
    yield
    sys.settrace(trace)


@pytest.mark.usefixtures("keep_trace")
@pytest.mark.parametrize("ball", [Linf(0.02), L2(0.12)], ids=str)
def test_autoattack_is_pyautoattack(ball, monkeypatch):
    """With 10 classes: the same images, example by example, as its own run in the same batches (fewer queries)."""
    monkeypatch.setattr(autoattack, "QUERIES", 100)
    model = Net(10).eval()
    data = images(model, 7, wrong=1)
    ours = robust_accuracy(model, data, ball, "autoattack", seed=3, batch_size=3, keep=True)
    theirs = AutoAttack(model, norm=autoattack.NORMS[ball.name], eps=ball.eps, seed=3, version="standard")
    theirs.verbose, theirs.square.n_queries = False, 100
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    with torch.random.fork_rng():
        adv, labels = theirs.run_standard_evaluation(data.pixels, data.labels, batch_size=3)
    assert torch.equal(ours.right, labels == data.labels)
    assert torch.equal(ours.adv, adv)
    assert 0 < ours.accuracy < 1
    settings = ours.to_json()
    assert settings["attacks"] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert (settings["targets"], settings["fab_targets"], settings["loss"]) == (9, 9, "dlr")
    assert "note" not in settings
    after = list(settings["after"].values())
    assert after == sorted(after, reverse=True)
    assert after[-1] == pytest.approx(ours.accuracy, abs=1e-6)


@pytest.mark.parametrize(("classes", "targets", "loss"), [(2, 1, "margin"), (3, 2, "margin"), (4, 3, "dlr")])
def test_few_classes(classes, targets, loss, monkeypatch):
    """All wrong classes are targets, and the result says what took the place of DLR."""
    monkeypatch.setattr(autoattack, "QUERIES", 100)
    model = Net(classes).eval()
    data = images(model, 3)
    figures = robust_accuracy(model, data, Linf(0.3), "autoattack").to_json()
    assert (figures["targets"], figures["fab_targets"], figures["loss"]) == (targets, targets, loss)
    assert f"{classes} classes: the targeted attacks take all {targets} wrong ones" in figures["note"]
    assert ("the margin of the logits takes its place" in figures["note"]) == (loss == "margin")
    assert figures["accuracy"] < 1
    alone = robust_accuracy(model, data, Linf(0.3), "apgd-dlr").to_json()
    assert alone["loss"] == loss


def test_targets_are_really_all_attacked():
    """With 5 classes each of the 4 wrong ones is a target of APGD and of FAB."""
    model = Net(5).eval()
    whole = autoattack.build_suite(model, Linf(1e-4), classes=5, seed=0, device=torch.device("cpu"))
    targets = []
    original = whole.apgd_targeted.dlr_loss_targeted

    def watched(logits: Tensor, y: Tensor) -> Tensor:
        targets.append(tuple(whole.apgd_targeted.y_target.tolist()))
        return original(logits, y)

    whole.apgd_targeted.dlr_loss_targeted = watched
    data = images(model, 2)
    whole.apgd_targeted.perturb(data.pixels, data.labels)
    assert {target[0] for target in targets} == set(range(5)) - {int(data.labels[0])}


@pytest.mark.parametrize(
    "attack", ["fgsm", "pgd", "pgd-strong", "apgd-ce", "square", "interval-pgd", "corner", "square-long"]
)
def test_only_examples_that_are_right_cost_anything(attack):
    model = Net(3).eval()
    data = images(model, 8, wrong=8)
    model.seen = 0
    assert robust_accuracy(model, data, Linf(0.1), attack).accuracy == 0
    assert model.seen <= 8 + 2  # the clean pass, and two images that tell the number of classes


def test_custom_pgd():
    model = Net(5).eval()
    data = images(model, 40)
    plain = robust_accuracy(model, data, Linf(0.04), "pgd")
    custom = robust_accuracy(model, data, Linf(0.04), "pgd", steps=5, step_size=0.01, restarts=3, loss="margin")
    figures = custom.to_json()
    assert {key: figures[key] for key in ("steps", "step_size", "random_start", "restarts", "loss")} == {
        "steps": 5,
        "step_size": 0.01,
        "random_start": True,
        "restarts": 3,
        "loss": "margin",
    }
    more = robust_accuracy(model, data, Linf(0.04), "pgd", restarts=4)
    assert not (more.right & ~plain.right).any()  # the first start is the plain one
    assert robust_accuracy(model, data, Linf(0.04), "pgd", loss="dlr").to_json()["loss"] == "dlr"
    three = Net(3).eval()
    note = robust_accuracy(three, images(three, 4), Linf(0.04), "pgd", loss="dlr").to_json()
    assert note["loss"] == "margin"
    assert "3 classes" in note["note"]


def test_dlr_is_the_papers():
    """Shift and scale do not matter; by hand for one example right and one wrong."""
    logits = torch.tensor([[5.0, 3.0, 1.0, 0.0], [5.0, 3.0, 1.0, 0.0]])
    y = torch.tensor([0, 1])
    assert dlr(logits, y).tolist() == [pytest.approx(-2 / 4), pytest.approx(2 / 4)]
    assert torch.allclose(dlr(100 * logits + 7, y), dlr(logits, y))
    assert torch.equal(dlr(logits, y).sign(), margin(logits, y).sign())
    with pytest.raises(ValueError, match="at least 3 classes"):
        dlr(logits[:, :2], y)


class TestFastLogits:
    """The engine gives the logits of sparse models, and the module those of others."""

    @pytest.fixture
    def sparse(self) -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 3)).requires_grad_(False)
        model[1].weight[:, 5:] = 0
        return model

    def count_calls(self, model: nn.Module, x: Tensor) -> int:
        """Choose, run, compare, and return how often the module itself was called in the run."""
        calls = []
        logits = choose_logits(model, x[:2])
        hook = model.register_forward_hook(lambda *_: calls.append(1))
        assert torch.allclose(logits(x), model(x), atol=1e-5)
        hook.remove()
        return len(calls) - 1

    def test_sparse_and_dense(self, sparse):
        x = torch.rand(5, *SHAPE)
        assert self.count_calls(sparse, x) == 0
        sparse[1].weight.fill_(0.01)
        assert self.count_calls(sparse, x) == 1

    def test_what_the_engine_cannot_run(self, sparse):
        assert self.count_calls(nn.Sequential(sparse, nn.Softplus()), torch.rand(5, *SHAPE)) == 1

    def test_an_engine_that_disagrees_is_not_used(self, sparse, monkeypatch):
        monkeypatch.setattr(Engine, "__call__", lambda self, images: np.full((len(images), 3), 0.5, np.float32))
        assert self.count_calls(sparse, torch.rand(5, *SHAPE)) == 1


def test_thorough_says_what_it_ran_and_what_it_left_out(few_queries):
    """An operation without an interval leaves out one attack, a norm another; alone, these attacks are refused."""
    model = nn.Sequential(Net(3), nn.LogSoftmax(1)).eval()
    data = images(model[0], 4)
    further = ["interval-pgd", "corner", "square-long"]
    for ball, left_out in ((Linf(0.3), further[:1]), (L2(0.4), further[:2])):
        protocol = build_protocol(model, data, ball, "thorough")
        assert list(protocol.settings["left_out"]) == left_out
        assert list(protocol.settings["further"]) == further[len(left_out) :]
        names = [stage.name for stage in protocol.stages]
        assert names == [*autoattack.STANDARD, *["corner"] * (ball.name == "linf"), *["square-long"] * 3]
    assert protocol.settings["further"]["square-long"]["queries"] == autoattack.LONG_QUERIES == 100
    assert "left_out" not in build_protocol(Net(3).eval(), data, Linf(0.3), "thorough").settings
    with pytest.raises(ValueError, match=r"interval-pgd needs interval bounds of the model: .*log_softmax"):
        robust_accuracy(model, data, Linf(0.3), "interval-pgd")


def test_quick_leaves_out_a_square_that_does_not_fit():
    """It keeps what each of its three parts breaks; the grid of Square for l2 needs 5x5 pixels."""
    model = Net(3).eval()
    data = images(model, 200)
    quick, pgd = (robust_accuracy(model, data, Linf(0.1), name) for name in ("quick", "pgd"))
    assert 0 < quick.accuracy < pgd.accuracy < 1
    assert set(quick.fooled_by[quick.fooled_by >= 0].tolist()) == {0, 1, 2}
    assert quick.to_json()["queries"] == autoattack.QUICK_QUERIES == 200
    small = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    protocol = build_protocol(small, Images(torch.rand(4, 1, 4, 4), torch.zeros(4).long()), L2(0.4), "quick")
    assert [stage.name for stage in protocol.stages] == ["pgd", "pgd-margin"]
    assert "at least 5x5 pixels" in protocol.settings["left_out"]["square"]


class TestTime:
    def test_a_batch_at_a_time_until_it_is_over(self):
        """Finished examples went through all stages; with no time at all, one batch is finished."""
        model = Net(3).eval()
        data = images(model, 10)
        protocol = build_protocol(model, data, Linf(0.05), "pgd-strong")
        verdicts = Verdicts.fresh(data, 10, keep=False)
        events = list(run_protocol(model, data, protocol, verdicts, batch_size=4, until=0.0))
        accuracy = summarize(protocol, verdicts)
        assert accuracy.n == 4
        assert events[-1].n == 4
        assert torch.equal(accuracy.right, robust_accuracy(model, data, Linf(0.05), "pgd-strong", n=4).right)

    def test_blocks_do_not_matter_to_our_attacks(self):
        model = Net(3).eval()
        data = images(model, 10)
        protocol = build_protocol(model, data, Linf(0.05), "pgd-strong")
        verdicts = Verdicts.fresh(data, 10, keep=False)
        list(run_protocol(model, data, protocol, verdicts, batch_size=3, until=1e30))
        assert torch.equal(
            summarize(protocol, verdicts).right, robust_accuracy(model, data, Linf(0.05), "pgd-strong").right
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps >= 1, got 0"),
        ({"step_size": -0.1}, "a step size > 0, in pixel units, got -0.1"),
        ({"step_size": float("nan")}, "step size > 0"),
        ({"restarts": 0}, "restarts >= 1, got 0"),
        ({"loss": "dlrr"}, "did you mean 'dlr'"),
    ],
)
def test_custom_settings_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PgdSettings.paper(Linf(0.1), **settings)


class TestRefused:
    def test_eps_of_the_wrong_scale(self):
        model = Net(3).eval()
        with pytest.raises(ValueError, match=r"linf:8/255"):
            robust_accuracy(model, images(model, 2), Linf(8), "pgd")

    def test_no_images(self):
        model = Net(3).eval()
        with pytest.raises(ValueError, match="at least one image, got none"):
            robust_accuracy(model, images(model, 2).take(slice(0, 0)), Linf(0.1), "pgd")

    def test_square_on_tiny_images(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        data = Images(torch.rand(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64))
        for attack in ("square", "autoattack"):
            with pytest.raises(ValueError, match="at least 5x5 pixels for l2, got 2x2"):
                robust_accuracy(model, data, L2(0.1), attack)

    def test_one_class(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
        data = Images(torch.rand(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64))
        with pytest.raises(ValueError, match="at least 2 classes, the model has 1"):
            robust_accuracy(model, data, Linf(0.1), "autoattack")

    def test_norms(self):
        check_norm("cw", L2(0.5))
        with pytest.raises(ValueError, match="exists for l2 only, the threat is linf:8/255"):
            check_norm("cw", Linf(8 / 255))
