"""Sparse rank-one terms: planted ones are found, and others are left alone."""

import pytest
import torch
from torch import nn

from atmc.compress.constraints import NonzeroBudget
from atmc.compress.factorize import compressible_parameters, factor_structure
from atmc.compress.metric import Moments, measure_metric
from atmc.compress.projections import keep_largest
from atmc.compress.sparse_factors import factorize_if_it_pays, sparse_terms

SHAPES = {
    "wide, rank 3": (40, 60, 3, 15, 21),
    "tall, rank 2": (80, 30, 2, 30, 12),
    "square, rank 5": (64, 64, 5, 12, 12),
}


def planted(shape: str, seed: int) -> tuple[torch.Tensor, int]:
    """Return W* = U* V* + C* and the number of nonzeros of its factors."""
    out, columns, rank, rows_each, columns_each = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)
    u, v, c = torch.zeros(out, rank), torch.zeros(rank, columns), torch.zeros(out * columns)
    for j in range(rank):
        u[torch.randperm(out, generator=generator)[:rows_each], j] = torch.randn(rows_each, generator=generator)
        v[j, torch.randperm(columns, generator=generator)[:columns_each]] = torch.randn(
            columns_each, generator=generator
        )
    c[torch.randperm(out * columns, generator=generator)[:12]] = torch.randn(12, generator=generator)
    return u @ v + c.view(out, columns), rank * (rows_each + columns_each) + 12


def relative_error(w: torch.Tensor, target: torch.Tensor) -> float:
    return float((w - target).norm() / target.norm())


def fit_under_budget(target: torch.Tensor, nonzeros: int) -> tuple[torch.Tensor, int]:
    """Minimize |W - W*|^2 over W = U V + C under a budget, from W*; return W and the nonzeros that it takes."""
    model = nn.Linear(target.shape[1], target.shape[0], bias=False)
    model.weight.data.copy_(target)
    factorize_if_it_pays(model, nonzeros)
    tensors = compressible_parameters(model)
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 300)
        optimizer.zero_grad()
        ((model.weight - target).square().sum() / 2).backward()
        optimizer.step()
        metric = measure_metric(model, tensors, Moments(), sensitivity=0.1, effects=True, weighted=False)
        projected = NonzeroBudget(nonzeros, keep_alive=True).project(tensors, metric)
        with torch.no_grad():
            for name, value in projected.items():
                tensors[name].copy_(value)
    return model.weight.detach(), sum(int(tensor.count_nonzero()) for tensor in tensors.values())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_planted_factors_are_found_at_twice_their_nonzeros(shape, seed):
    target, nonzeros = planted(shape, seed)
    w, used = fit_under_budget(target, 2 * nonzeros)
    assert used <= 2 * nonzeros
    assert relative_error(w, target) <= 0.1
    assert relative_error(keep_largest([target], 2 * nonzeros)[0], target) > 0.15  # without factors


@pytest.mark.parametrize("shape", SHAPES)
def test_with_a_nonzero_for_every_entry_factors_lose_nothing(shape):
    target, _ = planted(shape, 3)
    w, used = fit_under_budget(target, int(target.count_nonzero()))
    assert used <= int(target.count_nonzero())
    assert relative_error(w, target) < 1e-3


def test_an_outlier_does_not_bend_a_term():
    u, v = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0]), torch.tensor([0.0, 1.0, 2.0, -1.0, 1.5, 1.0])
    matrix = torch.outer(u, v)
    matrix[1, 2] += 50.0
    terms = sparse_terms(matrix, 0.01)
    rest = matrix - terms.u @ terms.v
    assert len(terms.gains) == 1
    assert int((rest.abs() > 1e-4).sum()) == 1
    assert terms.u.count_nonzero() == 4
    assert terms.v.count_nonzero() == 5


def test_noise_has_no_terms_that_pay():
    torch.manual_seed(0)
    matrix = torch.randn(50, 80)
    price = float(matrix.abs().flatten().topk(200).values[-1]) ** 2
    assert sparse_terms(matrix, price, profit=1.0).gains == []
    assert not sparse_terms(torch.zeros(4, 5), 1.0).gains


def test_gains_are_the_decrease_of_the_objective():
    target, _ = planted("wide, rank 3", 4)
    price = 0.3

    def objective(u, v):
        rest = (target - u @ v).square().clamp_max(price).sum()
        return float(rest) + price * int(u.count_nonzero() + v.count_nonzero())

    terms = sparse_terms(target, price)
    for count in range(len(terms.gains)):
        before = objective(terms.u[:, :count], terms.v[:count])
        after = objective(terms.u[:, : count + 1], terms.v[: count + 1])
        assert before - after == pytest.approx(terms.gains[count], rel=1e-3, abs=1e-3)
    assert terms.gains


def test_a_profit_that_is_asked_for_is_made():
    target, _ = planted("wide, rank 3", 5)
    for profit in (0.0, 1.0, 5.0):
        terms = sparse_terms(target, 0.3, profit=profit)
        for j, gain in enumerate(terms.gains):
            assert gain > profit * 0.3 * int(terms.u[:, j].count_nonzero() + terms.v[j].count_nonzero())
    assert not sparse_terms(target, 0.3, profit=1e6).gains


def test_only_weights_that_gain_are_factorized_and_w_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(60, 40))
    target, _ = planted("wide, rank 3", 0)
    with torch.no_grad():
        model[0].weight.normal_()
        model[2].weight.copy_(target + 1e-3 * torch.randn_like(target))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert factorize_if_it_pays(model, 300) == {"2.weight": 3}
    assert set(factor_structure(model)) == {"2.weight"}
    assert torch.allclose(model[2].weight, before["2.weight"], atol=1e-6)
    assert torch.equal(model[0].weight, before["0.weight"])


def test_excluded_weights_and_zero_weights_stay_plain():
    target, _ = planted("wide, rank 3", 0)
    model = nn.Linear(60, 40)
    model.weight.data.copy_(target)
    assert factorize_if_it_pays(model, 300, exclude=("weight",)) == {}
    model.weight.data.zero_()
    assert factorize_if_it_pays(model, 300) == {}


@pytest.mark.parametrize("price", [0.0, -1.0, float("nan")])
def test_a_price_that_makes_no_sense(price):
    with pytest.raises(ValueError, match="price above 0"):
        sparse_terms(torch.ones(3, 3), price)
