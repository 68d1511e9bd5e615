"""ONNX and safetensors: what onnxruntime computes is what PyTorch computes, for every operation."""

import json
import struct
import sys

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load
from torch import nn

from atmc.deploy.export import onnx_export as export
from atmc.deploy.export import safetensors_export
from atmc.deploy.graph.graph import (
    Add,
    Affine,
    AvgPool,
    Conv,
    Flatten,
    GlobalAvgPool,
    Graph,
    Linear,
    MaxPool,
    Node,
    Relu,
    run_graph,
)

RNG = np.random.default_rng(0)
small = settings(max_examples=60, deadline=None)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def expect_agreement(graph: Graph, images: int = 3) -> None:
    """Compare the export with the graph run by PyTorch, on images of both signs, so that padding matters."""
    x = floats(images, *graph.input_shape)
    expected = run_graph(graph, torch.from_numpy(x)).numpy()
    logits = export.open_runtime(export.to_bytes(graph))(x)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


@st.composite
def windows(draw: st.DrawFn, dilated: bool, halved: bool = True) -> tuple[tuple[int, int], ...]:
    """Draw sides, kernel, stride, padding (of pools at most half the kernel) and dilation that fit each other."""
    axes = []
    for _ in range(2):
        k, s, d = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 3 if dilated else 1))
        p = draw(st.integers(0, k // 2 if halved else 3))
        side = draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 12))
        axes.append((side, k, s, p, d))
    return tuple(zip(*axes, strict=True))


def chain(*ops: object) -> Graph:
    return Graph((4, 6, 5), tuple(Node(op, (index,)) for index, op in enumerate(ops)))


@pytest.mark.parametrize(
    "graph",
    [
        chain(Affine(floats(4), floats(4))),
        chain(Flatten(), Affine(floats(120), floats(120))),
        chain(Flatten(), Flatten(), Linear(floats(3, 120), floats(3)), Relu()),
        chain(Relu()),
        chain(Relu(0.7)),
        chain(GlobalAvgPool()),
        Graph((2, 3, 3), (Node(Relu(), (0,)), Node(Add(), (0, 1)), Node(Add(), (2, 2)))),
    ],
    ids=["affine", "affine of features", "linear", "relu", "relu with a ceiling", "global average", "add"],
)
def test_operations(graph):
    expect_agreement(graph)


@given(windows(dilated=True, halved=False), st.sampled_from([1, 2, 4]))
@small
def test_convolution(window, groups):
    sides, kernel, stride, padding, dilation = window
    weight = floats(8, 4 // groups, *kernel)
    op = Conv(weight, floats(8), stride=stride, padding=padding, dilation=dilation, groups=groups)
    expect_agreement(Graph((4, *sides), (Node(op, (0,), "conv"),)))


@given(windows(dilated=True), st.booleans())
@small
def test_maximum_pool(window, ceil_mode):
    sides, *numbers = window
    graph = Graph((2, *sides), (Node(MaxPool(*numbers, ceil_mode), (0,)),))
    if run_graph(graph, torch.zeros(1, 2, *sides)).isfinite().all():
        expect_agreement(graph)
    else:
        with pytest.raises(ValueError, match="a window of padding alone"):
            export.to_bytes(graph)


@given(windows(dilated=False), st.booleans(), st.booleans())
@small
def test_average_pool(window, ceil_mode, count_padding):
    sides, kernel, stride, padding, _ = window
    expect_agreement(Graph((2, *sides), (Node(AvgPool(kernel, stride, padding, ceil_mode, count_padding), (0,)),)))


@pytest.mark.parametrize("op", [MaxPool((3, 3), (2, 3), (1, 1), ceil_mode=True), AvgPool((2, 3), (3, 2), (1, 1), True)])
def test_another_runtime(op):
    """The reference evaluator of onnx, which reads ceil_mode differently, computes the same."""
    for side in range(3, 9):
        graph = Graph((2, side, 7), (Node(op, (0,)),))
        x = floats(2, *graph.input_shape)
        (logits,) = ReferenceEvaluator(onnx.load_from_string(export.to_bytes(graph))).run(None, {"images": x})
        np.testing.assert_allclose(logits, run_graph(graph, torch.from_numpy(x)), atol=1e-6)


def network() -> Graph:
    nodes = (
        Node(Conv(floats(2, 1, 3, 3), floats(2)), (0,), "stem.conv"),
        Node(Affine(floats(2), floats(2)), (1,), "stem"),
        Node(Relu(6.0), (2,), "stem"),
        Node(AvgPool((2, 2), (2, 2), (1, 1), ceil_mode=True), (3,), "images"),
        Node(Flatten(), (4,)),
        Node(Linear(floats(3, 8), floats(3)), (5,), "fc"),
    )
    return Graph((1, 5, 5), nodes)


def test_the_file(tmp_path):
    """The file has the documented names and shapes and the same bytes every time, and no other file is left."""
    graph = network()
    assert export.to_onnx(graph, tmp_path / "model.onnx", metadata={"threat": "l2:1"}) > 0
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, model.opset_import[0].version) == (7, 13)
    assert {prop.key: prop.value for prop in model.metadata_props} == {"threat": "l2:1", "tool": "atmc 0.1.0"}
    ends = {value.name: value.type.tensor_type for value in (*model.graph.input, *model.graph.output)}
    dims = {name: [d.dim_param or d.dim_value for d in kind.shape.dim] for name, kind in ends.items()}
    assert dims == {"images": ["n", 1, 5, 5], "logits": ["n", 3]}
    constants = [constant.name for constant in model.graph.initializer]
    assert constants[:2] == ["stem.conv.weight", "stem.conv.bias"]
    names = [*constants, *(name for node in model.graph.node for name in node.output)]
    assert len(names) == len(set(names))
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    assert (tmp_path / "model.onnx").read_bytes() == export.to_bytes(graph, metadata={"threat": "l2:1"})
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    for images in (1, 7):
        expect_agreement(graph, images)


@pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeError, match=rf"^{name} is not installed: pip install 'atmc\[deploy\]'$"):
        export.to_bytes(network()) if name == "onnx" else export.open_runtime(b"")


def test_safetensors(tmp_path):
    """The loader of safetensors reads the state dict; the metadata, which it would write in any order, are sorted."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).to(memory_format=torch.channels_last)
    model.append(nn.Conv2d(1, 2, 3))
    model[2].weight = model[0].weight  # shared memory
    metadata = {key: f"{key} of it" for key in "gfedcba"}
    size = safetensors_export.to_safetensors(model, tmp_path / "model.safetensors", metadata=metadata)
    data = (tmp_path / "model.safetensors").read_bytes()
    assert len(data) == size
    loaded, state = load(data), model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(loaded[name].dtype == value.dtype and loaded[name].equal(value) for name, value in state.items())
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    assert list(json.loads(data[8 : 8 + length])["__metadata__"].items()) == sorted(metadata.items())
