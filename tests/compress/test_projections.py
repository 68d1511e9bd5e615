"""Contract of the projections: feasible, idempotent, nothing feasible nearer; closed forms; hostile inputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from values import any_values, distance, few_values, gaussian

from atmc.compress import projections
from atmc.compress.projections import (
    allocate_ranks,
    keep_largest,
    largest_masks,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def count(masks: Sequence[Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks)


# keep_largest


def reference_masks(tensors: Sequence[Tensor], k: int) -> list[Tensor]:
    """Return the masks by a stable sort: largest first, then by tensor, then by flat index; zeros are never marked."""
    flat = torch.cat([tensor.flatten() for tensor in tensors]).abs()
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[torch.sort(flat, descending=True, stable=True).indices[:k]] = True
    mask &= flat != 0
    parts = mask.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=150, deadline=None)
@given(
    lists=st.lists(st.lists(few_values | any_values, max_size=12), min_size=1, max_size=4),
    k=st.integers(0, 50),
    sample=st.sampled_from([1, 3, 2**18]),
)
def test_masks_equal_a_stable_sort_of_everything(lists: list[list[float]], k: int, sample: int) -> None:
    tensors = [torch.tensor(values) for values in lists]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projections, "SAMPLE_SIZE", sample)  # a tiny sample misses often: the search must widen
        patch.setattr(projections, "BLOCK_SIZE", 5)
        assert_same(largest_masks(tensors, k), reference_masks(tensors, k))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [0, 1, 137, 5_000, 29_999, 30_000, 10**6])
def test_masks_of_every_type_and_shape(dtype: torch.dtype, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "SAMPLE_SIZE", 500)
    tensors = [
        gaussian(100, 200),
        gaussian(0, 3),
        gaussian(10, 10, 3, 3, seed=1),
        torch.zeros(7),
        gaussian(9_100, seed=2),
    ]
    tensors = [tensor.to(dtype) for tensor in tensors]
    masks = largest_masks(tensors, k)
    assert_same(masks, reference_masks(tensors, k))
    kept = keep_largest(tensors, k)
    assert_same(kept, [tensor * mask for tensor, mask in zip(tensors, masks, strict=True)])
    assert all(tensor.dtype == dtype for tensor in kept)
    assert count(masks) == min(k, sum(int(tensor.count_nonzero()) for tensor in tensors))


@pytest.mark.parametrize("k", [1, 999, 50_000, 99_999, 150_000])
@pytest.mark.parametrize("kind", ["equal", "two", "adjacent", "sparse", "ends"])
def test_masks_where_a_sample_misleads(kind: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "SAMPLE_SIZE", 1000)
    x = gaussian(100_000)
    step = float(torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)))
    inputs = {
        "equal": torch.full_like(x, -0.5),
        "two": torch.where(x > 0, 0.5, -0.25),
        "adjacent": torch.where(x > 0, 0.5, -step),
        "sparse": x * (x.abs() > 2.5),
        "ends": torch.cat([x[:50_000] * 1e-3, x[50_000:].sort().values]),
    }
    tensors = [inputs[kind][:30_000], inputs[kind][30_000:]]
    assert_same(largest_masks(tensors, k), reference_masks(tensors, k))


def test_a_sample_that_misses_altogether_is_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "SAMPLE_SIZE", 100)
    x = gaussian(10_100).abs()
    step = 10_100 // 100 | 1
    x[::step] = torch.linspace(50, 60, len(x[::step]))  # every sampled entry is far above the rest
    for k in (1, 99, 101, 5_000):
        assert_same(largest_masks([x], k), reference_masks([x], k))
    x[::step] = 1e-20  # every sampled entry is far below the rest
    for k in (1, 99, 101, 5_000):
        assert_same(largest_masks([x], k), reference_masks([x], k))


def test_ties_go_to_the_first() -> None:
    tensors = [torch.tensor([1.0, -2.0]), torch.tensor([[2.0, 1.0], [-2.0, 3.0]])]
    assert_same(largest_masks(tensors, 3), [torch.tensor([False, True]), torch.tensor([[True, False], [False, True]])])
    assert_same(largest_masks(tensors, 5), [torch.tensor([True, True]), torch.tensor([[True, False], [True, True]])])


def test_the_flat_index_of_a_tensor_that_is_not_contiguous() -> None:
    x = torch.ones(3, 4).t()
    assert_same(largest_masks([x], 4), [torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]]).bool()])


def test_mixed_types_compare_by_value() -> None:
    tensors = [torch.tensor([1.0], dtype=torch.float64), torch.tensor([1.0 + 2**-7], dtype=torch.bfloat16)]
    assert_same(largest_masks(tensors, 1), [torch.tensor([False]), torch.tensor([True])])


def test_empty_arguments() -> None:
    assert largest_masks([], 3) == []
    assert keep_largest([torch.zeros(0, 4)], 3)[0].shape == (0, 4)
    assert count(largest_masks([torch.zeros(5), torch.zeros(0)], 3)) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("k", [0, 1, 500, 2000, 10**6])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_infinity_are_refused(bad: float, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "SAMPLE_SIZE", 100)
    x = gaussian(1000).to(dtype)
    x[777] = bad
    with pytest.raises(ValueError, match="finite"):
        largest_masks([gaussian(1000, seed=1).to(dtype), x], k)


def test_wrong_arguments_of_keep_largest() -> None:
    with pytest.raises(ValueError, match="expected k >= 0, got -1"):
        keep_largest([torch.ones(2)], -1)
    with pytest.raises(ValueError, match=r"floating point numbers, got torch\.int64"):
        largest_masks([torch.ones(2, dtype=torch.int64)], 1)


def test_keep_largest_is_the_nearest_feasible_point() -> None:
    for seed in range(20):
        tensors = [gaussian(6, seed=seed), gaussian(2, 3, seed=seed + 100)]
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        kept = torch.cat([tensor.flatten() for tensor in keep_largest(tensors, 4)])
        best = distance(flat, kept)
        for support in itertools.combinations(range(12), 4):  # the nearest point of every feasible subspace
            other = torch.zeros(12)
            other[list(support)] = flat[list(support)]
            assert best <= distance(flat, other) + 1e-12


def test_keep_largest_is_idempotent_and_leaves_its_input_alone() -> None:
    tensors = [gaussian(50).requires_grad_(), gaussian(5, 5, seed=1)]
    before = [tensor.detach().clone() for tensor in tensors]
    once = keep_largest(tensors, 30)
    assert_same(keep_largest(once, 30), once)
    assert_same(keep_largest(once, 100), once)
    assert not any(tensor.requires_grad for tensor in once)
    once[1].zero_()
    assert_same([tensor.detach() for tensor in tensors], before)


# rank


def test_ranks_go_to_the_largest_singular_values() -> None:
    values = [torch.tensor([9.0, 5.0, 1.0]), torch.tensor([4.0, 3.0])]
    assert allocate_ranks(values, [10, 2], 12) == [1, 1]
    assert allocate_ranks(values, [10, 2], 13) == [1, 1]
    assert allocate_ranks(values, [10, 2], 14) == [1, 2]  # 5.0 does not fit, 3.0 does
    assert allocate_ranks(values, [10, 2], 22) == [2, 1]
    assert allocate_ranks(values, [10, 2], 24) == [2, 2]
    assert allocate_ranks(values, [10, 2], 10**9) == [3, 2]
    assert allocate_ranks([torch.tensor([1.0, 7.0])], [1], 2) == [2]  # in any order
    assert allocate_ranks([torch.tensor([1.0, 0.0, 0.0]), torch.zeros(2)], [1, 1], 9) == [1, 1]  # zeros are not bought
    assert allocate_ranks([torch.ones(3), torch.ones(3)], [1, 1], 5) == [3, 2]  # ties by layer


@settings(max_examples=100, deadline=None)
@given(
    layers=st.lists(
        st.tuples(st.lists(st.floats(0, 10), min_size=1, max_size=5), st.integers(1, 9)), min_size=1, max_size=4
    ),
    extra=st.integers(0, 60),
)
def test_ranks_are_feasible_and_no_layer_could_have_one_more(layers: list[tuple[list[float], int]], extra: int) -> None:
    values = [torch.tensor(layer, dtype=torch.float64).sort(descending=True).values for layer, _ in layers]
    costs = [cost for _, cost in layers]
    budget = sum(costs) + extra
    ranks = allocate_ranks(values, costs, budget)
    left = budget - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    assert left >= 0
    for layer, rank, cost in zip(values, ranks, costs, strict=True):
        assert 1 <= rank <= len(layer)
        assert rank == len(layer) or float(layer[rank]) == 0 or cost > left


def test_equal_costs_keep_the_globally_largest_singular_values() -> None:
    values = [gaussian(8, seed=seed).abs().sort(descending=True).values for seed in range(5)]
    for extra in range(20):
        ranks = allocate_ranks(values, [3] * 5, 3 * (5 + extra))
        rest = torch.cat([layer[1:] for layer in values])
        kept = torch.cat([layer[1:rank] for layer, rank in zip(values, ranks, strict=True)])
        assert float(kept.sum()) == pytest.approx(float(rest.topk(extra).values.sum()))


def test_wrong_arguments_of_allocate_ranks() -> None:
    with pytest.raises(ValueError, match=r"budget of at least 12 .*got 11"):
        allocate_ranks([torch.ones(2), torch.ones(2)], [10, 2], 11)
    with pytest.raises(ValueError, match="one cost per layer, got 1 for 2 layers"):
        allocate_ranks([torch.ones(2), torch.ones(2)], [10], 100)
    with pytest.raises(ValueError, match="costs >= 1"):
        allocate_ranks([torch.ones(2)], [0], 100)
    for bad in (torch.tensor([math.nan]), torch.tensor([-1.0]), torch.ones(0), torch.ones(2, 2)):
        with pytest.raises(ValueError, match="singular values >= 0, at least one, for layer 0"):
            allocate_ranks([bad], [1], 100)
