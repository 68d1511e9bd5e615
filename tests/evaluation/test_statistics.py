"""Figures, comparisons, saved examples, curves, pictures and certificates against closed forms."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import beta, binom, binomtest, norm
from torch import nn

import atmc
from atmc.data import Images
from atmc.evaluation import adversarial_file, smoothing
from atmc.evaluation.accuracy import robust_accuracy
from atmc.evaluation.curves import STEPS, at_eps, at_steps, eps_grid
from atmc.evaluation.statistics import Accuracy, binomial_tail, compare, paired_difference, per_class, worst_case
from atmc.report.gallery import draw_gallery, select_fooled
from atmc.robust.threats import L2, Linf


def threshold_model(steepness: float = 10.0) -> nn.Module:
    """Build a model of class 1 if the first of 4 pixels is above 0.5."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].weight[1, 0] = steepness
        model[1].bias.copy_(torch.tensor([steepness / 2, 0.0]))
    return model


def ramp(n: int = 100) -> Images:
    pixels = torch.full((n, 1, 2, 2), 0.5)
    pixels[:, 0, 0, 0] = (torch.arange(n) + 0.5) / n
    return Images(pixels, (pixels[:, 0, 0, 0] > 0.5).long())


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_is_the_exact_binomial_test(verdicts):
    a, b = (torch.tensor([pair[side] for pair in verdicts]) for side in (0, 1))
    comparison = compare(a, b)
    apart = comparison.only_a + comparison.only_b
    assert apart == int((a != b).sum())
    expected = binomtest(comparison.only_a, apart, 0.5).pvalue if apart else 1.0
    assert comparison.p == pytest.approx(expected)


def test_comparison_in_words():
    better = compare(torch.ones(20, dtype=torch.bool), torch.zeros(20, dtype=torch.bool))
    assert better.to_json()["verdict"] == "A is better"
    assert (
        compare(torch.zeros(20, dtype=torch.bool), torch.ones(20, dtype=torch.bool)).to_json()["verdict"]
        == "B is better"
    )
    assert compare(torch.tensor([True]), torch.tensor([False])).to_json()["verdict"] == "no difference shown"
    with pytest.raises(ValueError, match="same examples, got 1 and 2"):
        compare(torch.ones(1, dtype=torch.bool), torch.ones(2, dtype=torch.bool))
    assert binomial_tail(7, 10) == pytest.approx(binom.sf(6, 10, 0.5))


def test_reports_of_other_images_are_not_compared():
    model, images = threshold_model(), ramp()
    one = atmc.evaluate(model, images, threat=Linf(0.1), checks=False)
    two = atmc.evaluate(model, images.take(slice(0, 50)), threat=Linf(0.1), checks=False)
    with pytest.raises(ValueError, match="same images"):
        one.compared(two)
    assert one.compared(one)["pgd"].p == 1.0


def test_worst_case_and_classes():
    one, two = Accuracy.of(torch.tensor([True, False, True, True])), Accuracy.of(torch.tensor([True, True, False]))
    assert worst_case([one, two]).right.tolist() == [True, False, False]
    rows = per_class(one, torch.tensor([5, 5, 7, 7, 9]))
    assert [(row["class"], row["accuracy"], row["n"]) for row in rows] == [(5, 0.5, 2), (7, 1.0, 2)]


def test_curves_of_a_threshold():
    """Those within eps of the threshold fall: 1 - 2 eps remain."""
    for eps in eps_grid(Linf(0.1), 1):
        point = at_eps(threshold_model(), ramp(), Linf(0.1), eps)
        assert (point["eps"], point["n"]) == (eps, 100)
        assert point["accuracy"] == pytest.approx(1 - 2 * eps, abs=0.011)
    for steps in STEPS:
        point = at_steps(threshold_model(), ramp(), Linf(0.1), steps)
        assert (point["steps"], point["n"]) == (steps, 100)
        assert point["accuracy"] == pytest.approx(0.8)
    assert max(eps_grid(Linf(0.4), 1)) <= 1
    assert len(eps_grid(Linf(0.1), 1)) == 9


class TestExamples:
    def kept(self) -> tuple[nn.Module, Images, dict[str, Accuracy]]:
        model, images = threshold_model(), ramp()
        attacks = {name: robust_accuracy(model, images, Linf(0.1), name, keep=True) for name in ("fgsm", "pgd")}
        return model, images, attacks

    def test_round_trip_and_replay(self, tmp_path):
        model, images, attacks = self.kept()
        written = adversarial_file.collect(model, images.labels, attacks, threat="linf:0.1")
        written.save(tmp_path / "e.npz")
        read = adversarial_file.read(tmp_path / "e.npz")
        assert torch.equal(read.adv, written.adv)
        assert read.about == {"attacks": ["fgsm", "pgd"], "threat": "linf:0.1"}
        assert int(read.fooled.sum()) == 20
        assert torch.equal(read.adv[~read.fooled], images.pixels[~read.fooled])
        again = adversarial_file.replay(tmp_path / "e.npz", model)
        assert again.agreement.accuracy == 1.0
        assert again.accuracy.accuracy == pytest.approx(again.attacked_accuracy) == pytest.approx(0.8)

    def test_another_engine(self, tmp_path):
        """A NumPy function that has the threshold a little higher disagrees where the images fall between."""
        model, images, attacks = self.kept()
        examples = adversarial_file.collect(model, images.labels, attacks)
        examples.save(tmp_path / "e.npz")
        first = examples.adv[:, 0, 0, 0].numpy()

        def engine(x: np.ndarray) -> np.ndarray:
            assert x.dtype == np.float32
            return np.stack([np.full(len(x), 0.58), x[:, 0, 0, 0]], 1)

        seen = adversarial_file.replay(tmp_path / "e.npz", engine, batch_size=30)
        assert seen.agreement.accuracy == pytest.approx(1 - np.mean((first > 0.5) & (first <= 0.58)))

    def test_no_pickle(self, tmp_path):
        np.savez(tmp_path / "evil.npz", adv=np.array([{}], dtype=object))
        (tmp_path / "text.npz").write_text("x")
        for name in ("evil.npz", "text.npz"):
            with pytest.raises(ValueError, match="holds no saved adversarial examples"):
                adversarial_file.read(tmp_path / name)
        with pytest.raises(ValueError, match="there is no file"):
            adversarial_file.read(tmp_path / "no.npz")

    def test_refused(self, tmp_path):
        model, images, attacks = self.kept()
        bare = robust_accuracy(model, images, Linf(0.1), "pgd")
        with pytest.raises(ValueError, match="keep=True"):
            adversarial_file.collect(model, images.labels, {"pgd": bare})
        adversarial_file.collect(model, images.labels, attacks).save(tmp_path / "e.npz")
        with pytest.raises(ValueError, match="does not take images of shape"):
            adversarial_file.replay(tmp_path / "e.npz", nn.Sequential(nn.Flatten(), nn.Linear(9, 2)))


class TestGallery:
    def test_pictures_are_where_they_should_be(self):
        """The three pictures of the first row hold the clean image, the change and the adversarial image."""
        model, images = threshold_model(), ramp()
        accuracy = robust_accuracy(model, images, Linf(0.1), "pgd", keep=True)
        shown = select_fooled(model, images.pixels, accuracy.adv, images.labels, count=3)
        assert [example.index for example in shown] == [40, 41, 42]
        with Image.open(io.BytesIO(draw_gallery(shown, Linf(0.1)))) as image:
            pixels = np.asarray(image.convert("RGB"))
        side, top = 112, 22
        clean, attacked = pixels[top : top + side, 8 : 8 + side], pixels[top : top + side, 248 : 248 + side]
        assert clean[10, 10].tolist() == [round(float(images.pixels[40, 0, 0, 0]) * 255)] * 3
        assert attacked[10, 10].tolist() == [round(float(accuracy.adv[40, 0, 0, 0]) * 255)] * 3
        assert clean[100, 100].tolist() == [128] * 3
        change = pixels[top : top + side, 128 : 128 + side]
        assert change[10, 10].tolist() != change[100, 100].tolist()

    def test_nothing_to_draw(self):
        images = ramp()
        assert select_fooled(threshold_model(), images.pixels, images.pixels, images.labels) == []
        with Image.open(io.BytesIO(draw_gallery([], Linf(0.1)))) as picture:
            assert np.asarray(picture).min() < 100  # a line of text


def certify(images: Images, *, samples: int, seed: int = 0) -> smoothing.SmoothingCertificate:
    """Return the certificate of the threshold model on all images, at sigma 0.2."""
    model = threshold_model()
    radii, answered = zip(
        *(smoothing.certify_radius(model, images, i, 0.2, samples=samples, seed=seed) for i in range(len(images))),
        strict=True,
    )
    return smoothing.SmoothingCertificate(
        radii=torch.tensor(radii, dtype=torch.float64), abstained=answered.count(False), sigma=0.2, samples=samples
    )


class TestCertificate:
    """Of a threshold on one pixel the smoothed classifier has exactly the distance to the threshold as its radius."""

    def test_never_beyond_the_truth_and_close_to_it(self):
        images = ramp(20)
        certificate = certify(images, samples=4000)
        truth = (images.pixels[:, 0, 0, 0].double() - 0.5).abs()
        certain = certificate.radii >= 0
        assert (certificate.radii <= truth).all()
        limit = 0.2 * norm.ppf(0.001 ** (1 / 4000))
        assert (certificate.radii[certain] >= 0.85 * truth[certain].clamp_max(limit) - 0.02).all()
        assert certificate.abstained == int((certificate.radii < 0).sum())
        assert certificate.at(0.1).accuracy == pytest.approx(float((certificate.radii >= 0.1).double().mean()))

    def test_bound_is_clopper_and_pearsons(self):
        for hits, n in ((90, 100), (100, 100), (51, 100)):
            low = smoothing.lower_bound(hits, n, 0.01)
            assert binom.sf(hits - 1, n, low) == pytest.approx(0.01, rel=1e-6)
        assert smoothing.lower_bound(0, 10) == 0.0
        assert beta.cdf(smoothing.lower_bound(100, 100), 100, 1) == pytest.approx(0.001)

    def test_wrong_classes_are_not_certified(self):
        images = ramp(20)
        wrong = Images(images.pixels, 1 - images.labels)
        certificate = certify(wrong, samples=500)
        assert (certificate.radii < 0).all()

    def test_depends_on_the_seed_alone(self):
        one, two = (certify(ramp(10), samples=200).radii for _ in range(2))
        assert torch.equal(one, two)
        other = certify(ramp(10), samples=200, seed=1).radii
        assert not torch.equal(one, other)

    @pytest.mark.parametrize(
        ("threat", "sigma", "samples", "message"),
        [
            (Linf(0.1), 0.1, 1000, "certifies l2 only"),
            (L2(0.1), 0.0, 1000, "sigma > 0"),
            (L2(0.1), math.inf, 1000, "finite sigma"),
            (L2(0.1), 0.1, 10, "at least 100 samples"),
        ],
    )
    def test_refused(self, threat, sigma, samples, message):
        with pytest.raises(ValueError, match=message):
            smoothing.check_settings(threat, sigma, samples)


class TestPairedDifference:
    def test_one_pair_is_the_normal_interval_of_paired_differences(self):
        generator = torch.Generator().manual_seed(0)
        a = torch.rand(1, 5000, generator=generator) < 0.85
        b = torch.where(torch.rand(1, 5000, generator=generator) < 0.1, ~a, a)
        differences = (a.double() - b.double())[0]
        result = paired_difference(a, b)
        half = 1.96 * float(differences.std()) / math.sqrt(5000)
        assert result.difference == pytest.approx(float(differences.mean()))
        assert result.high - result.low == pytest.approx(2 * half, rel=0.06)
        assert (result.low + result.high) / 2 == pytest.approx(result.difference, abs=0.1 * half)

    def test_pairs_that_differ_widen_the_interval_and_images_that_all_share_do_not_narrow_it(self):
        generator = torch.Generator().manual_seed(1)
        b = torch.rand(1, 2000, generator=generator) < 0.8
        a = b | (torch.rand(1, 2000, generator=generator) < 0.05)
        alone, copied = paired_difference(a, b), paired_difference(a.expand(3, -1), b.expand(3, -1))
        assert copied.high - copied.low == pytest.approx(alone.high - alone.low, rel=0.1)
        better = torch.cat((a, b, a | (torch.rand(1, 2000, generator=generator) < 0.2)))
        varied = paired_difference(better, b.expand(3, -1))
        assert varied.high - varied.low > 1.5 * (alone.high - alone.low)

    def test_coverage_with_random_pairs_and_images(self):
        """Images and pairs have effects of their own: the interval covers the true difference at least as often."""
        generator, covered = torch.Generator().manual_seed(2), 0
        for trial in range(200):
            image, pair = torch.randn(1, 400, generator=generator), torch.randn(8, 1, generator=generator)
            a = image + 0.2 * pair + torch.randn(8, 400, generator=generator) > 0
            b = image + torch.randn(8, 400, generator=generator) > 0
            result = paired_difference(a, b, seed=trial)
            covered += result.low <= 0 <= result.high
        assert covered >= 180

    def test_is_antisymmetric_up_to_the_bootstrap_and_repeats(self):
        a = torch.rand(3, 500, generator=torch.Generator().manual_seed(3)) < 0.7
        one, other = paired_difference(a, ~a), paired_difference(~a, a)
        assert one.difference == -other.difference
        assert one.low == pytest.approx(-other.high)
        assert paired_difference(a, ~a) == one

    @pytest.mark.parametrize("shape", [(2, 10), (3, 9), (30,), (0, 10)])
    def test_other_shapes_are_refused(self, shape):
        with pytest.raises(ValueError, match="as many models on as many images"):
            paired_difference(torch.ones(3, 10, dtype=torch.bool), torch.ones(shape, dtype=torch.bool))
