"""ONNX and safetensors: what onnxruntime computes is what PyTorch computes, for every operation."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from atmc.deploy import onnx as export
from atmc.deploy import safetensors
from atmc.deploy.graph import Add, Affine, AvgPool, Conv, Flatten, GlobalAvgPool, Graph, Linear, MaxPool, Node, Relu
from atmc.deploy.graph import evaluate as run

RNG = np.random.default_rng(0)
small = settings(max_examples=60, deadline=None)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def agree(graph: Graph, images: int = 3) -> None:
    """The export, run, against the graph itself by PyTorch: images of both signs, so that padding matters."""
    x = floats(images, *graph.input_shape)
    expected = run(graph, torch.from_numpy(x)).numpy()
    found = export.runner(export.to_bytes(graph))(x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


def whole(*ops: object) -> Graph:
    return Graph((4, 6, 5), tuple(Node(op, (index,)) for index, op in enumerate(ops)))


@pytest.mark.parametrize(
    "graph",
    [
        whole(Affine(floats(4), floats(4))),
        whole(Flatten(), Affine(floats(120), floats(120))),
        whole(Flatten(), Flatten(), Linear(floats(3, 120), floats(3)), Relu()),
        whole(Relu()),
        whole(Relu(0.7)),
        whole(GlobalAvgPool()),
        Graph((2, 3, 3), (Node(Relu(), (0,)), Node(Add(), (0, 1)), Node(Add(), (2, 2)))),
    ],
    ids=["affine", "affine of features", "linear", "relu", "relu with a ceiling", "global average", "add"],
)
def test_operations(graph):
    agree(graph)


@given(pairs(1, 12), pairs(1, 4), pairs(1, 3), pairs(0, 3), pairs(1, 3), st.sampled_from([1, 2, 4]))
@small
def test_convolution(sides, kernel, stride, padding, dilation, groups):
    op = Conv(floats(8, 4 // groups, *kernel), floats(8), stride, padding, dilation, groups)
    assume(all(side + 2 * p >= d * (k - 1) + 1 for side, p, d, k in zip(sides, padding, dilation, kernel, strict=True)))
    agree(Graph((4, *sides), (Node(op, (0,), "conv"),)))


@given(pairs(1, 12), pairs(1, 4), pairs(1, 5), pairs(0, 4), pairs(1, 3), st.booleans())
@small
def test_maximum_pool(sides, kernel, stride, padding, dilation, ceil_mode):
    for side, p, d, k in zip(sides, padding, dilation, kernel, strict=True):
        assume(side + 2 * p >= d * (k - 1) + 1 and 2 * p <= k)
    graph = Graph((2, *sides), (Node(MaxPool(kernel, stride, padding, dilation, ceil_mode), (0,)),))
    if run(graph, torch.zeros(1, 2, *sides)).isfinite().all():
        agree(graph)
    else:
        with pytest.raises(ValueError, match="a window of padding alone"):
            export.to_bytes(graph)


@given(pairs(1, 12), pairs(1, 4), pairs(1, 5), pairs(0, 2), st.booleans(), st.booleans())
@small
def test_average_pool(sides, kernel, stride, padding, ceil_mode, count_padding):
    assume(all(s + 2 * p >= k >= 2 * p for s, p, k in zip(sides, padding, kernel, strict=True)))
    agree(Graph((2, *sides), (Node(AvgPool(kernel, stride, padding, ceil_mode, count_padding), (0,)),)))
