"""The forms of a weight (factors, merged, or itself): the shortest is taken, and all of them give the same W."""

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from atmc.compress.constraints import Codebook, NonzeroBudget
from atmc.compress.factorize import compressible_parameters, cut_ranks, factor_structure, factorize, fold
from atmc.pack import artifact, weight_forms
from atmc.pack.weight_forms import PLAIN, Weight
from atmc.training.loop import assign

SHAPES = {"left": (6, 10), "right": (10, 6), "svd": (4, 2, 3, 3), "rank": (7, 9)}


def random_weight(form: str, seed: int, density: float) -> Weight:
    """Draw factors of a form, with few distinct values and about this share of nonzeros."""
    rng = np.random.default_rng(seed)
    shape = SHAPES[form]
    rows, columns = shape[0], int(np.prod(shape[1:]))
    rank = {"left": rows, "right": columns}.get(form, 3)
    sizes = {"U": (rows, rank), "V": (rank, columns)} | ({} if form == "rank" else {"C": shape})
    book = np.array([0.5, -0.3, 1.7, 1e-3], np.float32)
    parts = {
        name: np.where(rng.random(size) < density, rng.choice(book, size), np.float32(0))
        for name, size in sizes.items()
    }
    return Weight(form, shape, parts)


@given(st.sampled_from(sorted(SHAPES)), st.integers(0, 999), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
@settings(max_examples=80, deadline=None)
def test_parts_round_trip_bit_for_bit(form, seed, density):
    weight = random_weight(form, seed, density)
    counts = np.arange(SHAPES[form][1])
    encoded = weight_forms.encode_weight(weight, counts)
    decoded, lengths = weight_forms.decode_weight(
        form, weight.shape, weight.rank, [data for data, _ in encoded], counts
    )
    assert [length for _, length in encoded] == lengths
    assert decoded.parts.keys() == weight.parts.keys()
    for name, values in weight.parts.items():
        assert np.array_equal(decoded.parts[name], values)
    assert np.array_equal(decoded.value().view(np.uint32), weight.value().view(np.uint32))
    assert decoded.output_counts().tolist() == weight.output_counts().tolist()


@given(st.sampled_from(sorted(SHAPES)), st.integers(0, 999), st.sampled_from([0.05, 0.3, 1.0]))
@settings(max_examples=80, deadline=None)
def test_candidates_are_the_same_w_up_to_one_rounding(form, seed, density):
    """W = U V + (V + C): V + C is rounded once in the merged form, W in all of them."""
    weight = random_weight(form, seed, density)
    exact, c = weight.value(), weight.parts.get("C", np.zeros(weight.shape, np.float32))
    extra = weight.parts[{"left": "V", "right": "U"}[form]].reshape(weight.shape) if form in ("left", "right") else 0
    one = np.spacing(np.abs(c + extra)) / 2 + np.spacing(np.abs(exact))
    for other in weight_forms.list_candidates(weight):
        assert (np.abs(other.value().astype(np.float64) - exact) <= one).all()
        assert other.form == PLAIN or other.rank >= 1


@given(st.sampled_from(sorted(SHAPES)), st.integers(0, 999), st.sampled_from([0.05, 0.3, 1.0]))
@settings(max_examples=40, deadline=None)
def test_the_shortest_candidate_is_taken(form, seed, density):
    weight = random_weight(form, seed, density)
    sizes = [weight_forms.part_bytes(candidate, None) for candidate in weight_forms.list_candidates(weight)]
    best, size = weight_forms.choose_shortest(weight, None)
    assert size == weight_forms.part_bytes(best, None) == min(sizes)
    parts = [len(data) for data, _ in weight_forms.encode_weight(best, None)]
    assert sum(parts) < size <= sum(parts) + 3 * 2 + 4  # their lengths, the form, the rank


def network(start: str, seed: int, nonzeros: int, bits: int) -> nn.Module:
    """Build two convolutions and a linear layer, factorized, with random values under a budget."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5))
    if start == "rank":
        cut_ranks(model, {"0.weight": 2, "1.weight": 3, "3.weight": 1})
    else:
        factorize(model, start=start)
    tensors = compressible_parameters(model)
    values = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
    values = Codebook(bits).project(NonzeroBudget(nonzeros).project(values))
    assign(tensors, values)
    return model


@given(st.sampled_from(["identity", "svd", "rank"]), st.integers(0, 999), st.integers(3, 900), st.integers(1, 5))
@example("svd", 29, 681, 1)  # forms that are shortest one by one, and longer together
@settings(max_examples=25, deadline=None)
def test_choosing_forms_keeps_w_and_never_makes_the_file_longer(start, seed, nonzeros, bits):
    model = network(start, seed, nonzeros, bits)
    before, long = fold(model), len(artifact.to_bytes(model))
    assert weight_forms.choose_shortest_forms(model) is model
    data = artifact.to_bytes(model)
    assert len(data) <= long
    after = artifact.from_bytes(data, factory=lambda num_classes: fold(model))
    for name, value in before.state_dict().items():
        assert torch.allclose(after.state_dict()[name], value, rtol=3e-7, atol=3e-7)
    assert len(artifact.to_bytes(weight_forms.choose_shortest_forms(model))) == len(data)


def test_the_shortest_form_is_known_for_a_start_and_for_rank_1():
    """Factors at their start are written as W, and a weight of rank 1 as its factors."""
    for model in (nn.Linear(6, 4), factorize(nn.Linear(6, 4))):
        assert not factor_structure(weight_forms.choose_shortest_forms(model))
    assert factor_structure(weight_forms.choose_shortest_forms(cut_ranks(nn.Linear(60, 40), {"weight": 1}))) == {
        "weight": ("rank", 1)
    }


def test_dead_terms_are_left_out():
    model = cut_ranks(nn.Linear(60, 40), {"weight": 3})
    with torch.no_grad():
        compressible_parameters(model)["weight.U"][:, 1] = 0
        compressible_parameters(model)["weight.V"][0] = 0
    before = fold(model).weight
    weight_forms.choose_shortest_forms(model)
    assert factor_structure(model) == {"weight": ("rank", 1)}
    assert torch.equal(fold(model).weight, before)


def test_one_of_two_factorized_weights_of_a_module_becomes_plain():
    """An attention module holds several weights; the others stay factorized, and copies of the model do not change."""
    torch.manual_seed(0)
    model = factorize(nn.MultiheadAttention(8, 2, kdim=6, vdim=4))
    other = fold(model)
    weight_forms.set_factors(model, "q_proj_weight", "plain", {"W": torch.ones(8, 8)})
    assert "q_proj_weight" not in factor_structure(model)
    assert "k_proj_weight" in factor_structure(model)
    assert torch.equal(model.q_proj_weight, torch.ones(8, 8))
    assert not factor_structure(other)
    assert torch.equal(other.k_proj_weight, fold(model).k_proj_weight)
