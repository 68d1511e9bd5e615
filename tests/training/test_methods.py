"""Every method end to end on a few digits: constraints hold in what is validated, written and decoded."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from torch import nn

import atmc
from atmc import models
from atmc.compress.admm import Admm
from atmc.compress.budget import distinct_nonzero
from atmc.compress.constraints import FixedCodes
from atmc.compress.factorize import Factors, compressible_parameters, factor_structure, factorize, factors, fold
from atmc.compress.metric import Moments
from atmc.data import Images
from atmc.evaluation.accuracy import clean_accuracy
from atmc.evaluation.user_model import check_model
from atmc.robust.objectives import OBJECTIVES, TrainingAttack, mixed, natural
from atmc.training import settings
from atmc.training.batch_norm import reestimate_batch_norm
from atmc.training.job import Job
from atmc.training.loop import Loop, StepDone, TrainingDiverged, cosine, fit
from atmc.training.methods import METHODS, Plan
from atmc.training.runner import EpochDone, State
from atmc.training.settings import default_recipe

EPOCHS = {"dense": 1, "l0": 1, "admm": 1, "tune": 1}


def tiny() -> nn.Module:
    """Build a small network for tests that do not depend on the architecture."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))


def job(few, *, method="atmc", bits=3, ratio=0.02, model=None, threat=None, **settings) -> Job:
    train, val = few
    model = model or tiny()
    settings = {"epochs": EPOCHS, "batch_size": 64, "attack_steps": 2, "interval": 2, **settings}
    return Job(
        model,
        train,
        val,
        threat=threat or atmc.Linf(0.1),
        budget=atmc.Budget(ratio=ratio, bits=bits),
        method=method,
        recipe=default_recipe(model, **settings),
        device=torch.device("cpu"),
    )


CASES = [
    ("atmc", 3),
    ("atmc", None),
    ("al0", None),
    ("al0q", 3),
    ("ap", None),
    ("alr", None),
    ("nap", None),
    ("da", None),
]


@pytest.mark.parametrize(("method", "bits"), CASES)
def test_method_end_to_end(few, method, bits):
    lenet = models.build("lenet", 10, seed=0)
    work = job(few, method=method, bits=bits, model=lenet, batch_size=128, attack_steps=1)
    events = list(work.run())
    records = [event.record for event in events if isinstance(event, EpochDone)]
    tensors = compressible_parameters(work.runner.model)
    if method != "da":
        for record in records:
            assert record.phase == "dense" or record.nonzeros <= work.nonzeros
        assert sum(int(tensor.count_nonzero()) for tensor in tensors.values()) <= work.nonzeros
    if bits:
        assert all(distinct_nonzero(tensor) <= 2**bits for tensor in tensors.values())
    assert bool(factor_structure(work.runner.model)) == (method in ("atmc", "alr"))
    result = work.result()
    assert records == result.records
    assert result.decided.size.nonzeros == (work.dense_weights if method == "da" else records[-1].nonzeros)
    plain = fold(work.runner.model)
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name])
    assert len(result.data) < (2_000_000 if method == "da" else 100_000)
    accuracy = clean_accuracy(result.model, few[1])
    assert accuracy.accuracy == result.decided.clean.accuracy
    assert work.runner.phases[0].name == "dense"


def test_residuals_are_in_the_log_of_the_phase_that_has_them(few):
    work = job(few, epochs={"dense": 1, "l0": 1, "admm": 3, "tune": 0}, rho=1.0, bits=2)
    list(work.run())
    records = [record for record in work.records if record.phase == "admm"]
    assert all(record.primal > 0 and record.dual > 0 for record in records)
    assert all(record.primal is None for record in work.records if record.phase != "admm")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_primal_residual_falls_over_the_phase(few, seed):
    """With the penalty in the gradient, which Adam normalizes away, it rises."""

    def last_over_first(**settings):
        rates = {"l0": 3e-3, "admm": 3e-3}
        epochs = {"dense": 2, "l0": 2, "admm": 8, "tune": 0}
        given = {"epochs": epochs, "learning_rate": rates, "seed": seed, "interval": 4, **settings}
        work = job(few, method="al0q", bits=1, ratio=0.2, **given)
        list(work.run())
        residuals = [record.primal for record in work.records if record.phase == "admm"]
        return residuals[-1] / residuals[0]

    assert last_over_first(rho=300.0) < 0.5
    assert last_over_first(rho=0.1, quantization="gradient", weighted=False) > 1.0


def test_tuning_by_adam_is_adam_on_the_values_of_the_codebook(few):
    """The same weights as from a network whose parameters are the shared values themselves."""
    torch.manual_seed(0)
    codes = torch.randint(0, 3, (10, 784))
    values = torch.tensor([-0.02, 0.01, 0.03])

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.values = nn.Parameter(values.clone())

        def forward(self, x):
            return x.flatten(1) @ self.values[codes].T

    model, shared = nn.Sequential(nn.Flatten(), nn.Linear(784, 10, bias=False)), Shared()
    model[1].weight.data.copy_(values[codes])
    weight = {"weight": model[1].weight}
    loop = Loop(default_recipe(model, batch_size=64, objective="natural", weight_decay=0.0), cosine(1e-2))
    steps = fit(
        model,
        few[0],
        loop,
        objective=natural,
        attack=TrainingAttack(atmc.Linf(0.1), steps=1),
        optimizer=torch.optim.Adam(model.parameters(), eps=1e-12),
        tensors=weight,
        epochs=2,
        moments=Moments(),
        constraint=lambda done: FixedCodes.of({"weight": values[codes]}),
    )
    optimizer = torch.optim.Adam(shared.parameters(), eps=1e-12)
    for index, step in enumerate(steps):
        batch = list(loop.batches(few[0], step.epoch - 1))[step.step - 1]
        optimizer.param_groups[0]["lr"] = cosine(1e-2)(index / (2 * step.steps))
        optimizer.zero_grad()
        nn.functional.cross_entropy(shared(batch.x), batch.y).backward()
        optimizer.step()
        assert torch.allclose(model[1].weight, shared.values[codes], rtol=1e-3, atol=1e-6)
    assert float((shared.values - values).detach().abs().max()) > 1e-2


def test_refreshes_are_counted_over_the_phase(few, monkeypatch):
    """Every third step of eight, not of each epoch's four."""
    refreshed, original = [], Admm.step

    def counted(self, tensors, weights=None):
        refreshed.append(True)
        return original(self, tensors, weights)

    monkeypatch.setattr(Admm, "step", counted)
    counts = []
    for event in job(few, epochs={"dense": 0, "l0": 0, "admm": 2, "tune": 0}, interval=3).run():
        if isinstance(event, StepDone):
            counts.append(len(refreshed))
    assert counts == [1, 1, 1, 2, 2, 2, 3, 3]


def test_straight_through_gradients_are_those_of_the_rounded_network(few):
    """With rounding in the forward pass the loss that is logged is that of the codebook, and theta stays free."""
    settings = {"epochs": {"dense": 1, "l0": 1, "admm": 1, "tune": 0}, "bits": 1, "ratio": 0.3, "method": "al0q"}
    free = job(few, **settings, quantization="straight-through")
    for event in free.run():
        if isinstance(event, StepDone) and event.phase == "admm":
            tensors = compressible_parameters(free.runner.model)
            assert all(distinct_nonzero(tensor) > 2 for tensor in tensors.values())
            assert event.admm is None
    assert all(distinct_nonzero(tensor) <= 2 for tensor in compressible_parameters(free.runner.model).values())
    losses = {
        quantization: next(
            record.loss
            for record in _run(job(few, **settings, quantization=quantization, learning_rate={"admm": 0.0}))
            if record.phase == "admm"
        )
        for quantization in ("straight-through", "proximal")
    }
    assert losses["straight-through"] > 1.001 * losses["proximal"]


def _run(work: Job):
    """Run a job to the end and return its records."""
    list(work.run())
    return work.records


def test_the_budget_is_reached_gradually_and_kept(few):
    work = job(few, method="al0", bits=None, epochs={"dense": 0, "l0": 4, "tune": 0}, gradual=0.5)
    tensors = compressible_parameters(work.runner.model)
    counts = []
    for event in work.run():
        if isinstance(event, StepDone):
            counts.append(sum(int(tensor.count_nonzero()) for tensor in tensors.values()))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 1500
    assert set(counts[9:]) == {work.nonzeros}


@pytest.mark.parametrize("shrinks", [True, False])
def test_while_the_budget_falls_what_was_removed_stays_out_and_the_rate_rises(few, shrinks):
    """A phase that is not said to shrink keeps its high rate, and lets in what one step makes large enough."""
    settings = {"epochs": {"dense": 0, "l0": 8, "tune": 0}, "learning_rate": {"l0": 0.2}}
    work = job(few, method="al0", bits=None, ratio=0.9, **settings)
    work.runner.phases = [replace(phase, shrinks=shrinks and phase.shrinks) for phase in work.runner.phases]
    tensors = compressible_parameters(work.runner.model)
    support, entered = {name: tensor.detach() != 0 for name, tensor in tensors.items()}, 0
    for event in work.run():
        if isinstance(event, StepDone):
            now = {name: tensor.detach() != 0 for name, tensor in tensors.items()}
            if (event.epoch - 1 + (event.step - 1) / event.steps) / 8 < 0.5:
                entered += sum(int((now[name] & ~support[name]).sum()) for name in now)
            support = now
    assert (entered == 0) == shrinks
    phase = next(phase for phase in work.runner.phases if phase.name == "l0")
    rate = work.runner._loop(phase, 0).learning_rate
    assert (rate(0.25) == pytest.approx(0.2 / 8)) == shrinks  # along a cubic
    assert (rate(0.5) == pytest.approx(0.2)) == shrinks
    assert rate(0.75) < rate(0.5)


@pytest.mark.parametrize(("method", "settings", "holds"), [("al0q", {}, True), ("atmc", {"regrow": 2.0}, False)])
def test_the_admm_phase_lets_entries_in_only_if_it_regrows(few, method, settings, holds):
    epochs, rates = {"dense": 0, "l0": 2, "admm": 2, "tune": 0}, {"l0": 0.01, "admm": 0.2}
    work = job(few, method=method, bits=2, ratio=0.1, epochs=epochs, learning_rate=rates, **settings)
    support: dict[str, torch.Tensor] = {}
    entered = 0
    for event in work.run():
        if isinstance(event, StepDone) and event.phase == "admm":
            tensors = compressible_parameters(work.runner.model)
            now = {name: tensor.detach() != 0 for name, tensor in tensors.items()}
            entered += sum(int((now[name] & ~support[name]).sum()) for name in now) if support else 0
            support = now
    assert support
    assert (entered == 0) == holds


def test_ap_keeps_the_support_of_its_one_shot_mask(few):
    dense = job(few, method="da", bits=None)
    list(dense.run())
    start = fold(dense.runner.model)
    work = job(few, method="ap", bits=None, ratio=0.2, model=start, epochs={"dense": 0, "tune": 2})
    list(work.run())
    magnitudes = torch.cat([value.abs().flatten() for value in compressible_parameters(start).values()])
    threshold = magnitudes.topk(work.nonzeros).values[-1]
    for name, tensor in compressible_parameters(work.runner.model).items():
        assert not tensor[compressible_parameters(start)[name].abs() < threshold].any()


def test_tuning_moves_only_the_codebook(few):
    work = job(few, epochs={"dense": 1, "l0": 1, "admm": 1, "tune": 2}, bits=2)
    patterns = {}
    for event in work.run():
        if isinstance(event, EpochDone) and event.record.phase == "tune":
            for name, tensor in compressible_parameters(work.runner.model).items():
                levels = torch.unique(tensor.detach(), return_inverse=True)[1]
                assert torch.equal(levels, patterns.setdefault(name, levels))
    assert patterns


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_w_is_built_once_per_step_not_once_per_pass(few, monkeypatch, objective):
    """Attack, passes, gradient, penalty, projection and a refresh of ADMM: one W of each weight for all of them."""
    built, builds, original = [], [], Factors.forward

    def counted(self, *factors):
        built.extend([self.shape] if self.built is None else [])
        return original(self, *factors)

    monkeypatch.setattr(Factors, "forward", counted)
    settings = {
        "epochs": {"dense": 0, "l0": 0, "admm": 2, "tune": 0},
        "attack_steps": 3,
        "interval": 1,
        "factor_start": "identity",
    }
    threat = atmc.L2(0.5) if OBJECTIVES[objective].norms == ("l2",) else None
    for event in job(few, objective=objective, threat=threat, ratio=0.3, **settings).run():
        if isinstance(event, StepDone):
            builds.append((event.step, sorted(built)))
        built.clear()
    weights = sorted([(4, 1, 5, 5), (10, 256)])
    assert [step for step, _ in builds] == [1, 2, 3, 4] * 2
    assert all(shapes == weights for step, shapes in builds if step > 1)


def test_batch_norm_is_reestimated_with_one_w(few, monkeypatch):
    built, original = [], Factors.forward
    model = factorize(nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.BatchNorm1d(10)))

    def counted(self, *factors):
        built.extend([self.shape] if self.built is None else [])
        return original(self, *factors)

    monkeypatch.setattr(Factors, "forward", counted)
    loop = Loop(default_recipe(model, batch_size=64), cosine(0.0))
    attack = TrainingAttack(atmc.Linf(0.1), steps=3)
    assert reestimate_batch_norm(model, few[0], loop, objective=mixed, attack=attack)
    assert len(built) == 2  # the model's, and that of the copy that is attacked


class Everything(nn.Module):
    """One weight of every kind: a convolution, a depthwise and a grouped one, packed attention, two tied, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 5, stride=5)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.grouped(self.depthwise(self.conv(x)).relu()).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.two(self.one(x).relu()).mean(1))


def test_every_kind_of_weight_end_to_end(few):
    torch.manual_seed(0)
    model = Everything()
    with pytest.raises(ValueError, match=r"share one weight, which cannot be compressed: exclude one\.weight and two"):
        job(few, model=model)
    excluded = ("one.weight", "two.weight", "hea*")
    work = job(few, model=model, bits=2, ratio=0.4, exclude=excluded, factor_start="identity")
    list(work.run())
    parts = factors(work.runner.model)
    assert {path: "".join(sorted(tensors)) for path, tensors in parts.items()} == {
        "conv.weight": "CUV",
        "depthwise.weight": "W",
        "grouped.weight": "W",
        "attention.in_proj_weight": "CUV",
        "attention.out_proj.weight": "CUV",
        "one.weight": "W",
        "two.weight": "W",
        "head.weight": "W",
    }
    for path, tensors in parts.items():
        excluded = path in ("one.weight", "two.weight", "head.weight")
        assert all((distinct_nonzero(tensor) > 4) == excluded for tensor in tensors.values()), path
    assert work.dense_weights == 200 + 72 + 32 + 192 + 64
    result = work.result()
    x = few[1].float_pixels(torch.arange(20))
    with torch.no_grad():
        assert torch.allclose(result.model(x), work.runner.model.eval()(x), atol=1e-5)
    assert {type(module) for module in result.model.modules()} == {type(module) for module in model.modules()}


RESUMED = {"epochs": {"dense": 2, "l0": 1, "admm": 2, "tune": 1}, "bits": 2, "ratio": 0.2}


@pytest.fixture(scope="module")
def uninterrupted(few) -> bytes:
    work = job(few, **RESUMED)
    list(work.run())
    return work.result().data


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6, 7])
def test_resumed_anywhere_the_file_is_the_same(few, uninterrupted, stop):
    """A checkpoint goes through torch.save, as in a run folder."""
    first, ends = job(few, **RESUMED), 0
    for event in first.run():
        if isinstance(event, EpochDone):
            ends += 1
            if ends == stop:
                buffer = io.BytesIO()
                torch.save(vars(event.state), buffer)
                break
    buffer.seek(0)
    resumed = job(few, **RESUMED)
    list(resumed.run(State(**torch.load(buffer, weights_only=True))))
    assert resumed.result().data == uninterrupted


def test_batch_norm_is_reestimated_in_the_objectives_own_mixture(few):
    """With one batch of all images the statistics are the mean of the clean and the adversarial batch's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(1, momentum=0.3), nn.Flatten(), nn.Linear(784, 10))
    train, _ = few
    attack = TrainingAttack(atmc.Linf(0.3), steps=2)
    loop = Loop(default_recipe(model, batch_size=256), cosine(0.0))
    adversarial = []

    def keeping(network, x, y, perturb):
        adversarial.append((x, perturb(x, y)))
        return mixed(network, x, y, perturb)

    assert reestimate_batch_norm(model, train, loop, objective=keeping, attack=attack)
    clean, attacked = adversarial[0]
    assert torch.allclose(model[0].running_mean, (clean.mean() + attacked.mean()) / 2, rtol=1e-4)
    assert model[0].momentum == 0.3
    assert not reestimate_batch_norm(model[1:], train, loop, objective=mixed, attack=attack)


@pytest.mark.parametrize("bf16", [True, False])
def test_a_network_with_batch_norm(few, bf16):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 5, stride=3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    work = job(few, model=model, bits=3, ratio=0.3, epochs={"dense": 1, "l0": 1, "admm": 1, "tune": 0}, bf16=bf16)
    list(work.run())
    result = work.result()
    assert result.decided.batch_norm in (True, False)
    assert result.decided.clean.accuracy == clean_accuracy(result.model, few[1]).accuracy


def test_compress_leaves_the_users_model_alone(few, lenet):
    before = copy.deepcopy(lenet.state_dict())
    seen = []
    result = atmc.compress(
        lenet, few[0], few[1], threat=atmc.L2(0.5), budget=atmc.Budget(nonzeros=2000), epochs=1, on_event=seen.append
    )
    assert all(torch.equal(before[name], value) for name, value in lenet.state_dict().items())
    assert result.records[-1].nonzeros <= 2000
    assert len(seen) > len(result.records)


def test_result_can_be_saved_and_evaluated(few, tmp_path):
    train, val = few
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(train.float_pixels(torch.arange(256)), train.labels), batch_size=50
    )
    result = atmc.compress(
        tiny(), loader, val, threat=atmc.Linf(0.1), budget=atmc.Budget(ratio=0.2, bits=4), epochs=1, attack_steps=1
    )
    size = result.save(tmp_path / "m.atmc")
    assert size == (tmp_path / "m.atmc").stat().st_size
    report = atmc.evaluate(
        atmc.load(tmp_path / "m.atmc", factory=lambda num_classes: tiny()),
        val,
        threat=atmc.Linf(0.1),
        attack=["fgsm", "pgd", "pgd-strong", "wrm"],
        n=40,
        checks=False,
    )
    assert report.attacks["pgd-strong"].accuracy <= report.attacks["pgd"].accuracy
    assert report.attacks["pgd"].n == 40
    assert report.clean.n == 100
    assert report.attacks["wrm"].to_json()["mean_l2"] > 0


def test_a_users_module_without_a_specification(few, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    result = atmc.compress(
        model, few[0], few[1], threat=atmc.Linf(0.1), budget=atmc.Budget(ratio=0.05), epochs=1, exclude=("3.*",)
    )
    result.save(tmp_path / "m.atmc")
    with pytest.raises(ValueError, match="give the factory"):
        atmc.load(tmp_path / "m.atmc")
    loaded = atmc.load(tmp_path / "m.atmc", factory=lambda num_classes: copy.deepcopy(model))
    assert torch.equal(loaded[1].weight, result.model[1].weight)
    assert loaded[3].weight.count_nonzero() == 320  # excluded: dense as it was


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"method": "atcm"}, "did you mean 'atmc'"),
            ({"method": "al0"}, "has no codebook"),
            ({"method": "al0q", "bits": None}, "give bits"),
            ({"ratio": 5e-6}, "below the floor"),
            ({"method": "alr", "bits": None, "ratio": 0.001}, "below the floor of this model and method, 295"),
            ({"threat": atmc.Linf(1.5)}, "above the largest"),
            ({"epochs": {"dens": 1}}, "unknown phase of epochs 'dens'"),
            ({"epochs": -1}, "epochs >= 0"),
            ({"optimizer": "lion"}, "unknown optimizer"),
            ({"objective": "robust"}, "unknown objective 'robust'"),
            ({"objective": "gaussian"}, "objective 'gaussian' is for l2 threats, got linf:0.1"),
            ({"augment": "mixup"}, "unknown augment"),
            ({"attack_steps": 0}, "attack_steps >= 1"),
            ({"val_clean_n": 0}, "val_clean_n >= 1"),
            ({"val_clean_n": 1.5}, "val_clean_n to be an integer"),
            ({"interval": 0}, "interval >= 1"),
            ({"eps_ramp": -1.0}, "eps_ramp >= 0"),
            ({"regrow": 0.5}, "regrow >= 1"),
            ({"sensitivity": 1.5}, "sensitivity >= 0 and <= 1"),
            ({"quantization": "ste"}, "unknown quantization"),
            ({"rank_by": "size"}, "unknown rank_by"),
            ({"gradual": 2.0}, "gradual >= 0 and <= 1"),
            ({"learning_rat": 0.1}, "did you mean 'learning_rate'"),
            ({"seed": -1}, r"a seed from 0 to 2\^63 - 1, got -1"),
            ({"seed": 2**63}, r"a seed from 0 to 2\^63 - 1"),
        ],
    )
    def test_before_training(self, few, settings, message):
        with pytest.raises(ValueError, match=message):
            job(few, **settings)

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.Softmax(1)), "look like probabilities"),
            (nn.Sequential(nn.Flatten(), nn.Linear(784, 7)), "7 outputs, the labels go up to 9"),
            (nn.Sequential(nn.Flatten(), nn.Linear(100, 10)), "does not take images of shape"),
            (nn.Conv2d(3, 10, 3), "does not take images of shape"),
            (nn.Flatten(0), "expected logits of shape"),
            (nn.Conv2d(1, 10, 3), "expected logits of shape"),
        ],
    )
    def test_models_that_do_not_fit(self, few, model, message):
        with pytest.raises(ValueError, match=message):
            job(few, model=model)

    def test_not_a_number(self, few, lenet):
        with torch.no_grad():
            lenet.fc2.bias[0] = torch.nan
        with pytest.raises(ValueError, match="not finite"):
            check_model(lenet, few[0], 10)
        assert lenet.training

    def test_labels_beyond_the_outputs(self, few):
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 4))
        with pytest.raises(ValueError, match="labels go up to 9"):
            atmc.evaluate(model, few[1], threat=atmc.Linf(0.1), checks=False)

    def test_recipe_and_settings(self, few, lenet):
        with pytest.raises(ValueError, match="recipe or settings, got both: seed"):
            atmc.compress(
                lenet, *few, threat=atmc.Linf(0.1), budget=atmc.Budget(ratio=0.1), recipe=default_recipe(lenet), seed=1
            )

    def test_divergence_is_one_clear_error(self, few):
        work = job(few, learning_rate=1e12, optimizer="sgd", epochs={"dense": 5})
        with pytest.raises(TrainingDiverged, match="try a lower learning rate"):
            list(work.run())


def test_the_largest_seed_works(few):
    work = job(few, seed=2**63 - 1, epochs={"dense": 1, "l0": 0, "admm": 0, "tune": 0})
    assert list(work.run())
    assert atmc.evaluate(tiny(), few[1], threat=atmc.Linf(0.1), attack="pgd-strong", n=5, seed=2**63 - 1, checks=False)


@pytest.mark.parametrize(("settings", "counts"), [({}, (100, 100)), ({"val_n": 7, "val_clean_n": 30}, (30, 7))])
def test_validation_uses_the_first_images_and_says_how_many(few, settings, counts):
    """Wrong labels beyond them change nothing."""
    train, val = few
    labels = val.labels.clone()
    labels[counts[0] :] = (labels[counts[0] :] + 1) % 10
    works = [
        job((train, Images(val.pixels, y)), method="da", bits=None, ratio=1.0, **settings) for y in (val.labels, labels)
    ]
    for work in works:
        list(work.run())
        assert {(record.clean_n, record.robust_n) for record in work.records} == {counts}
        decided = work.result().decided
        assert (decided.clean.n, decided.robust.n) == counts
    timeless = [[replace(record, seconds=0.0) for record in work.records] for work in works]
    assert timeless[0] == timeless[1]


def test_smallest_budgets(lenet):
    assert METHODS["alr"].smallest_budget(lenet) == 2405
    assert METHODS["atmc"].smallest_budget(lenet) == 4
    assert METHODS["da"].smallest_budget(lenet) == 1


def test_every_method_has_phases():
    for method in METHODS.values():
        plan = Plan(10, 100, 4 if method.codebook else None, default_recipe(tiny()), (1, 4, 4))
        assert method.build(plan)[0].name == "dense"


def test_after_the_dense_phase_every_method_trains_for_as_long():
    for name, method in METHODS.items():
        recipe = default_recipe(tiny(), phases=method.phases)
        plan = Plan(10, 100, 4 if method.codebook else None, recipe, (1, 4, 4))
        assert tuple(phase.name for phase in method.build(plan)) == method.phases
        epochs = sum(recipe.epochs[phase] for phase in method.phases if phase != "dense")
        assert epochs == (0 if name == "da" else 25)
    assert default_recipe(tiny(), phases=METHODS["ap"].phases).learning_rate["tune"] == 3e-3
    assert default_recipe(tiny(), phases=METHODS["al0"].phases).learning_rate["tune"] == 5e-4


def test_recipe_follows_the_model():
    assert default_recipe(models.build("lenet", 10)).optimizer == "adamw"
    recipe = default_recipe(models.build("resnet18", 10), epochs=3, learning_rate={"dense": 0.2})
    assert recipe.optimizer == "sgd"
    assert set(recipe.epochs.values()) == {3}
    assert recipe.learning_rate["dense"] == 0.2
    assert recipe.learning_rate["l0"] == settings.LEARNING_RATES["sgd"]["l0"]
    assert replace(recipe, seed=1).seed == 1


def test_rank_budget_counts_what_cannot_be_factored(few):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 5, stride=4), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(128, 10))
    assert METHODS["alr"].smallest_budget(model) == (8 + 25) + (10 + 128) + 72
    work = job(few, model=model, method="alr", bits=None, ratio=0.4, epochs={"dense": 0, "tune": 0})
    list(work.run())
    assert sum(tensor.numel() for tensor in compressible_parameters(work.runner.model).values()) <= work.nonzeros


class Views(nn.Module):
    """Flattens with `view`, which needs contiguous features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 5, stride=3), nn.Linear(256, 10)

    def forward(self, x):
        return self.head(self.conv(x).view(len(x), -1))


class Volumes(nn.Module):
    """A 3-dimensional convolution over images seen as one slice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv3d(1, 4, (1, 5, 5), stride=(1, 3, 3)), nn.Linear(256, 10)

    def forward(self, x):
        return self.head(self.conv(x[:, :, None]).flatten(1))


@pytest.mark.parametrize(("model", "fast"), [(Views, False), (Volumes, True), (tiny, True)])
def test_models_that_cannot_take_channels_last_run_without(few, model, fast):
    torch.manual_seed(0)
    network = model()
    work = job(few, model=network, ratio=0.3)
    assert work.recipe.channels_last == fast
    list(work.run())
    assert work.result().decided.clean.n == 100
    assert atmc.evaluate(network, few[1], threat=atmc.Linf(0.1), checks=False).clean.n == 100


def test_frozen_weights_are_compressed_without_training(few):
    model = tiny()
    model[0].weight.requires_grad_(False)
    work = job(few, model=model, ratio=0.3, bits=2)
    list(work.run())
    assert work.result().records[-1].nonzeros <= work.nonzeros


def build_normed() -> nn.Module:
    """Build a network with batch norm over features, which refuses a batch of one image."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.BatchNorm1d(10))


ALONE = {"epochs": {"dense": 2, "l0": 1, "admm": 1, "tune": 0}, "batch_size": 51, "ratio": 0.3, "bits": None}


class TestALastImageAlone:
    """256 images in batches of 51 are five batches, and one image more."""

    def test_joins_the_batch_before_it(self, few):
        work = job(few, model=build_normed(), **ALONE)
        steps = [event for event in work.run() if isinstance(event, StepDone)]
        assert [(event.step, event.steps) for event in steps[:5]] == [(step, 5) for step in range(1, 6)]
        assert len(steps) == 4 * 5
        assert steps[-1].fraction == 1
        assert work.result().decided.clean.n == 100  # batch norm re-estimated too

    def test_resumes_to_the_same_file(self, few):
        whole = job(few, model=build_normed(), **ALONE)
        list(whole.run())
        cut = job(few, model=build_normed(), **ALONE)
        state = next(event.state for event in cut.run() if isinstance(event, EpochDone))
        resumed = job(few, model=build_normed(), **ALONE)
        list(resumed.run(copy.deepcopy(state)))
        assert resumed.result().data == whole.result().data

    @pytest.mark.parametrize(("images", "batch_size"), [(1, 51), (256, 1)])
    def test_without_a_batch_before_it(self, few, images, batch_size):
        train, val = few
        some = train.take(slice(0, images)), val
        with pytest.raises(ValueError, match=f"at least 2 images per step.*got {images} training .* {batch_size}$"):
            job(some, model=build_normed(), **{**ALONE, "batch_size": batch_size})
        job(some, model=tiny(), **{**ALONE, "batch_size": batch_size})
