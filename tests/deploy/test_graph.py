"""The graph: shapes are those that PyTorch computes, and operations that do not fit are refused by name."""

import numpy as np
import pytest
import torch

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


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


OPS = [
    Conv(floats(6, 4, 3, 2), floats(6), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    Conv(floats(8, 2, 3, 3), floats(8), padding=(1, 1), groups=2),
    Affine(floats(4), floats(4)),
    Relu(),
    Relu(0.5),
    MaxPool((2, 2), (2, 2)),
    MaxPool((3, 3), (2, 2), (1, 1), ceil_mode=True),
    MaxPool((2, 2), (3, 3), (0, 0), ceil_mode=True),
    AvgPool((3, 2), (2, 2), (1, 1), ceil_mode=True, count_padding=False),
    AvgPool((2, 2), (2, 2), ceil_mode=True),
    GlobalAvgPool(),
    Flatten(),
]


@pytest.mark.parametrize("op", OPS, ids=lambda op: type(op).__name__)
@pytest.mark.parametrize("sides", [(7, 9), (8, 8), (11, 6)])
def test_shapes_are_those_that_torch_computes(op, sides):
    graph = Graph((4, *sides), (Node(op, (0,)),))
    out = run_graph(graph, torch.from_numpy(floats(2, 4, *sides)))
    assert graph.shapes()[-1] == out.shape[1:]


def test_a_small_network():
    weight, bias = floats(3, 1, 3, 3), floats(3)
    nodes = (
        Node(Conv(weight, bias, padding=(1, 1)), (0,)),
        Node(Relu(), (1,)),
        Node(Add(), (1, 2)),
        Node(Flatten(), (3,)),
        Node(Linear(floats(2, 48), floats(2)), (4,)),
    )
    graph = Graph((1, 4, 4), nodes)
    x = torch.rand(5, 1, 4, 4)
    h = torch.nn.functional.conv2d(x, torch.from_numpy(weight), torch.from_numpy(bias), padding=1)
    last = nodes[-1].op
    expected = (h + h.relu()).flatten(1) @ torch.from_numpy(last.weight).T + torch.from_numpy(last.bias)
    torch.testing.assert_close(run_graph(graph, x), expected)
    assert graph.consumers() == [[0], [1, 2], [2], [3], [4], []]
    assert graph.macs() == 27 * 16 + 96


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ((Node(Conv(floats(2, 3, 1, 1), floats(2)), (0,), "stem"),), "Conv stem does not fit an input of shape"),
        ((Node(Linear(floats(2, 5), floats(2)), (0,), "fc"),), "Linear fc does not fit"),
        ((Node(Affine(floats(2), floats(2)), (0,)),), "Affine does not fit"),
        ((Node(Relu(), (1,)),), "reads a value that comes later"),
        ((Node(Add(), (0,)),), "Add has 1 inputs"),
        ((Node(Relu(), (0, 0)),), "Relu has 2 inputs"),
        ((Node(Flatten(), (0,)), Node(MaxPool((2, 2), (2, 2)), (1,))), r"needs an input of shape \(c, h, w\)"),
        ((Node(Flatten(), (0,)), Node(Add(), (0, 1))), r"adds shapes \(1, 4, 4\) and \(16,\)"),
        ((Node(Flatten(), (0,)), Node(GlobalAvgPool(), (1,), "gap")), r"GlobalAvgPool gap needs an input of shape"),
        ((Node(MaxPool((5, 5), (1, 1)), (0,)),), "a window of 5 does not fit a side of 4"),
    ],
)
def test_an_operation_that_does_not_fit_is_named(nodes, message):
    with pytest.raises(ValueError, match=message):
        Graph((1, 4, 4), nodes).shapes()
