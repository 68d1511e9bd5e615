"""Draw small random networks as graphs, with every operation, for tests of the code that runs graphs."""

from __future__ import annotations

import numpy as np
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
    Op,
    Relu,
    run_graph,
)

Rng = np.random.Generator


def floats(rng: Rng, *shape: int, density: float = 1.0) -> np.ndarray:
    """Draw normal values, and set all but a share `density` of them to zero."""
    return np.where(rng.random(shape) < density, rng.standard_normal(shape), 0).astype(np.float32)


def chain(input_shape: tuple[int, int, int], *ops: Op) -> Graph:
    """Build the graph of operations in sequence."""
    return Graph(input_shape, tuple(Node(op, (index,)) for index, op in enumerate(ops)))


def with_classifier(graph: Graph, seed: int = 0, classes: int = 5) -> Graph:
    """Add a linear layer at the end."""
    shape = graph.shapes()[-1]
    linear = Linear(floats(np.random.default_rng(seed), classes, int(np.prod(shape))), np.ones(classes, np.float32))
    at = len(graph.nodes)
    return Graph(graph.input_shape, (*graph.nodes, Node(Flatten(), (at,)), Node(linear, (at + 1,))))


def random_conv(rng: Rng, shape: tuple[int, ...], outputs: int | None = None) -> Conv:
    """Draw a convolution that fits images of a shape; with `outputs`, one that keeps their height and width."""
    c, h, w = shape
    density = float(rng.choice([0, 0.1, 0.5, 1], p=[0.05, 0.45, 0.3, 0.2]))
    groups = int(rng.choice([g for g in range(1, c + 1) if c % g == 0 and (outputs or g) % g == 0]))
    kernel, dilation = rng.integers(1, 6, 2), rng.integers(1, 4, 2)
    if outputs:
        kernel = kernel // 2 * 2 + 1
        padding, stride = dilation * (kernel - 1) // 2, np.ones(2, int)
    else:
        padding, stride = rng.integers(0, 4, 2), rng.choice([1, 1, 2, 3, 4], 2)
        kernel = np.where(np.array([h, w]) + 2 * padding > dilation * (kernel - 1), kernel, 1)
    outputs = outputs or groups * int(rng.integers(1, 4))
    weight = floats(rng, outputs, c // groups, *kernel, density=density)
    weight /= np.sqrt(max(1, np.count_nonzero(weight) / outputs), dtype=np.float32)
    return Conv(
        weight,
        floats(rng, outputs),
        stride=_pair(stride),
        padding=_pair(padding),
        dilation=_pair(dilation),
        groups=groups,
    )


def random_pool(rng: Rng, shape: tuple[int, ...]) -> MaxPool | AvgPool:
    kernel = np.minimum(rng.integers(1, 4, 2), shape[1:])
    stride, padding = rng.integers(1, 4, 2), np.minimum(rng.integers(0, 2, 2), kernel // 2)
    ceil_mode, flag = rng.random(2) < 0.5
    if rng.random() < 0.5:
        return AvgPool(_pair(kernel), _pair(stride), _pair(padding), bool(ceil_mode), bool(flag))
    dilation = np.where((padding == 0) & (np.array(shape[1:]) > 2 * (kernel - 1)), rng.integers(1, 3, 2), 1)
    return MaxPool(_pair(kernel), _pair(stride), _pair(padding), _pair(dilation), bool(ceil_mode))


def random_graph(seed: int) -> Graph:
    """Draw convolutions, sums, affines, activations and pools in random order, then linear layers."""
    rng = np.random.default_rng(seed)
    input_shape = int(rng.choice([1, 3, 4])), *_pair(rng.integers(1, 14, 2))
    nodes: list[Node] = []

    def add(op: Op, *values: int) -> int:
        nodes.append(Node(op, values))
        return len(nodes)

    def shape(value: int) -> tuple[int, ...]:
        return Graph(input_shape, tuple(nodes)).shapes()[value]

    x = 0
    for part in rng.choice(["conv", "sum", "twice", "affine", "relu", "pool"], rng.integers(2, 8)):
        match part:
            case "conv":
                x = add(random_conv(rng, shape(x)), x)
            case "sum":
                both = rng.random() < 0.5
                a = add(random_conv(rng, shape(x), shape(x)[0]), add(Relu(), x) if rng.random() < 0.5 else x)
                b = add(random_conv(rng, shape(x), shape(x)[0]), x) if both else x
                x = add(Add(), *rng.permutation([a, b]).tolist())
            case "twice":
                x = add(Add(), x, x)
            case "affine":
                x = add(Affine(floats(rng, shape(x)[0]), floats(rng, shape(x)[0])), x)
            case "relu":
                x = add(Relu(*rng.choice([None, 0.7], 1)), x)
            case "pool":
                x = add(random_pool(rng, shape(x)), x)
    if rng.random() < 0.3:
        x = add(GlobalAvgPool(), x)
    trunk = Graph(input_shape, (*nodes, Node(Flatten(), (x,))))
    return _with_features(trunk, rng)


def _with_features(trunk: Graph, rng: Rng) -> Graph:
    """Add random linear layers, affines, activations and sums."""
    nodes, x, width = list(trunk.nodes), len(trunk.nodes), trunk.shapes()[-1][0]

    def add(op: Op, *values: int) -> int:
        nodes.append(Node(op, values))
        return len(nodes)

    for part in rng.choice(["linear", "affine", "relu", "sum"], rng.integers(0, 4)):
        square = Linear(floats(rng, width, width, density=4 / width), floats(rng, width))
        match part:
            case "linear":
                x, width = add(Linear(floats(rng, 12, width, density=0.3), floats(rng, 12)), x), 12
            case "affine":
                x = add(Affine(floats(rng, width), floats(rng, width)), x)
            case "relu":
                x = add(Relu(), x)
            case "sum":
                x = add(Add(), x, add(square, x))
    add(Linear(floats(rng, 5, width), floats(rng, 5)), x)
    return Graph(trunk.input_shape, tuple(nodes))


def images_of(graph: Graph, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, *graph.input_shape)).astype(np.float32)


def logits_of(graph: Graph, images: np.ndarray) -> np.ndarray:
    """Compute the logits by PyTorch, in double precision."""
    return run_graph(graph, torch.from_numpy(images).double()).numpy()


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, in units of the largest logit."""
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def conv(outputs: int, inputs: int, *kernel: int, density: float = 0.3, **rest: object) -> Conv:
    rng = np.random.default_rng(outputs)
    return Conv(floats(rng, outputs, inputs, *kernel, density=density), floats(rng, outputs), **rest)


def _branches() -> dict[str, Graph]:
    fork = (
        Node(conv(4, 3, 3, 3, padding=(1, 1)), (0,)),
        Node(Relu(), (1,)),
        Node(conv(4, 4, 3, 3, padding=(1, 1)), (2,)),
        Node(conv(4, 4, 1, 1), (2,)),
        Node(Add(), (3, 4)),
        Node(Add(), (5, 2)),
        Node(Relu(0.5), (6,)),
    )
    strided = (
        Node(conv(4, 3, 3, 3, padding=(1, 1), stride=(2, 2)), (0,)),
        Node(conv(4, 3, 1, 1, stride=(2, 2)), (0,)),
        Node(Add(), (1, 2)),
    )
    linear = Linear(floats(np.random.default_rng(0), 5, 12), np.ones(5, np.float32))
    unread = Node(Flatten(), (0,)), Node(linear, (1,)), Node(Relu(), (1,)), Node(Relu(), (2,))
    return {
        "fork": with_classifier(Graph((3, 7, 6), fork)),
        "strided fork": with_classifier(Graph((3, 7, 6), strided)),
        "an operation that is not read": Graph((3, 2, 2), unread),
    }


def _geometries() -> dict[str, Graph]:
    pairs, overlapping = MaxPool((2, 2), (2, 2)), MaxPool((3, 3), (1, 1), (1, 1))
    dilated = conv(4, 2, 3, 3, padding=(6, 6), dilation=(6, 6), density=1)
    return {
        "one pixel": with_classifier(chain((3, 1, 1), conv(4, 3, 3, 3, padding=(1, 1)), Relu(), conv(4, 4, 1, 1))),
        "one pixel strided": with_classifier(
            chain((3, 1, 1), conv(4, 3, 3, 3, padding=(1, 1), stride=(2, 2), density=1))
        ),
        "one column": with_classifier(chain((2, 9, 1), conv(4, 2, 3, 3, padding=(1, 1)), MaxPool((2, 1), (2, 1)))),
        "kernel beyond the image": with_classifier(
            chain((2, 3, 2), conv(4, 2, 9, 11, padding=(4, 5)), conv(3, 4, 3, 1))
        ),
        "dilated beyond the image": with_classifier(chain((2, 4, 4), dilated)),
        "padding beyond the kernel": with_classifier(
            chain((2, 4, 3), conv(4, 2, 1, 3, padding=(3, 4), density=1), Relu())
        ),
        "stride beyond the kernel": with_classifier(chain((2, 13, 14), conv(4, 2, 2, 1, stride=(5, 4), density=1))),
        "depthwise": with_classifier(
            chain((6, 9, 9), conv(6, 1, 3, 3, density=1, padding=(1, 1), groups=6), Relu(6.0))
        ),
        "global average of a large image": with_classifier(chain((2, 70, 61), GlobalAvgPool(), Relu())),
        "long streams": with_classifier(chain((2, 60, 60), conv(3, 2, 3, 3, padding=(1, 1)), pairs)),
        "wide rows": with_classifier(chain((2, 3, 90), pairs, conv(3, 2, 1, 3), overlapping)),
    }


def _values() -> dict[str, Graph]:
    rng = np.random.default_rng(0)
    hollow, normalization = conv(6, 3, 3, 3, padding=(1, 1)), Affine(floats(rng, 3), floats(rng, 3))
    hollow.weight[[0, 3, 5]] = 0
    odd = chain((3, 8, 8), conv(7, 3, 3, 3, density=1), conv(9, 7, 3, 3, density=1))
    return {
        "only images": chain((3, 2, 2), Flatten()),
        "empty rows": with_classifier(chain((3, 8, 8), hollow, Relu(), conv(5, 6, 3, 3))),
        "all zero": with_classifier(chain((3, 8, 8), conv(5, 3, 3, 3, density=0, padding=(2, 2)), conv(5, 5, 3, 3))),
        "all zero linear": chain((1, 2, 2), Flatten(), Linear(np.zeros((3, 4), np.float32), floats(rng, 3))),
        "normalized": with_classifier(chain((3, 8, 8), normalization, conv(4, 3, 3, 3, padding=(1, 1)))),
        "activated flatten": chain((2, 3, 3), conv(4, 2, 3, 3, density=1), Flatten(), Relu(), Relu(0.1)),
        "dense, an odd number of outputs": with_classifier(odd),
    }


EXTREMES = {**_branches(), **_geometries(), **_values()}


def _pair(values: np.ndarray) -> tuple[int, int]:
    return int(values[0]), int(values[1])
