"""Contract of the quantizers: feasible, idempotent, never a higher objective, near (or at) the exact optimum."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from values import any_values, distance, few_values, gaussian

from atmc.compress.projections import exact_zero_kmeans, zero_kmeans

Quantizer = Callable[..., tuple[Tensor, Tensor]]


def distinct_nonzeros(q: Tensor) -> int:
    return len(torch.unique(q[q != 0]))


QUANTIZERS = pytest.mark.parametrize("quantize", [zero_kmeans, exact_zero_kmeans])


def samples(n: int, seed: int) -> Tensor:
    """Draw n values of one of five kinds: normal, Cauchy, normal with a gap at 0, lumps, one sign with many ties."""
    x, y = gaussian(n, seed=seed), gaussian(n, seed=seed + 10_000)
    kinds = (x, x / y.abs(), x + x.sign(), (3 * y).round() + 0.1 * x, (20 * x.abs()).ceil() / 7)
    return kinds[seed % len(kinds)]


def brute_force(x: Tensor, levels: int) -> float:
    """Return the least objective over all cuts of the sorted values into intervals, one of which may have center 0."""
    values = sorted(value for value in x.double().tolist() if value != 0)
    n = len(values)

    def spread(i: int, j: int) -> float:
        mean = math.fsum(values[i:j]) / (j - i)
        return math.fsum((value - mean) ** 2 for value in values[i:j])

    best = math.inf
    for clusters in range(1, min(levels + 1, n) + 1):
        for inner in itertools.combinations(range(1, n), clusters - 1):
            cuts = [0, *inner, n]
            errors = [spread(i, j) for i, j in itertools.pairwise(cuts)]
            if clusters <= levels:
                best = min(best, sum(errors))
            for zero, (i, j) in enumerate(itertools.pairwise(cuts)):
                from_zero = math.fsum(value**2 for value in values[i:j])
                best = min(best, sum(errors) - errors[zero] + from_zero)
    return best


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_exact_kmeans_equals_brute_force(levels: int, seed: int) -> None:
    x = torch.cat([samples(9, seed), torch.zeros(2)])
    quantized, _ = exact_zero_kmeans(x, levels)
    assert distance(x, quantized) == pytest.approx(brute_force(x, levels), rel=1e-5, abs=1e-12)


def test_kmeans_by_hand() -> None:
    x = torch.tensor([[0.0, 9.0, 11.0], [-4.0, -4.0, 0.1]])
    for quantize in (zero_kmeans, exact_zero_kmeans):
        quantized, centers = quantize(x, 2)
        assert quantized.tolist() == [[0, 10, 10], [-4, -4, 0]]  # 0.1 is worth no center
        assert centers.tolist() == [-4, 10]
        quantized, centers = quantize(x, 1)
        assert quantized.tolist() == [[0, 10, 10], [0, 0, 0]]
        assert centers.tolist() == [10]


@QUANTIZERS
@settings(max_examples=100, deadline=None)
@given(values=st.lists(few_values | any_values, max_size=30), levels=st.integers(1, 9))
def test_kmeans_is_feasible_and_idempotent(quantize: Quantizer, values: list[float], levels: int) -> None:
    x = torch.tensor(values)
    quantized, centers = quantize(x, levels)
    assert quantized.shape == x.shape
    assert quantized.dtype == x.dtype
    assert not quantized[x == 0].any()
    assert distinct_nonzeros(quantized) <= levels
    assert centers.dtype == torch.float32
    assert torch.equal(centers, torch.unique(quantized[quantized != 0]))  # in order, once each, in use, exact
    again, same = quantize(quantized, levels)
    assert torch.equal(again, quantized)
    assert torch.equal(same, centers)
    assert distance(x, quantized) <= distance(x, torch.zeros_like(x)) * (1 + 1e-9)


@QUANTIZERS
def test_few_distinct_values_come_back_bit_for_bit(quantize: Quantizer) -> None:
    x = torch.tensor([1e-45, -0.0, 0.0, 3.0000002, 3.0, -1e38, 3.0, 1e-45])
    quantized, centers = quantize(x, 4)
    assert torch.equal(quantized.view(torch.int32), x.view(torch.int32))
    assert quantized.data_ptr() != x.data_ptr()
    assert centers.tolist() == torch.tensor([-1e38, 1e-45, 3.0, 3.0000002]).tolist()


@QUANTIZERS
def test_kmeans_of_all_equal_and_of_nothing(quantize: Quantizer) -> None:
    for x, expected in ((torch.full((5,), -0.3), [-0.3]), (torch.zeros(3, 2), []), (torch.zeros(0, 2), [])):
        quantized, centers = quantize(x, 1)
        assert torch.equal(quantized, x)
        assert centers.tolist() == torch.tensor(expected).tolist()


@QUANTIZERS
def test_wrong_arguments_of_kmeans(quantize: Quantizer) -> None:
    with pytest.raises(ValueError, match="expected levels >= 1, got 0"):
        quantize(torch.ones(2), 0)
    with pytest.raises(ValueError, match=r"float32 or float64 tensor, got torch\.bfloat16"):
        quantize(torch.ones(2, dtype=torch.bfloat16), 1)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="finite"):
            quantize(torch.tensor([1.0, bad, 2.0]), 4)
    with pytest.raises(ValueError, match="finite"):
        quantize(torch.tensor([1e300], dtype=torch.float64), 1)


def test_wrong_start_of_kmeans() -> None:
    x = gaussian(20)
    with pytest.raises(ValueError, match="at most 2 nonzero centers"):
        zero_kmeans(x, 2, centers=torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="all finite"):
        zero_kmeans(x, 2, centers=torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="expected iterations >= 0, got -1"):
        zero_kmeans(x, 2, iterations=-1)


@QUANTIZERS
def test_double_precision_is_rounded_to_single(quantize: Quantizer) -> None:
    x = gaussian(100).double() + 1e-12
    quantized, centers = quantize(x, 4)
    single, same = quantize(x.float(), 4)
    assert quantized.dtype == torch.float64
    assert torch.equal(quantized, single.double())
    assert torch.equal(centers, same)


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("levels", [1, 2, 7, 40])
def test_no_iteration_raises_the_objective(levels: int, seed: int) -> None:
    x = samples(400, seed)
    starts = (None, gaussian(levels, seed=seed), 100 + torch.arange(levels), torch.full((1,), 1e-20), torch.ones(0))
    for start in starts:
        errors = [distance(x, zero_kmeans(x, levels, centers=start, iterations=i)[0]) for i in (*range(9), 100)]
        for before, after in itertools.pairwise(errors):
            assert after <= before * (1 + 1e-12)
        if start is not None:
            points = torch.cat([start.float(), torch.zeros(1)])
            nearest = points[(x[:, None].double() - points.double()).abs().argmin(dim=1)]
            assert errors[0] == pytest.approx(distance(x, torch.where(x == 0, 0, nearest)), rel=1e-12)


def test_the_result_is_a_fixed_point_of_lloyd() -> None:
    for seed in range(10):
        x = samples(300, seed)
        quantized, centers = zero_kmeans(x, 6, iterations=1000)
        points = torch.cat([centers, torch.zeros(1)])
        nearest = points[(x[:, None] - points).abs().argmin(dim=1)]
        assert distance(x, nearest) == pytest.approx(distance(x, quantized), rel=1e-6)
        for center in centers:
            assert float(x[quantized == center].double().mean()) == pytest.approx(float(center), rel=1e-6)
        assert torch.equal(zero_kmeans(x, 6, centers=centers)[0], quantized)


def test_no_level_is_wasted() -> None:
    x = gaussian(500)
    for start in (None, torch.tensor([0.1]), torch.full((16,), 50.0), torch.linspace(-1e-6, 1e-6, 16)):
        _, centers = zero_kmeans(x, 16, centers=start)
        assert len(centers) == 16


def test_an_entry_between_two_centers_goes_to_the_nearest() -> None:
    x = samples(1000, seed=3)
    for levels in (1, 5, 16):
        quantized, centers = zero_kmeans(x, levels)
        points = torch.cat([centers, torch.zeros(1)]).double()
        assert torch.equal((x.double() - quantized.double()).abs(), (x.double()[:, None] - points).abs().amin(dim=1))


def test_kmeans_is_near_the_exact_optimum() -> None:
    ratios = []
    for seed in range(150):
        x = samples(20 + 3 * seed % 200, seed)
        levels = (1, 2, 3, 4, 8, 16)[seed % 6]
        exact, near = (distance(x, quantize(x, levels)[0]) for quantize in (exact_zero_kmeans, zero_kmeans))
        assert near >= exact * (1 - 1e-6)
        ratios.append(near / exact if exact > 1e-9 else 1.0)
    assert statistics.median(ratios) <= 1.01
    assert sorted(ratios)[135] <= 1.1
    assert max(ratios) <= 1.6


def test_many_levels_stay_near_the_exact_optimum() -> None:
    for seed in range(3):
        x = samples(3000, seed)
        exact, near = (distance(x, quantize(x, 128)[0]) for quantize in (exact_zero_kmeans, zero_kmeans))
        assert exact * (1 - 1e-6) <= near <= 1.06 * exact


def test_normal_values_reach_the_rate_of_panter_and_dite() -> None:
    x = gaussian(200_000)
    quantized, centers = zero_kmeans(x, 255)
    assert len(centers) == 255
    optimum = math.sqrt(3) * math.pi / 2 / 256**2  # mean squared error of 256 optimal levels, variance 1
    assert distance(x, quantized) / len(x) <= 1.01 * optimum


def test_a_warm_start_is_as_good_and_order_and_repetition_change_nothing() -> None:
    x = gaussian(5000)
    cold, centers = zero_kmeans(x, 32)
    moved = x + 0.01 * gaussian(5000, seed=1)
    warm, _ = zero_kmeans(moved, 32, centers=centers)
    assert distance(moved, warm) <= 1.02 * distance(moved, zero_kmeans(moved, 32)[0])
    assert torch.equal(zero_kmeans(x, 32)[0], cold)
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(zero_kmeans(x[order].view(50, 100), 32)[0].flatten(), cold[order])
    shuffled = centers.flip(0).repeat_interleave(2)
    assert torch.equal(zero_kmeans(moved, 32, centers=shuffled)[0], warm)


@pytest.mark.parametrize("seed", range(20))
def test_no_iteration_raises_the_objective_of_neighboring_floats(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randint(0, 40, (60,), generator=generator, dtype=torch.int32)
    x = (torch.ones(60).view(torch.int32) + offsets).view(torch.float32) * (-1.0) ** torch.arange(60)
    for levels in (5, 8, 20):
        errors = [distance(x, zero_kmeans(x, levels, iterations=i)[0]) for i in (*range(9), 100)]
        assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))


def test_borders_are_not_rounded_across_a_value() -> None:
    one = torch.ones(1).view(torch.int32)
    x = torch.cat([(one + steps).view(torch.float32) for steps in (0, 2, 3)])
    centers = x[[0, 2]]  # their midpoint, 1.5 steps above 1, would round to the middle value
    assert torch.equal(zero_kmeans(x, 2, centers=centers, iterations=0)[0], x[[0, 2, 2]])


def test_centers_without_entries_are_not_returned() -> None:
    x = gaussian(100).abs()
    _, centers = zero_kmeans(x, 4, centers=torch.tensor([-3.0, 1.0, 2.0, 1e9]), iterations=0)
    assert centers.tolist() == [1.0, 2.0]


def test_tiny_and_huge_values_together() -> None:
    x = torch.cat([gaussian(200) * 1e-30, gaussian(200, seed=1), gaussian(200, seed=2) * 1e30])
    for quantize in (zero_kmeans, exact_zero_kmeans):
        quantized, centers = quantize(x, 12)
        assert len(centers) <= 12
        assert bool(quantized.isfinite().all())
        assert distance(x, quantized) <= 0.05 * distance(x, torch.zeros_like(x))


@given(seed=st.integers(0, 10**6), levels=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_whole_weights_are_repeated_entries(seed, levels):
    """An entry of weight 3 counts like three equal entries, in the exact optimum and in Lloyd's iterations."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, generator=generator)
    x[::5] = 0
    weights = torch.randint(1, 4, (30,), generator=generator)
    repeated = x.repeat_interleave(weights)
    for solve in (exact_zero_kmeans, zero_kmeans):
        quantized, _ = solve(x, levels, weights=weights.float())
        expected, _ = solve(repeated, levels)
        error = float((weights * (x - quantized).double().square()).sum())
        assert error == pytest.approx(float((repeated - expected).double().square().sum()), rel=0.25, abs=1e-9)
        if solve is exact_zero_kmeans:
            assert error == pytest.approx(float((repeated - expected).double().square().sum()), rel=1e-5, abs=1e-9)


def test_equal_weights_change_nothing_and_tiny_ones_do_not_divide_by_zero():
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    for solve in (exact_zero_kmeans, zero_kmeans):
        plain = solve(x, 4)
        assert torch.allclose(solve(x, 4, weights=torch.full((500,), 7.0))[0], plain[0], atol=1e-6)
        assert torch.allclose(solve(x, 4, weights=torch.zeros(500))[0], plain[0], atol=1e-6)
        assert solve(x, 4, weights=torch.rand(500) * 1e-30)[0].isfinite().all()


@pytest.mark.parametrize("weights", [torch.ones(3), torch.tensor([1.0, -1.0]), torch.tensor([1.0, float("nan")])])
def test_weights_that_make_no_sense(weights):
    for solve in (exact_zero_kmeans, zero_kmeans):
        with pytest.raises(ValueError, match="weights >= 0 of shape"):
            solve(torch.tensor([1.0, 2.0]), 1, weights=weights)
