"""W = U V + C: exact starts, plain copies, and weights that cannot be factorized."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from atmc.compress.factorize import (
    apply_structure,
    cached_weights,
    compose,
    compressible_parameters,
    compressible_weights,
    cut_ranks,
    factor_structure,
    factorize,
    factors,
    fold,
    is_factorized,
    use_channels_last,
)


def zoo() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Build every kind of layer that can be factorized, each with an input."""
    torch.manual_seed(0)
    return {
        "conv1d": (nn.Sequential(nn.Conv1d(3, 8, 3), nn.Conv1d(8, 2, 1)), torch.randn(2, 3, 9)),
        "conv2d": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 40, 1)), torch.randn(2, 3, 6, 6)),
        "conv3d": (nn.Sequential(nn.Conv3d(2, 4, 2)), torch.randn(2, 2, 4, 4, 4)),
        "linear wide and tall": (nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 7)), torch.randn(2, 6)),
        "grouped": (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8)), torch.randn(2, 4, 8, 8)),
        "attention": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), torch.randn(2, 5, 8)),
    }


@pytest.mark.parametrize("start", ["identity", "svd"])
@pytest.mark.parametrize("kind", zoo())
def test_start_is_exact_and_fold_gives_back_plain_modules(kind, start):
    model, x = zoo()[kind]
    model.eval()
    expected = model(x)
    factorized = factorize(copy.deepcopy(model), start=start)
    assert (factorized(x) - expected).abs().max() <= 1e-5
    plain = fold(factorized)
    assert (plain(x) - expected).abs().max() <= 1e-5
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert not any(parametrize.is_parametrized(module) for module in plain.modules())
    assert (factorized(x) - expected).abs().max() <= 1e-5  # the original still works


def test_identity_start_needs_no_extra_nonzeros():
    model = nn.Sequential(nn.Linear(6, 3, bias=False), nn.Linear(3, 7, bias=False))
    dense = sum(p.numel() for p in model.parameters())
    assert sum(int(t.count_nonzero()) for t in compressible_parameters(factorize(model)).values()) == dense


@pytest.mark.parametrize(("sizes", "form"), [((6, 3), "left"), ((4, 4), "left"), ((3, 7), "right")])
def test_form_follows_the_shape(sizes, form):
    model = factorize(nn.Sequential(nn.Linear(*sizes)))
    assert factor_structure(model) == {"0.weight": (form, min(sizes))}


def test_grouped_convolutions_keep_their_plain_weight():
    model = factorize(nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 2, 1)))
    assert set(factors(model)["0.weight"]) == {"W"}
    assert set(factors(model)["1.weight"]) == {"U", "V", "C"}


def test_zero_row_of_v_lowers_the_rank():
    model = factorize(nn.Sequential(nn.Linear(8, 4, bias=False)))
    parts = factors(model)["0.weight"]
    with torch.no_grad():
        parts["V"][1:] = 0
        parts["U"].copy_(torch.randn(4, 4))
    assert torch.linalg.matrix_rank(model[0].weight) == 1


def test_weights_are_built_once_with_their_graph():
    model = factorize(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)))
    other = factorize(nn.Sequential(nn.Linear(6, 4)))
    x = torch.randn(5, 6)
    with cached_weights(model):
        with torch.no_grad():
            built = [model[0].weight, model[2].weight]
            model(x)  # a first pass without gradients must not leave weights without them
        model(x).square().sum().backward()
        assert [model[0].weight is built[0], model[2].weight is built[1]] == [True, True]
        assert other[0].weight is not other[0].weight  # of this model alone: another thread may train another one
    assert model[0].weight is not built[0]
    cached = {name: t.grad.clone() for name, t in compressible_parameters(model).items()}
    model.zero_grad()
    model(x).square().sum().backward()
    assert all(torch.equal(cached[name], t.grad) for name, t in compressible_parameters(model).items())


def test_structure_and_state_rebuild_the_model():
    model, x = zoo()["conv2d"]
    factorized = factorize(copy.deepcopy(model))
    with torch.no_grad():
        for tensor in compressible_parameters(factorized).values():
            tensor.copy_(torch.randn_like(tensor))
    other = apply_structure(copy.deepcopy(model), factor_structure(factorized))
    other.load_state_dict(factorized.state_dict())
    assert torch.equal(other(x), factorized(x))
    with pytest.raises(ValueError, match="unknown form 'up'"):
        apply_structure(copy.deepcopy(model), {"0.weight": ("up", 1)})


def test_cut_ranks_gives_the_best_approximation():
    model = nn.Sequential(nn.Conv2d(3, 6, 2), nn.Linear(5, 4))
    weight = model[0].weight.detach().clone().view(6, -1)
    cut_ranks(model, {"0.weight": 2})
    singular = torch.linalg.svdvals(weight)
    gap = torch.linalg.matrix_norm(model[0].weight.flatten(1) - weight)
    assert torch.isclose(gap, singular[2:].norm(), rtol=1e-4)
    assert set(factors(model)["0.weight"]) == {"U", "V"}
    assert set(factors(model)["1.weight"]) == {"W"}
    assert torch.allclose(fold(model)[0].weight, model[0].weight, atol=1e-6)


def test_shared_weights_are_refused_unless_excluded():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="share one weight"):
        factorize(model)
    factorize(model, exclude=("0.*", "1.*"))
    assert [is_factorized(weight) for weight in compressible_weights(model, exclude=("0.*", "1.*"))] == [True]


def test_embedding_shared_with_a_layer_is_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
            self.head.weight = self.embedding.weight

    with pytest.raises(ValueError, match="share one weight"):
        factorize(Tied())


def test_exclude_patterns():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert [weight.path for weight in compressible_weights(model, exclude=("1.*",))] == ["0.weight"]
    with pytest.raises(ValueError, match=r"'head\.\*' matches no weight"):
        compressible_weights(model, exclude=("head.*",))
    with pytest.raises(ValueError, match="factorized already"):
        factorize(factorize(model))


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
def test_compose_is_the_sum_in_a_fixed_order(density):
    rng = np.random.default_rng(0)
    u = rng.standard_normal((4, 4)).astype(np.float32) * (rng.random((4, 4)) < density)
    v = rng.standard_normal((4, 9)).astype(np.float32) * (rng.random((4, 9)) < density)
    c = rng.standard_normal((4, 9)).astype(np.float32)
    expected = np.zeros((4, 9))
    for i in range(4):
        for k in range(9):
            for j in range(4):
                expected[i, k] += float(u[i, j]) * float(v[j, k])
            expected[i, k] += float(v[i, k])
            expected[i, k] += float(c[i, k])
    assert np.array_equal(compose("left", u, v, c), expected.astype(np.float32))
    tall = np.concatenate((v.T, v.T))  # (18, 4)
    assert np.allclose(compose("right", tall, u, None), tall @ u + tall, atol=1e-6)
    assert np.allclose(compose("svd", u, v, c), u @ v + c, atol=1e-6)


def test_product_skips_dead_rows_and_columns_but_not_their_gradients():
    torch.manual_seed(0)
    model = factorize(nn.Sequential(nn.Linear(9, 6, bias=False)))
    parts, x = factors(model)["0.weight"], torch.randn(4, 9)
    with torch.no_grad():
        parts["U"][:, :2] = torch.randn(6, 2)
        parts["V"][1:4] = 0
    model(x).square().sum().backward()
    u, v, c = (parts[name].detach().clone().requires_grad_() for name in "UVC")
    w = u @ v + v + c
    (x @ w.T).square().sum().backward()
    assert torch.allclose(model[0].weight, w, atol=1e-6)
    for name, plain in zip("UVC", (u, v, c), strict=True):
        assert torch.allclose(parts[name].grad, plain.grad, rtol=1e-4, atol=1e-5)


def test_attention_with_separate_projections_folds():
    torch.manual_seed(0)
    model, query, key = nn.MultiheadAttention(8, 2, kdim=6, vdim=4), torch.randn(3, 1, 8), torch.randn(5, 1, 6)
    value = torch.randn(5, 1, 4)
    expected = model(query, key, value)[0]
    factorized = factorize(copy.deepcopy(model))
    assert torch.allclose(fold(factorized)(query, key, value)[0], expected, atol=1e-5)
    assert type(fold(factorized)) is nn.MultiheadAttention


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_weights_of_other_parametrizations_are_refused(wrap):
    model = nn.Sequential(wrap(nn.Linear(4, 3)), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"0\.weight is computed"):
        factorize(model)
    assert list(factor_structure(factorize(model, exclude=("0.*",)))) == ["1.weight"]


def test_channels_last_is_kept_by_the_weights_that_are_built():
    model = use_channels_last(factorize(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))))
    assert model[0].weight.stride() == (9, 1, 3, 1)
    assert model[1].weight.stride(1) == 1
    assert factorize(nn.Sequential(nn.Conv2d(4, 4, 3)))[0].weight.is_contiguous()
