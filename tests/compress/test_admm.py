"""Constraints' contract, and ADMM on problems with known answers."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atmc.compress.admm import Admm
from atmc.compress.budget import Budget, distinct_nonzero, nominal_bits
from atmc.compress.constraints import Codebook, FixedCodes, FixedMask, InOrder, NonzeroBudget
from atmc.compress.projections import exact_zero_kmeans


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(4, 6, generator=generator),
        "b": torch.randn(10, generator=generator) * 3,
        "c": torch.randn(2, 3, 5, generator=generator) / 2,
    }


def count(values) -> int:
    return sum(int(value.count_nonzero()) for value in values.values())


def few_levels(values, bits: int) -> bool:
    return all(distinct_nonzero(value) <= 2**bits for value in values.values())


MASK = FixedMask({name: value > 0 for name, value in tensors(1).items()})
CODES = FixedCodes.of(Codebook(2).project(NonzeroBudget(40).project(tensors(2))))
CONSTRAINTS = {
    "nonzeros": (NonzeroBudget(17), lambda v: count(v) <= 17),
    "mask": (MASK, lambda v: all(not v[n][~MASK.masks[n]].any() for n in v)),
    "codes": (CODES, lambda v: few_levels(v, 2) and count(v) <= 40),
    "codebook": (Codebook(2), lambda v: few_levels(v, 2)),
    "exact codebook": (Codebook(2, exact_below=100), lambda v: few_levels(v, 2)),
    "mixed codebook": (Codebook({"a": 1, "b": 2, "c": 3}), lambda v: few_levels({"a": v["a"]}, 1) and few_levels(v, 3)),
    "both": (InOrder((NonzeroBudget(17), Codebook(1))), lambda v: few_levels(v, 1) and count(v) <= 17),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
@given(seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_constraint_contract(name, seed):
    """Feasible, idempotent, shapes kept, and the input untouched."""
    constraint, feasible = CONSTRAINTS[name]
    values = tensors(seed)
    before = {key: value.clone() for key, value in values.items()}
    projected = constraint.project(values)
    assert feasible(projected)
    assert all(projected[key].shape == value.shape for key, value in values.items())
    again = constraint.project(projected)
    assert all(torch.equal(again[key], projected[key]) for key in values)
    assert all(torch.equal(values[key], before[key]) for key in values)


@pytest.mark.parametrize("name", ["nonzeros", "mask", "codes"])
def test_exact_projections_have_no_nearer_feasible_point(name):
    constraint, _ = CONSTRAINTS[name]
    values = tensors(5)

    def distance(point):
        return sum(float((point[key] - values[key]).square().sum()) for key in values)

    nearest = constraint.project(values)
    for seed in range(200):
        other = tensors(seed + 10)
        blend = {key: nearest[key] + (seed % 10 + 1) / 100 * other[key] for key in values}
        for candidate in (other, blend):
            assert distance(constraint.project(candidate)) >= distance(nearest) - 1e-5


def test_mask_leaves_no_negative_zeros():
    kept = FixedMask({"a": torch.tensor([False])}).project({"a": torch.tensor([-1.0])})["a"]
    assert not torch.signbit(kept).item()


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: NonzeroBudget(0), "at least 1"), (lambda: Codebook(9), "1 to 8"), (lambda: Codebook({"a": 0}), "1 to 8")],
)
def test_constraints_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class TestBudget:
    def test_paper_ratio(self):
        assert Budget(ratio=0.0015).resolve(430_500) == 645
        assert Budget(nonzeros=7).resolve(10) == 7

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({}, "exactly one"),
            ({"ratio": 0.1, "nonzeros": 3}, "exactly one"),
            ({"ratio": 0.0}, "a ratio > 0 and <= 1"),
            ({"ratio": 1.5}, "a ratio > 0 and <= 1"),
            ({"ratio": float("nan")}, "a ratio > 0 and <= 1"),
            ({"nonzeros": 0}, "nonzeros >= 1"),
            ({"ratio": 0.1, "bits": 9}, "bits >= 1 and <= 8"),
        ],
    )
    def test_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            Budget(**settings)

    def test_larger_than_the_model_or_below_its_floor(self):
        with pytest.raises(ValueError, match="larger than the model: 10 weights"):
            Budget(nonzeros=11).resolve(10)
        with pytest.raises(ValueError, match="below the floor of this model and method, 4"):
            Budget(nonzeros=3).resolve(10, floor=4)

    def test_nominal_bits_by_hand(self):
        values = {"big": torch.tensor([1.0, 2.0] * 10 + [0.0] * 9), "small": torch.tensor([1.0, 0.0, 5.0])}
        assert nominal_bits(values, None) == 32 * 22
        assert nominal_bits(values, 2) == (1 * 20 + 32 * 2) + 32 * 2  # two values need one bit
        assert nominal_bits({"w": torch.tensor([1.0, 2.0, 3.0] * 10)}, 2) == 2 * 30 + 32 * 3
        assert nominal_bits({"w": torch.ones(9)}, 2) == 32  # a single value needs no bit to tell it apart
        assert nominal_bits({"w": torch.arange(1.0, 10.0)}, 2) == 32 * 9  # not quantized yet


def dense_z_and_u(admm: Admm, name: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return z and u of one tensor as dense tensors."""
    state, z, u = admm.states[name], torch.zeros(size), torch.zeros(size)
    z[state.positions], u[state.positions] = state.z, state.u
    return z, u


class TestAdmm:
    def test_first_step_by_hand(self):
        theta = {"w": torch.tensor([0.0, 1.0, 1.2, 3.0])}
        admm = Admm(Codebook(1)).step(theta)
        z, u = dense_z_and_u(admm, "w", 4)
        assert torch.allclose(z, exact_zero_kmeans(theta["w"], 2)[0])
        assert torch.allclose(u, theta["w"] - z)
        assert len(admm.states["w"].positions) == 3
        assert admm.primal == pytest.approx(float((theta["w"] - z).norm()), rel=1e-6)
        assert admm.dual == pytest.approx(0.1 * float(z.norm()), rel=1e-6)
        assert Admm(Codebook(1), rho=0.1).step(theta).state()["relative_primal"] == admm.relative_primal

    def test_penalty_gradient_is_the_gradient_of_the_penalty(self):
        theta = {"w": torch.randn(20, requires_grad=True)}
        with torch.no_grad():
            theta["w"][:12] = 0
        admm = Admm(Codebook(1), rho=0.7).step(theta)
        with torch.no_grad():
            theta["w"][10:14] = torch.tensor([0.5, -1.0, 0.0, 2.0])  # the support has moved since
        z, u = dense_z_and_u(admm, "w", 20)
        penalty = 0.7 / 2 * (theta["w"] - z + u).square().sum()
        (gradient,) = torch.autograd.grad(penalty, theta["w"])
        theta["w"].grad = torch.ones(20)
        admm.add_penalty_gradient(theta)
        assert torch.allclose(theta["w"].grad, 1 + gradient, atol=1e-6)

    def test_nothing_before_the_first_step(self):
        theta = {"w": torch.ones(3, requires_grad=True)}
        theta["w"].grad = torch.zeros(3)
        Admm(Codebook(1)).add_penalty_gradient(theta)
        assert not theta["w"].grad.any()

    def test_sparse_state_equals_dense_admm(self):
        """Against the textbook update on whole tensors, over a support that moves."""
        generator = torch.Generator().manual_seed(0)
        theta = {"w": torch.zeros(40)}
        admm, expected_u = Admm(Codebook(2)), torch.zeros(40)
        for _ in range(6):
            theta["w"] = NonzeroBudget(10).project({"w": theta["w"] + torch.randn(40, generator=generator)})["w"]
            admm = admm.step(theta)
            z, u = dense_z_and_u(admm, "w", 40)
            expected_u = expected_u + theta["w"] - z
            assert torch.allclose(u, expected_u, atol=1e-6)
            assert distinct_nonzero(z) <= 4
            assert len(admm.states["w"].positions) <= 40

    def test_state_round_trip(self):
        theta = tensors(3)
        one = Admm(Codebook(2)).step(theta)
        two = Admm(Codebook(2)).restored(one.state())
        moved = tensors(4)
        one, two = one.step(moved), two.step(moved)
        assert one.primal == two.primal
        assert all(torch.equal(one.states[name].u, two.states[name].u) for name in moved)

    def test_least_squares_with_a_sparse_two_valued_truth_is_recovered(self):
        """min |A w - A w*|^2 with 12 nonzeros among 60 that take two values: the solution is recovered."""
        generator = torch.Generator().manual_seed(1)
        design = torch.randn(200, 60, generator=generator)
        truth = torch.zeros(60)
        chosen = torch.randperm(60, generator=generator)[:12]
        truth[chosen[:6]], truth[chosen[6:]] = 1.0, -2.0
        target = design @ truth
        theta = {"w": torch.zeros(60, requires_grad=True)}
        budget, admm = NonzeroBudget(12), Admm(Codebook(1), rho=0.1)
        for step in range(400):
            loss = (design @ theta["w"] - target).square().mean() / 2
            theta["w"].grad = None
            loss.backward()
            admm.add_penalty_gradient(theta)
            with torch.no_grad():
                theta["w"] -= 0.3 * theta["w"].grad
                theta["w"].copy_(budget.project({"w": theta["w"]})["w"])
            if step % 5 == 0:
                admm = admm.step({"w": theta["w"].detach()})
        estimate = InOrder((budget, Codebook(1))).project({"w": theta["w"].detach()})["w"]
        assert torch.allclose(estimate, truth, atol=1e-3)
        assert admm.primal < 1e-2
        assert admm.dual < 1e-2

    def test_relative_residuals_by_hand(self):
        theta = {"w": torch.tensor([1.0, 1.5, 4.0])}
        admm = Admm(Codebook(1), rho=7.0).step(theta)
        z, u = dense_z_and_u(admm, "w", 3)
        assert admm.relative_primal == pytest.approx(float((theta["w"] - z).norm() / theta["w"].norm()), rel=1e-6)
        assert admm.relative_dual == pytest.approx(float(z.norm() / u.norm()), rel=1e-6)

    @pytest.mark.parametrize("rho", [1e-4, 1.0, 1e4])
    def test_balancing_moves_rho_toward_the_larger_relative_residual(self, rho):
        """z comes from 0, which is a large change beside u; then it stays, while theta remains away from it."""
        theta = {"w": torch.tensor([1.0, 1.5, 4.0])}
        balanced, plain = Admm(Codebook(1), rho=rho, balance=True).step(theta), Admm(Codebook(1), rho=rho).step(theta)
        assert balanced.rho == rho / 2
        assert torch.allclose(balanced.states["w"].u, plain.states["w"].u * 2)
        pair = {"w": torch.tensor([10.0, 11.0, 40.0])}
        settled = Admm(Codebook(1), rho=rho).step(pair)  # z = (10.5, 10.5, 40) stays, and 10 and 11 stay away from it
        assert replace(settled, balance=True).step({"w": torch.tensor([10.0, 11.0, 40.001])}).rho == 2 * rho

    def test_the_pull_is_the_proximal_step_of_the_penalty(self):
        """The argmin of |t - theta|^2 / 2 + lr rho/2 |t - z + u|^2, where theta is not zero."""
        start = {"w": torch.tensor([1.0, 1.2, 3.0, 0.0])}
        admm = Admm(Codebook(1), rho=5.0).step(start)
        z, u = dense_z_and_u(admm, "w", 4)
        theta = {"w": torch.tensor([0.7, 1.4, 2.0, 0.0])}
        before = theta["w"].double().clone()
        admm.pull(theta, 0.1)
        t = before.clone().requires_grad_()
        for _ in range(200):
            loss = (t - before).square().sum() / 2 + 0.5 / 2 * (t - z + u).square().sum()
            (gradient,) = torch.autograd.grad(loss, t)
            t = (t - 0.5 * gradient).detach().requires_grad_()
        assert torch.allclose(theta["w"][:3].double(), t[:3].detach(), atol=1e-6)
        assert theta["w"][3] == 0

    def test_no_pull_before_the_first_step(self):
        theta = {"w": torch.tensor([1.0, 2.0])}
        Admm(Codebook(1)).pull(theta, 1.0)
        assert theta["w"].tolist() == [1.0, 2.0]

    def test_weights_move_the_codebook_to_the_entries_that_matter(self):
        theta = {"w": torch.tensor([1.0, 2.0, 10.0])}
        admm = Admm(Codebook(1)).step(theta, {"w": torch.tensor([9.0, 1.0, 1.0])})
        z, _ = dense_z_and_u(admm, "w", 3)
        assert torch.allclose(z, torch.tensor([1.1, 1.1, 10.0]))

    @pytest.mark.parametrize("rho", [0.0, -1.0, float("nan"), float("inf")])
    def test_rho_that_makes_no_sense(self, rho):
        with pytest.raises(ValueError, match="rho > 0"):
            Admm(Codebook(1), rho=rho)


def layer(u=None, v=None, c=None):
    """Return the tensors of one factorized layer, by name."""
    given = {"U": u, "V": v, "C": c}
    return {f"layer.{name}": torch.tensor(value) for name, value in given.items() if value is not None}


ALIVE = {
    "svd, the largest product": (
        layer(u=[[0.1, 0.2], [0.0, 0.0]], v=[[0.3, 0.0], [0.0, 0.2]], c=[[0.0, 0.0], [0.0, 0.0]]),
        {"layer.U": [[0.0, 0.2], [0.0, 0.0]], "layer.V": [[0.0, 0.0], [0.0, 0.2]]},
    ),
    "svd, an entry of C": (
        layer(u=[[0.1, 0.0], [0.0, 0.0]], v=[[0.1, 0.0], [0.0, 0.0]], c=[[0.0, 0.3], [0.0, 0.0]]),
        {"layer.C": [[0.0, 0.3], [0.0, 0.0]]},
    ),
    "left, at its start": (
        layer(u=[[0.0, 0.0], [0.0, 0.0]], v=[[0.1, 0.4, 0.0], [0.0, 0.0, 0.0]], c=[[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        {"layer.V": [[0.0, 0.4, 0.0], [0.0, 0.0, 0.0]]},
    ),
    "without C": (
        layer(u=[[0.5], [0.1]], v=[[0.2, 0.3]]),
        {"layer.U": [[0.5], [0.0]], "layer.V": [[0.0, 0.3]]},
    ),
}


@pytest.mark.parametrize("name", ALIVE)
def test_a_layer_of_small_factors_keeps_what_makes_w_nonzero(name):
    tensors, expected = ALIVE[name]
    kept = NonzeroBudget(4, keep_alive=True).project(tensors | {"other": torch.full((50,), 9.0)})
    for key, tensor in tensors.items():
        wanted = torch.tensor(expected[key]) if key in expected else torch.zeros_like(tensor)
        assert torch.equal(kept[key], wanted)
    assert int(kept["other"].count_nonzero()) == 4 - sum(
        int(torch.tensor(v).count_nonzero()) for v in expected.values()
    )


@pytest.mark.parametrize(("u", "v"), [(0.1, 3.0), (3.0, 0.1)])
def test_a_factor_that_would_lose_its_partner_keeps_it(u, v):
    """Of the two the larger one alone would stay, and W = U V would be zero."""
    tensors = layer(u=[[u], [0.0]], v=[[v, 0.0]], c=[[0.0, 0.0], [0.0, 0.0]]) | {"other": torch.tensor([5.0, 4.0])}
    kept = NonzeroBudget(3, keep_alive=True).project(tensors)
    assert bool((kept["layer.U"] @ kept["layer.V"]).any())
    assert kept["other"].tolist() == [5.0, 0.0]


def test_a_budget_too_small_for_a_product_per_layer_is_refused():
    tensors = layer(u=[[0.5]], v=[[0.2]]) | {"other": torch.full((50,), 9.0)}
    with pytest.raises(ValueError, match="at least 3 nonzeros"):
        NonzeroBudget(2, keep_alive=True).project(tensors)
