"""docs/file-format.md is complete: a decoder written from it alone decodes what `atmc.pack` wrote."""

from pathlib import Path

import golden_files
import numpy as np
import pytest
import second_decoder
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import SHAPES, random_counts, same_bits, weights
from torch import nn

from atmc.compress.constraints import Codebook, NonzeroBudget
from atmc.compress.factorize import compressible_parameters, cut_ranks, factor_structure, factorize
from atmc.models import batch_norm
from atmc.pack import artifact, weight_coder
from atmc.pack.container import DICTIONARY
from atmc.pack.other_tensors import encode_other_tensors
from atmc.pack.weight_coder import Layout
from atmc.training.loop import assign

ROOT = Path(__file__).parents[2]
LENET = [  # as the page lists them
    ("conv1.weight", (20, 1, 5, 5), "float32"),
    ("conv1.bias", (20,), "float32"),
    ("conv2.weight", (50, 20, 5, 5), "float32"),
    ("conv2.bias", (50,), "float32"),
    ("fc1.weight", (500, 800), "float32"),
    ("fc1.bias", (500,), "float32"),
    ("fc2.weight", (10, 500), "float32"),
    ("fc2.bias", (10,), "float32"),
]


def expect_same(decoded: dict[str, list[float]], state: dict[str, torch.Tensor]) -> None:
    assert decoded.keys() == state.keys()
    for name, values in state.items():
        assert np.array(decoded[name], values.numpy().dtype).tobytes() == values.numpy().tobytes(), name


def test_the_page_has_the_preset_dictionary():
    assert second_decoder.dictionary() == DICTIONARY


@pytest.mark.parametrize("name", golden_files.FACTORIES)
def test_golden_files(name):
    data, factory = (golden_files.FOLDER / f"{name}.atmc").read_bytes(), golden_files.FACTORIES[name]
    decoded = second_decoder.decode(data, None if factory else LENET)
    expect_same(decoded, artifact.from_bytes(data, factory=factory).state_dict())


def test_a_committed_file():
    path = ROOT / "results" / "mnist-adversarial" / "atmc4-006" / "model.atmc"
    expect_same(second_decoder.decode(path.read_bytes(), LENET), artifact.load(path).state_dict())


def network(num_classes: int) -> nn.Module:
    """Build layers with kernels of one and two dimensions, a square weight, a tall one, norms, and other types."""
    model = nn.Sequential(nn.Conv2d(2, 6, (3, 2)), nn.BatchNorm2d(6), nn.Conv1d(6, 8, 4), nn.Linear(8, 8))
    model.add_module("tall", nn.Linear(8, 30))
    model.add_module("head", nn.Linear(30, num_classes))
    model.register_buffer("mask", torch.tensor([True, False]))
    model.register_buffer("exact", torch.tensor([0.1, -3e200], dtype=torch.float64))
    model.register_buffer("octets", torch.tensor([0, 7, 255], dtype=torch.uint8))
    model.register_buffer("empty", torch.zeros(0, 3))
    return model


@pytest.mark.parametrize("start", ["plain", "identity", "svd", "rank"])
@pytest.mark.parametrize("bits", [None, 3])
def test_every_form_of_a_weight(start, bits):
    torch.manual_seed(1)
    model = network(5)
    if start == "rank":
        cut_ranks(model, {"0.weight": 2, "3.weight": 3})
    elif start != "plain":
        factorize(model, start=start)
    parameters = compressible_parameters(model)
    values = NonzeroBudget(300).project({name: torch.randn_like(value) for name, value in parameters.items()})
    assign(parameters, Codebook(bits).project(values) if bits else values)
    if bits:
        batch_norm.make_affine(model)
    data = artifact.to_bytes(model)
    loaded = artifact.from_bytes(data, factory=network)
    implied = batch_norm.affine_statistics(loaded) if bits else {}
    stored = {name: value for name, value in loaded.state_dict().items() if name not in implied}
    expect_same(second_decoder.decode(data), stored)
    forms = {form for form, _ in factor_structure(model).values()}
    assert forms == {"plain": set(), "identity": {"left", "right"}}.get(start, {start})


@given(weights(), st.booleans(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_any_matrix(weight, counted, seed):
    values, shape = weight
    layout = Layout.of(shape)
    counts = random_counts(shape[1] if len(shape) > 1 else 1, seed) if counted else None
    data, _ = weight_coder.encode_matrix(values, layout, counts)
    matrix = second_decoder.Matrix(layout.rows, layout.columns, layout.kernel, layout.width)
    matrix.decode(data, counts.tolist() if counted else None)
    assert same_bits(np.array(matrix.values, np.float32), values)


@pytest.mark.parametrize("shape", [(50, 80), (20, 10, 3, 3), (6, 5, 17, 16), (30, 40, 4)])
@pytest.mark.parametrize("levels", [1, 6, 256, None])
def test_values_that_depend_on_their_neighbors(shape, levels):
    """Values share their signs in a kernel or a channel, so that the encoder uses the contexts of neighbors."""
    rng = np.random.default_rng(0)
    sign = np.where(rng.random((*shape[:2], *(1 for _ in shape[2:]))) < 0.5, -1, 1)
    size = rng.random(shape) + 1 if levels is None else rng.integers(1, levels + 1, shape)
    values = (sign * size * (rng.random(shape) < 0.6)).astype(np.float32)
    layout = Layout.of(shape)
    data, _ = weight_coder.encode_matrix(values, layout)
    matrix = second_decoder.Matrix(layout.rows, layout.columns, layout.kernel, layout.width)
    matrix.decode(data, None)
    assert same_bits(np.array(matrix.values, np.float32), values)


def test_a_matrix_of_a_single_group_size():
    """A matrix of more than 2^19 entries has one group size."""
    values = np.zeros((1, 600_000), np.float32)
    values[0, ::90_001] = [1, -1, 0.5, 2, 1, 1, 3]
    data, _ = weight_coder.encode_matrix(values, Layout.of(values.shape))
    matrix = second_decoder.Matrix(*values.shape)
    assert matrix.group_sizes() == [16]
    matrix.decode(data, None)
    assert same_bits(np.array(matrix.values, np.float32), values)


def test_more_roles_than_have_contexts_of_their_own():
    tensors = [(f"role{i % 150}", np.array([i % 7, 0, i / 64], np.float32)) for i in range(400)]
    data, _ = encode_other_tensors(tensors)
    named = [(f"{i}.{role}", (3,), "float32") for i, (role, _) in enumerate(tensors)]
    decoded = second_decoder.decode_others(data, named)
    assert all(decoded[name] == values.tolist() for (name, *_), (_, values) in zip(named, tensors, strict=True))


def test_shapes_cover_every_layout():
    """Random matrices are drawn with and without kernels, also with kernels of more than 256 entries."""
    layouts = [Layout.of(shape) for shape in SHAPES]
    assert {len(layout.group_sizes()) for layout in layouts} == {1, 2, 3}
    assert any(layout.kernel > 256 for layout in layouts)
