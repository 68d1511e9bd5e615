"""Checks: each catches a model that is defective on purpose and misleads plain PGD, and none fails on honest models."""

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import atmc
from atmc import EvaluationWarning
from atmc.data import Images
from atmc.evaluation import autoattack, corner
from atmc.evaluation.accuracy import clean_accuracy, robust_accuracy
from atmc.evaluation.adversarial_file import AdversarialExamples
from atmc.evaluation.checks import CHECKS, collect_check_inputs, labels, masked, pixel_range, run_checks
from atmc.evaluation.evaluate import EvaluationOptions, run_evaluation
from atmc.evaluation.statistics import Accuracy
from atmc.robust.attacks import pgd
from atmc.robust.threats import L1, L2, Linf

THREAT = Linf(0.15)
NAMES = [check.__name__ for check in CHECKS]


@pytest.fixture(scope="module")
def two_tone() -> tuple[Images, Images]:
    """Return digits in black and white, 8x8, for training and test: every pixel lies on a face of the box."""
    data = atmc.load_data("digits")

    def small(images: Images) -> Images:
        pixels = images.float_pixels(slice(None))[:, :, 3:27:3, 3:27:3]
        return Images((pixels > 0.5).float(), images.labels)

    return small(data.train), small(data.test.take(slice(0, 120)))


def train_network(train: Images, threat: Linf | None) -> nn.Module:
    torch.manual_seed(0)
    return fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), train, threat, steps=150)


def fit(model: nn.Module, train: Images, threat: Linf | None, *, steps: int) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    x, y = train.pixels, train.labels
    for step in range(steps):
        part = torch.arange(step * 128, step * 128 + 128) % len(x)
        adv = pgd(model, x[part], y[part], threat, steps=3, step_size=threat.eps / 2) if threat else x[part]
        optimizer.zero_grad()
        F.cross_entropy(model(adv), y[part]).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def natural(two_tone) -> nn.Module:
    return train_network(two_tone[0], None)


@pytest.fixture(scope="module")
def robust(two_tone) -> nn.Module:
    return train_network(two_tone[0], THREAT)


class Rewired(torch.autograd.Function):
    """The identity, with another gradient: rule(x, gradient)."""

    @staticmethod
    def forward(ctx, x, rule):
        ctx.save_for_backward(x)
        ctx.rule = rule
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.rule(ctx.saved_tensors[0], grad), None


def all_on_faces(x: Tensor) -> Tensor:
    """Return (n, 1, 1, 1): whether every pixel of an image is 0 or 1."""
    return ((x == 0) | (x == 1)).flatten(1).all(1).view(-1, 1, 1, 1)


class Defective(nn.Module):
    """Another model's outputs, computed in a way that misleads an attack."""

    def __init__(self, base: nn.Module, defect: str) -> None:
        super().__init__()
        self.base, self.defect = copy.deepcopy(base), defect
        self.pattern = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.base(self.distort(x))
        if self.defect == "softmax":
            return (200 * logits).softmax(1)
        if self.defect == "logit scale":
            return 1000 * logits
        return logits

    def distort(self, x: Tensor) -> Tensor:
        """Return the images that the base model sees."""
        if self.defect == "rounding":
            return (x * 4).round() / 4
        if self.defect == "noise":
            return x + 0.05 * (1000 * x + 7 * torch.rand_like(x)).sin()  # its slope is large and of random sign
        if self.defect == "wrong gradient":
            return Rewired.apply(x, lambda x, grad: self.pattern.expand_as(grad))
        if self.defect == "reversed on faces":
            return Rewired.apply(x, lambda x, grad: torch.where((x == 0) | (x == 1), -grad, grad))
        if self.defect == "reversed inside":
            return Rewired.apply(x, lambda x, grad: torch.where(all_on_faces(x), grad, -grad))
        return x


def list_failed_checks(model: nn.Module, images: Images, **options) -> set[str]:
    """Evaluate, and return the names of the failed checks; expect a warning exactly if a check failed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EvaluationWarning)
        report = atmc.evaluate(model, images, threat=options.pop("threat", THREAT), **options)
    assert bool(caught) == bool(report.failed)
    assert all(check.name in str(caught[0].message) for check in report.failed)
    assert [check.name for check in report.checks] == NAMES
    return {check.name for check in report.failed}


@pytest.mark.parametrize(
    ("defect", "caught"),
    [
        ("rounding", {"zero_gradient", "noise_weaker", "eps_curve", "square"}),
        ("softmax", {"logits"}),
        ("logit scale", {"zero_gradient", "other_loss"}),
        ("noise", {"deterministic"}),
        ("wrong gradient", {"square"}),
        ("reversed on faces", {"more_restarts", "other_loss"}),
        ("reversed inside", {"fgsm_weaker"}),
    ],
)
def test_a_defect_fools_pgd_and_is_caught(two_tone, natural, defect, caught):
    model = Defective(natural, defect)
    honest, fooled = (robust_accuracy(m, two_tone[1], THREAT, "pgd").accuracy for m in (natural, model))
    assert fooled > honest + 0.2, "the defect does not even fool PGD"
    assert caught <= list_failed_checks(model, two_tone[1])


class BatchStatisticsNorm(nn.BatchNorm1d):
    """Batch norm that normalizes by the batch in evaluation mode too, as track_running_stats=False does."""

    def forward(self, x: Tensor) -> Tensor:
        running = (self.running_mean, self.running_var) if len(x) == 1 else (None, None)
        return F.batch_norm(x, *running, self.weight, self.bias, len(x) > 1, 0.0, self.eps)


def with_norms(norm: type[nn.BatchNorm1d]) -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(64, 128), norm(128), nn.ReLU(), nn.Linear(128, 128), norm(128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def test_training_mode_batch_norm(two_tone):
    """The statistics of an attacked batch undo part of the attack: the same weights seem far more robust."""
    torch.manual_seed(0)
    honest = fit(with_norms(nn.BatchNorm1d), two_tone[0], None, steps=300)
    model = with_norms(BatchStatisticsNorm).eval()
    model.load_state_dict(honest.state_dict())
    one, fooled = (robust_accuracy(m, two_tone[1], THREAT, "pgd").right for m in (honest, model))
    assert fooled.float().mean() > one.float().mean() + 0.2
    other = robust_accuracy(model, two_tone[1], THREAT, "pgd", batch_size=7).right
    assert not torch.equal(fooled, other)
    assert "batch_independence" in list_failed_checks(model, two_tone[1])
    assert "batch_independence" not in list_failed_checks(honest, two_tone[1])


def test_too_few_steps(two_tone, natural):
    assert {"more_steps", "more_restarts"} <= list_failed_checks(natural, two_tone[1], steps=4, step_size=0.02)


def test_the_dense_models_images(two_tone, natural):
    """The images of the dense model fool a model whose own gradients are useless."""
    model = Defective(natural, "wrong gradient")
    assert "transfer" in list_failed_checks(model, two_tone[1], transfer_from=natural)
    report = atmc.evaluate(natural, two_tone[1], threat=THREAT, attack="pgd-strong", transfer_from=natural)
    assert {check.name: check.ok for check in report.checks}["transfer"] is True


def test_wrong_labels(two_tone, natural):
    shifted = Images(two_tone[1].pixels, (two_tone[1].labels + 1) % 10)
    assert "labels" in list_failed_checks(natural, shifted)


def test_images_outside_the_box(two_tone, natural):
    """`evaluate` refuses them; the check is for other callers, and for attacks that leave the ball."""
    x, y = two_tone[1].pixels[:20], two_tone[1].labels[:20]
    clean = clean_accuracy(natural, Images(x, y))
    assert pixel_range(collect_check_inputs(natural, Images(x, y), THREAT, clean, {})).ok is True
    check = pixel_range(collect_check_inputs(natural, Images(x * 2 - 0.5, y), THREAT, clean, {}))
    assert check.ok is False
    assert "images from -0.5 to 1.5" in check.detail
    outside = Accuracy(0.5, 20, torch.zeros(20, dtype=torch.bool), refused=3)
    check = pixel_range(collect_check_inputs(natural, Images(x, y), THREAT, clean, {"pgd": outside}))
    assert check.ok is False
    assert "3 images of attacks" in check.detail
    with pytest.raises(ValueError, match=r"expected pixels in \[0, 1\]"):
        atmc.evaluate(natural, (x * 2, y), threat=THREAT)


@pytest.mark.parametrize("threat", [Linf(0.05), Linf(0.15), L2(0.6), L1(2.0)], ids=str)
def test_no_check_fails_on_honest_models(two_tone, natural, robust, threat):
    for model in (natural, robust):
        assert list_failed_checks(model, two_tone[1], threat=threat, attack="pgd-strong") == set()


def test_square_of_the_evaluation_is_used(two_tone, natural, monkeypatch):
    """If the evaluation ran Square, its verdicts are used and it is not run again."""
    monkeypatch.setattr(autoattack, "QUERIES", 301)
    few = two_tone[1].take(slice(0, 60))
    model = Defective(natural, "wrong gradient")
    with pytest.warns(EvaluationWarning):
        report = atmc.evaluate(model, few, threat=THREAT, attack=["square", "pgd"])
    detail = next(check.detail for check in report.checks if check.name == "square")
    before, after = int(report.attacks["pgd"].right.sum()), int(report.worst.right.sum())
    assert f"pgd leave {before} of 60, Square, 301 queries, then {after}" in detail


def test_square_is_compared_on_all_images_that_both_saw(two_tone, natural, monkeypatch):
    """These may be more than the 100 images of the other checks; AutoAttack's gradient stages count as white-box."""
    monkeypatch.setattr(autoattack, "QUERIES", 301)
    report = atmc.evaluate(natural, two_tone[1], threat=THREAT, attack=["pgd", "autoattack"])
    detail = next(check.detail for check in report.checks if check.name == "square")
    pgd_left, auto = report.attacks["pgd"].right, report.attacks["autoattack"]
    before, after = int((pgd_left & auto.right_before("square")).sum()), int((pgd_left & auto.right).sum())
    assert f"pgd and autoattack leave {before} of 120, Square, 301 queries, then {after}" in detail


@pytest.mark.parametrize(("defect", "ok"), [("wrong gradient", False), ("none", True)])
def test_masked_compares_autoattack_with_further_attacks(two_tone, natural, monkeypatch, defect, ok):
    """Without its Square, AutoAttack is blind to the wrong gradient, and a search without gradients is not."""
    for name, queries in (("QUERIES", 1), ("LONG_QUERIES", 60)):
        monkeypatch.setattr(autoattack, name, queries)
    monkeypatch.setattr(corner, "QUERIES", 300)
    options = {"threat": Linf(0.1), "attack": "thorough"}
    model, few = Defective(natural, defect), two_tone[1].take(slice(0, 25))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EvaluationWarning)
        report = atmc.evaluate(model, few, **options)
    checks, result = {check.name: check for check in report.checks}, report.attacks["thorough"]
    left, after = result.right, list(result.settings["after"].values())
    before = round(25 * result.settings["after"]["square"])
    assert checks["masked"].ok is ok
    assert f"AutoAttack leaves {before} of 25, further attacks then {int(left.sum())}" in checks["masked"].detail
    assert ("interval-pgd" in result.settings.get("left_out", {})) != ok  # its operation has no interval
    assert after == sorted(after, reverse=True)
    assert f"Square, 1 queries, then {before} " in checks["square"].detail
    assert checks["square"].ok is True


@pytest.mark.parametrize(("eps", "k", "counted"), [(0.15, 20, 20), (0.15, 12, 12), (0.14, 20, 0)])
def test_masked_counts_images_from_elsewhere(eps, k, counted):
    """AutoAttack, without queries, is blind to a network of steps; images that break it count if they are allowed."""
    x, y = torch.full((20, 1, 5, 5), 0.6), torch.zeros(20, dtype=torch.int64)
    adv = x[:k].clone()
    adv[:, 0, 0, 0] = 0.45
    examples = AdversarialExamples(adv, y[:k], torch.ones(k, dtype=torch.bool), torch.ones(k), {})
    auto = Accuracy.of(torch.ones(20, dtype=torch.bool))
    inputs = collect_check_inputs(
        flat_model(), Images(x, y), Linf(eps), Accuracy.of(y == 0), {"autoattack": auto}, examples=examples
    )
    check = masked(inputs)
    assert check.ok is (counted == 0)
    assert check.detail.endswith(
        f"leaves 20 of 20, further attacks then {20 - counted}; broken by replayed images {counted}"
    )
    other = replace(examples, labels=examples.labels + 1)
    without = collect_check_inputs(
        flat_model(), Images(x, y), Linf(eps), Accuracy.of(y == 0), {"autoattack": auto}, examples=other
    )
    assert masked(without).ok is None


def flat_model() -> nn.Module:
    """Build a network that is constant unless the first pixel is within 0.02 of a half: class 0 above it, 1 below."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 1), nn.ReLU6(), nn.Linear(1, 2)).requires_grad_(False)
    model[1].weight.zero_()[0, 0] = 150.0
    model[1].bias.fill_(-72.0)
    model[3].weight.copy_(torch.tensor([[1.0], [-1.0]]))
    model[3].bias.copy_(torch.tensor([-3.0, 3.0]))
    return model


def test_a_flat_network_is_no_masking_if_intervals_prove_it():
    """The distance of the first pixel from a half decides whether the label is proved; the gradient is always zero."""
    x = torch.full((20, 1, 5, 5), 0.5)
    x[:, 0, 0, 0] = torch.tensor([0.9, 0.1]).repeat(10)
    proved, labels_ = x.clone(), torch.tensor([0, 1]).repeat(10)
    x[:, 0, 0, 0] = torch.tensor([0.6, 0.4]).repeat(10)
    half = torch.cat((proved[:10], x[:10]))
    for images, threat, unproved, ok in (
        (proved, Linf(0.2), 0, True),
        (half, Linf(0.2), 10, False),
        (x, Linf(0.2), 20, False),
        (proved, L2(0.2), 20, False),  # set aside for linf only
    ):
        data = Images(images, labels_)
        checks = {check.name: check for check in run_checks_on(flat_model(), data, threat)}
        aside = "" if unproved == 20 else f"; {20 - unproved} more set aside, proved by interval bounds"
        assert checks["zero_gradient"].detail == f"exactly zero at {unproved} of 20 images{aside}"
        assert checks["zero_gradient"].ok is ok
        assert checks["eps_curve"].ok is (None if ok else False)
        assert checks["noise_weaker"].ok is not False or not ok


def test_equal_accuracies_do_not_rise():
    """All of 10 images survive every radius: Wilson's upper bound is 1 up to rounding."""
    x = torch.full((10, 1, 5, 5), 0.6)
    checks = {c.name: c for c in run_checks_on(flat_model(), Images(x, torch.arange(10) * 0), Linf(0.2))}
    detail = "100% at 0.1, 100% at 0.2, 100% at 0.4, 100% at 1; not near 0 where every image is allowed"
    assert checks["eps_curve"].detail == detail


def test_no_check_fails_if_nothing_survives(two_tone, natural):
    """No image survives this radius; the commonest label is counted over all labels, even if few are attacked."""
    assert robust_accuracy(natural, two_tone[1], Linf(0.6), "pgd-strong", n=5).accuracy == 0
    for n in (5, 100):
        assert list_failed_checks(natural, two_tone[1], threat=Linf(0.6), attack="pgd-strong", n=n) == set()


def test_checks_that_cannot_be_run(two_tone, natural):
    """The verdict is None with a reason: no second model; too few images fooled; one class; no image right."""
    checks = {check.name: check for check in run_checks_on(natural, two_tone[1], Linf(0.001))}
    assert checks["transfer"].ok is None
    assert "--transfer-from" in checks["transfer"].detail
    assert checks["masked"].ok is None
    assert "--attack thorough" in checks["masked"].detail
    assert checks["noise_weaker"].ok is None
    assert "too few to tell" in checks["noise_weaker"].detail
    zeros = two_tone[1].take(two_tone[1].labels == 0)
    assert labels(collect_check_inputs(natural, zeros, THREAT, clean_accuracy(natural, zeros), {})).ok is None
    wrong = Images(two_tone[1].pixels[:9], (natural(two_tone[1].pixels[:9]).argmax(1) + 1) % 10)
    checks = {check.name: check for check in run_checks_on(natural, wrong, THREAT)}
    assert checks["zero_gradient"].ok is None
    assert checks["eps_curve"].ok is None


def run_checks_on(model: nn.Module, images: Images, threat: Linf) -> Iterator:
    clean = clean_accuracy(model, images)
    pgd_figure = robust_accuracy(model, images, threat, "pgd")
    return run_checks(collect_check_inputs(model, images, threat, clean, {"pgd": pgd_figure}))


def test_checks_can_be_left_out(two_tone, natural):
    report = atmc.evaluate(natural, two_tone[1], threat=THREAT, checks=False)
    assert report.to_json()["checks"] == []
    with pytest.raises(ValueError, match="look like probabilities"):
        atmc.evaluate(Defective(natural, "softmax"), two_tone[1], threat=THREAT, checks=False)


def test_checks_change_no_figure(two_tone, natural):
    with_checks = atmc.evaluate(natural, two_tone[1], threat=THREAT, n=50, attack="pgd-strong")
    without = atmc.evaluate(natural, two_tone[1], threat=THREAT, n=50, attack="pgd-strong", checks=False)
    assert torch.equal(with_checks.attacks["pgd-strong"].right, without.attacks["pgd-strong"].right)
    options = EvaluationOptions(attacks=("pgd-strong",), n=50)
    *_, again = run_evaluation(natural, two_tone[1], THREAT, options)
    assert [check.to_json() for check in again.checks] == [check.to_json() for check in with_checks.checks]


def test_a_model_that_cannot_be_differentiated(two_tone, natural):
    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.one_hot(natural(x).argmax(1), 10).float() * 9 - 1

    assert {"zero_gradient", "eps_curve"} <= list_failed_checks(Counting(), two_tone[1])
