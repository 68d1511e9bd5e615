"""Simplified graphs compute what the module computes; their channels are those of a closed form."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from atmc import models
from atmc.compress.factorize import factorize, fold
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
from atmc.deploy.graph.simplify import simplify, simplify_graph, simplify_with_report
from atmc.deploy.graph.trace import UnsupportedModel, trace
from atmc.models.resnet import BasicBlock, ResNet
from atmc.pack import artifact, weight_forms
from atmc.robust.attacks import fgsm
from atmc.robust.threats import Linf


def sparse(draw: np.random.Generator, *shape: int) -> np.ndarray:
    """Draw values in which many rows, columns and single entries are zero."""
    values = draw.standard_normal(shape) * (draw.random(shape) < 0.7)
    for axis in range(min(2, len(shape))):
        dead = draw.random(shape[axis]) < 0.2
        values[(slice(None),) * axis + (dead,)] = 0
    return values


def random_op(draw: np.random.Generator, shape: tuple[int, ...]):
    channels = shape[0]
    if len(shape) == 1:
        outputs = int(draw.integers(1, 7))
        linear = Linear(sparse(draw, outputs, channels), sparse(draw, outputs))
        return [Relu(), Affine(sparse(draw, channels), sparse(draw, channels)), linear, Flatten()][draw.integers(4)]
    groups = int(draw.choice([1, 1, 1, channels, 2 if channels % 2 == 0 else 1]))
    outputs = channels if groups == channels else int(groups * draw.integers(1, 5))
    size, padding = ((3, 2), (1, 1)) if min(shape[1:]) > 2 else ((1, 1), (0, 0))
    padding = padding if draw.random() < 0.5 else (0, 0)
    weight, bias = sparse(draw, outputs, channels // groups, *size), sparse(draw, outputs)
    kinds = [
        Conv(weight, bias, stride=(1, int(draw.integers(1, 3))), padding=padding, groups=groups),
        Conv(weight, bias, padding=padding, groups=groups),
        Affine(sparse(draw, channels), sparse(draw, channels)),
        Affine(np.abs(sparse(draw, channels)), sparse(draw, channels)),
        Relu(),
        Relu(0.5),
        MaxPool(size, (1, 1), padding),
        AvgPool(size, (1, 1), padding, count_padding=bool(draw.integers(2))),
        GlobalAvgPool(),
        Flatten(),
    ]
    return kinds[draw.choice(len(kinds), p=[0.2, 0.2, 0.1, 0.1, 0.15, 0.05, 0.05, 0.07, 0.03, 0.05])]


def random_graph(seed: int) -> Graph:
    """Draw a chain with branches: every node reads one of the last values, and an addition two of one shape."""
    draw = np.random.default_rng(seed)
    graph = Graph((2, 6, 7), ())
    for _ in range(int(draw.integers(3, 16))):
        shapes = graph.shapes()
        source = len(shapes) - 1 - (int(draw.integers(0, min(3, len(shapes)))) if draw.random() < 0.3 else 0)
        alike = [value for value, shape in enumerate(shapes) if shape == shapes[source]]
        if draw.random() < 0.25 and len(alike) > 1:
            node = Node(Add(), (source, int(draw.choice(alike))))
        else:
            node = Node(random_op(draw, shapes[source]), (source,))
        graph = Graph(graph.input_shape, (*graph.nodes, node))
    last = len(graph.nodes)
    if len(graph.shapes()[-1]) == 3:
        graph = Graph(graph.input_shape, (*graph.nodes, Node(Flatten(), (last,))))
    features = graph.shapes()[-1][0]
    final = Node(Linear(sparse(draw, 4, features), sparse(draw, 4)), (len(graph.nodes),))
    return Graph(graph.input_shape, (*graph.nodes, final))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_random_graphs_compute_the_same(seed):
    graph = random_graph(seed)
    least = simplify_graph(graph)
    images = 3 * torch.randn(4, *graph.input_shape, dtype=torch.float64)
    torch.testing.assert_close(run_graph(least, images), run_graph(graph, images), rtol=1e-9, atol=1e-9)
    assert least.macs() <= graph.macs()
    again = simplify_graph(least)
    assert (again.macs(), again.shapes()) == (least.macs(), least.shapes())
    assert all(min(shape) >= 1 for shape in least.shapes())


def conv(weight, bias=None, **options) -> Conv:
    weight = np.asarray(weight, dtype=np.float64)
    return Conv(weight, np.zeros(len(weight)) if bias is None else np.asarray(bias, dtype=np.float64), **options)


def chain(*ops, shape=(1, 6, 6)) -> Graph:
    return Graph(shape, tuple(Node(op, (index,)) for index, op in enumerate(ops)))


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape)


HEAD = (GlobalAvgPool(), Flatten())


class TestDeadChannels:
    @pytest.mark.parametrize(("padding", "constant", "left"), [(0, 2.0, 2), (1, 2.0, 3), (1, 0.0, 2), (1, -2.0, 2)])
    def test_a_constant_stays_only_beside_zero_padding(self, padding, constant, left):
        first = ones(3, 1, 3, 3)
        first[1] = 0
        graph = chain(
            conv(first, [0, constant, 0]),
            Relu(),
            conv(ones(4, 3, 2, 2), padding=(padding, padding)),
            *HEAD,
            Linear(ones(2, 4), ones(2)),
        )
        least = simplify_graph(graph)
        assert [len(node.op.weight) for node in least.nodes if isinstance(node.op, Conv)] == [left, 4]
        if left == 2:  # 4 taps of the constant that the ReLU lets through
            np.testing.assert_allclose(least.nodes[2].op.bias, 4 * max(constant, 0))
        elif left == 3:
            assert not least.nodes[0].op.weight[1].any()

    def test_a_relu_that_lets_nothing_through(self):
        """Output 0 reads values >= 0 by negative weights only: its ReLU gives 0. Every other ReLU has no effect."""
        second = ones(3, 2, 1, 1)
        second[0] = -1
        graph = chain(
            conv(ones(2, 1, 3, 3)), Relu(), conv(second, [-0.5, 0, 0]), Relu(), *HEAD, Linear(ones(2, 3), [0, 0])
        )
        assert [shape[0] for shape in simplify_graph(graph).shapes()] == [1, 2, 2, 2, 2, 2, 2]

    def test_a_second_relu_does_nothing(self):
        least = simplify_graph(chain(conv(ones(2, 1, 3, 3)), Relu(), MaxPool((2, 2), (2, 2)), Relu(), Flatten()))
        assert [type(node.op) for node in least.nodes] == [Conv, Relu, MaxPool, Flatten]

    def test_channels_that_are_not_read(self):
        """Nothing reads features 4 to 7, which are channel 1; that channel and those that only it reads are removed."""
        last = ones(3, 12)
        last[:, 4:8] = 0
        middle = ones(3, 3, 3, 3)
        middle[[0, 2], 2] = 0
        graph = chain(conv(ones(3, 1, 3, 3)), Relu(), conv(middle), Relu(), Flatten(), Linear(last, np.zeros(3)))
        least = simplify_graph(graph)
        assert [node.op.weight.shape[:2] for node in least.nodes if hasattr(node.op, "weight")] == [
            (2, 1),
            (2, 2),
            (3, 8),
        ]

    def test_depthwise_channels_go_with_their_input(self):
        first = ones(4, 1, 1, 1)
        first[2] = 0
        depth = conv(ones(4, 1, 3, 3), [0, 0, 3, 0], padding=(1, 1), groups=4)
        least = simplify_graph(chain(conv(first), depth, Relu(), conv(ones(2, 4, 1, 1)), *HEAD))
        assert least.nodes[1].op.weight.shape == (3, 1, 3, 3)
        assert least.nodes[1].op.groups == 3
        np.testing.assert_allclose(least.nodes[3].op.bias, 3)

    def test_other_groups_stay_whole(self):
        first, grouped = ones(4, 1, 1, 1), ones(4, 2, 3, 3)
        first[2], grouped[1] = 0, 0
        least = simplify_graph(chain(conv(first), conv(grouped, groups=2), Relu(), conv(ones(2, 4, 1, 1)), *HEAD))
        assert least.shapes()[1:3] == [(4, 6, 6), (4, 4, 4)]
        assert least.nodes[1].op.weight.shape == (4, 2, 3, 3)

    @pytest.mark.parametrize(("one", "two", "left"), [([1], [2], 4), ([1, 3], [3, 0], 3), ([0], [0, 1], 3)])
    def test_an_addition_loses_channels_that_are_dead_on_both_sides(self, one, two, left):
        first, second = ones(4, 1, 1, 1), 2 * ones(4, 4, 1, 1)
        first[one], second[two] = 0, 0
        nodes = (
            Node(conv(first), (0,)),
            Node(Relu(), (1,)),
            Node(conv(second, padding=(1, 1), stride=(1, 1)), (2,)),
            Node(conv(ones(4, 4, 3, 3)), (3,)),
            Node(replace(conv(second), bias=np.zeros(4)), (4,)),
            Node(Add(), (2, 5)),
            Node(conv(ones(3, 4, 1, 1)), (6,)),
            *(Node(op, (7 + index,)) for index, op in enumerate(HEAD)),
        )
        least = simplify_graph(Graph((1, 6, 6), nodes))
        (sum_,) = (index for index, node in enumerate(least.nodes) if isinstance(node.op, Add))
        assert least.shapes()[sum_ + 1][0] == left

    def test_a_sum_of_features_that_were_channels_and_of_others(self):
        """Nothing reads channel 1 of the convolution (9 of the features), but the sum with other features keeps it."""
        middle = ones(18, 18)
        middle[:, 9:] = 0
        nodes = (
            Node(conv(ones(2, 1, 2, 2)), (0,)),
            Node(Flatten(), (1,)),
            Node(Linear(middle, np.zeros(18)), (2,)),
            Node(Add(), (3, 2)),
            Node(Linear(middle[:1], np.zeros(1)), (4,)),
        )
        graph = Graph((1, 4, 4), nodes)
        assert simplify_graph(graph).shapes() == graph.shapes()
        assert simplify_graph(graph).macs() == 4 * 9 + 9 * 9 + 9

    def test_a_relu_that_is_always_at_its_ceiling(self):
        """A ReLU at its ceiling makes a constant channel; it stays beside zero padding, with zero weights."""
        graph = chain(
            conv(ones(2, 1, 3, 3)),
            Relu(),
            conv(ones(2, 2, 1, 1), [5, 0]),
            Relu(2.0),
            conv(ones(1, 2, 3, 3), padding=(1, 1)),
            Flatten(),
        )
        least = simplify_graph(graph)
        assert least.shapes() == graph.shapes()
        np.testing.assert_array_equal(least.nodes[2].op.weight[:, :, 0, 0], [[0, 0], [1, 1]])
        np.testing.assert_array_equal(least.nodes[2].op.bias, [5, 0])

    def test_a_dead_branch_is_removed(self):
        nodes = (
            Node(conv(ones(2, 1, 1, 1)), (0,)),
            Node(Relu(), (1,)),
            Node(conv(ones(5, 2, 1, 1)), (2,)),
            Node(conv(np.zeros((2, 5, 1, 1)), [1.0, -1.0]), (3,)),
            Node(Add(), (2, 4)),
            *(Node(op, (5 + index,)) for index, op in enumerate(HEAD)),
            Node(Linear(ones(2, 2), np.zeros(2)), (7,)),
        )
        least = simplify_graph(Graph((1, 6, 6), nodes))
        assert [type(node.op) for node in least.nodes] == [Conv, Relu, GlobalAvgPool, Flatten, Linear]

    def test_one_channel_is_kept(self):
        least = simplify_graph(chain(conv(np.zeros((3, 1, 3, 3))), *HEAD, Linear(ones(4, 3), np.arange(4.0))))
        assert least.shapes() == [(1, 6, 6), (1, 4, 4), (1, 1, 1), (1,), (4,)]
        np.testing.assert_allclose(least.nodes[-1].op.bias, np.arange(4.0))


class TestAffines:
    def test_are_folded_back_through_pooling_and_sums(self):
        scale, shift = np.array([2.0, 0.5]), np.array([1.0, -1.0])
        nodes = (
            Node(conv(ones(2, 1, 3, 3)), (0,)),
            Node(conv(ones(2, 1, 3, 3)), (0,)),
            Node(Add(), (1, 2)),
            Node(MaxPool((2, 2), (2, 2)), (3,)),
            Node(Affine(scale, shift), (4,)),
            Node(Relu(), (5,)),
            Node(Flatten(), (6,)),
        )
        least = simplify_graph(Graph((1, 6, 6), nodes))
        assert [type(node.op) for node in least.nodes] == [Conv, Conv, Add, MaxPool, Relu, Flatten]
        np.testing.assert_allclose(least.nodes[0].op.bias, shift)
        np.testing.assert_allclose(least.nodes[1].op.weight[:, 0, 0, 0], scale)
        np.testing.assert_allclose(least.nodes[1].op.bias, 0)

    def test_stay_if_a_maximum_would_become_a_minimum(self):
        least = simplify_graph(
            chain(conv(ones(1, 1, 3, 3)), MaxPool((2, 2), (2, 2)), Affine(-ones(1), ones(1)), Flatten())
        )
        assert Affine in [type(node.op) for node in least.nodes]

    @pytest.mark.parametrize(("counts", "left"), [(True, 1), (False, 0)])
    def test_stay_if_a_mean_counts_zeros_that_are_not_shifted(self, counts, left):
        pool = AvgPool((3, 3), (1, 1), (1, 1), count_padding=counts)
        least = simplify_graph(chain(conv(ones(1, 1, 3, 3)), pool, Affine(-ones(1), ones(1)), Relu(), Flatten()))
        assert sum(isinstance(node.op, Affine) for node in least.nodes) == left

    @pytest.mark.parametrize(("padding", "shift", "left"), [(0, 1.0, 0), (1, 1.0, 1), (1, 0.0, 0)])
    def test_of_images_are_folded_into_the_first_layer(self, padding, shift, left):
        graph = chain(Affine(4 * ones(1), shift * ones(1)), conv(ones(2, 1, 3, 3), padding=(padding, padding)), *HEAD)
        least = simplify_graph(graph)
        assert sum(isinstance(node.op, Affine) for node in least.nodes) == left
        if not left:
            np.testing.assert_allclose(least.nodes[0].op.bias, 9 * shift)

    def test_are_folded_into_grouped_layers(self):
        scale, shift = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 0.0, 0.0, 1.0])
        graph = chain(Relu(), Affine(scale, shift), conv(ones(6, 2, 1, 1), groups=2), Flatten(), shape=(4, 1, 1))
        _, layer, _ = simplify_graph(graph).nodes
        np.testing.assert_allclose(layer.op.weight[:, :, 0, 0], [[1, 2]] * 3 + [[3, 4]] * 3)
        np.testing.assert_allclose(layer.op.bias, [0] * 3 + [1] * 3)

    def test_are_pushed_through_flattening(self):
        graph = chain(
            Relu(), Affine(np.array([2.0, 3.0]), np.array([0.0, 1.0])), Flatten(), Linear(ones(1, 8), ones(1))
        )
        least = simplify_graph(Graph((2, 2, 2), graph.nodes))
        assert [type(node.op) for node in least.nodes] == [Relu, Flatten, Linear]
        np.testing.assert_allclose(least.nodes[-1].op.weight, [[2] * 4 + [3] * 4])
        np.testing.assert_allclose(least.nodes[-1].op.bias, [5])

    def test_stay_if_the_value_has_other_readers(self):
        nodes = (
            Node(conv(ones(2, 1, 3, 3)), (0,)),
            Node(Affine(2 * ones(2), ones(2)), (1,)),
            Node(Relu(), (2,)),
            Node(Add(), (1, 3)),
            Node(Flatten(), (4,)),
        )
        assert len(simplify_graph(Graph((1, 6, 6), nodes)).nodes) == 5


class Calls(nn.Module):
    """A module that calls a function."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def twice_in_place(self, x):
    y = self.conv(x)
    z = F.relu_(y)
    z += y  # y is what the ReLU made of it
    return z.flatten(1)


def unflattened(self, x):
    pooled = F.adaptive_avg_pool2d(self.conv(x), 1).view(x.size(0), 4)
    return pooled.view(x.size(0), 4, 1, 1).flatten(1)


class Masked(nn.Module):
    """A module whose weight is computed from parameters."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 128))
        self.register_buffer("mask", (torch.rand(3, 128) < 0.5).float())

    def forward(self, x):
        return x.flatten(1) @ (self.weight * self.mask).t()


class Standardized(nn.Conv2d):
    """A convolution whose weight is standardized by a function of several results, as in timm's networks."""

    def forward(self, x):
        std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias)


CONV = {"conv": nn.Conv2d(2, 4, 3)}
MODULES = {
    "same": nn.Sequential(nn.Conv2d(2, 3, (3, 5), dilation=(2, 1), padding="same"), nn.Flatten()),
    "valid": nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, groups=2, padding="valid", bias=False), nn.Flatten()),
    "norm": nn.Sequential(nn.BatchNorm2d(2, affine=False), nn.Flatten(), nn.BatchNorm1d(128), nn.Linear(128, 2)),
    "clip": nn.Sequential(nn.Hardtanh(0, 0.3), nn.ReLU6(), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten()),
    "clamp": Calls(lambda self, x: x.clamp(min=0).clamp(0, 0.5).flatten(1)),
    "pools": nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d((2, 1), count_include_pad=False), nn.Flatten()),
    "adaptive": nn.Sequential(nn.AdaptiveAvgPool2d((4, 2)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)),
    "mean": Calls(lambda self, x: x.mean((-1, -2))),
    "kept": Calls(lambda self, x: x.mean([2, 3], keepdim=True).squeeze(-1).squeeze(-1), **CONV),
    "constants": Calls(lambda self, x: ((3 - x * torch.tensor([2.0, 3.0]).view(2, 1, 1)) / 2 - 0.5).flatten(1)),
    "residual": Calls(lambda self, x: (x - F.relu(x - 0.5) + 2 * x).contiguous().view(x.shape[0], -1)),
    "in place": Calls(twice_in_place, **CONV),
    "norm in place": nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten()),
    "addmm": Calls(lambda self, x: torch.addmm(-torch.ones(4), x.flatten(1), torch.arange(512.0).view(128, 4) / 512)),
    "negative": Calls(lambda self, x: -(F.relu(0.5 - x) / 2 - x).flatten(1)),
    "unflattened": Calls(unflattened, **CONV),
    "masked": Masked(),
    "standardized": nn.Sequential(Standardized(2, 4, 3), nn.ReLU(), nn.Flatten()),
    "normalize": nn.Sequential(models.Normalize([0.1, 0.2], [0.3, 0.4]), nn.Flatten(), nn.Identity()),
}


@pytest.mark.parametrize("name", MODULES)
def test_operators_compute_what_torch_computes(name):
    torch.manual_seed(0)
    model = MODULES[name].eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    images = torch.rand(3, 2, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(run_graph(trace(model, (2, 8, 8)).graph, images), model(images))
        torch.testing.assert_close(run_graph(simplify(model, (2, 8, 8)), images), model(images))


@pytest.mark.parametrize(
    "change", [lambda weight: weight + torch.randn(weight.shape), lambda weight: F.dropout(weight, 0.5, True)]
)
def test_weights_that_are_random_in_evaluation_mode_are_refused(change):
    """One draw must not become the weights."""
    model = Calls(lambda self, x: F.conv2d(x, change(self.conv.weight)).flatten(1), **CONV)
    with pytest.raises(UnsupportedModel, match="is not supported: it is random, also in evaluation mode"):
        trace(model, (2, 8, 8))


def test_a_model_that_cannot_be_traced_is_refused_in_one_sentence(capfd):
    with pytest.raises(UnsupportedModel, match=r"torch\.export cannot trace the model for images"):
        trace(Calls(branching), (2, 8, 8))
    assert capfd.readouterr().err == ""


def branching(self, x):
    return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU()),
            r"^aten\.silu of layer 1 is not supported; supported are convolutions, linear",
        ),
        (
            Calls(lambda self, x: x.permute(0, 2, 3, 1).flatten(1)),
            r"aten\.permute of the model itself is not supported; supported",
        ),
        (Calls(lambda self, x: (x * x).flatten(1)), r"aten\.mul .*: it multiplies two values"),
        (Calls(lambda self, x: (1 / x).flatten(1)), r"aten\.(reciprocal|div) .* is not supported"),
        (Calls(lambda self, x: (x + torch.ones(8)).flatten(1)), r"aten\.add .*: its constant is not one number"),
        (Calls(lambda self, x: x.view(2 * x.size(0), 64)), r"aten\.view .*: it makes"),
        (Calls(lambda self, x: (x + torch.ones(3, 1, 1)[:1]).mean((1, 2, 3)).view(-1, 1)), r"aten\.mean .* other axes"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten()), r"layer 0 is not supported: its windows differ in size"),
        (
            nn.Sequential(nn.Conv2d(2, 2, 2, padding="same"), nn.Flatten()),
            "layer 0 is not supported: its padding is not the same on both",
        ),
        (nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten()), "no running statistics"),
        (
            nn.Sequential(nn.Linear(8, 3), nn.Flatten()),
            r"aten\.linear of layer 0 is not supported: it acts on one axis",
        ),
        (nn.Sequential(nn.Hardtanh(), nn.Flatten()), r"clips to other bounds than \[0, c\]"),
        (Calls(branching), "torch.export cannot trace the model for images"),
        (nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten()), "torch.export cannot trace the model for images"),
        (Calls(lambda self, x: F.avg_pool2d(x, 2, divisor_override=3).flatten(1)), "it has a divisor_override"),
        (Calls(lambda self, x: F.conv2d(x, x[:1]).flatten(1)), r"aten\.(slice|select|split|unbind|narrow|index)"),
        (nn.Sequential(nn.Conv2d(2, 2, 1), nn.Flatten(0, 1)), r"layer 1 is not supported: it makes"),
        (nn.Conv2d(2, 2, 1), "one tensor of logits"),
        (Calls(lambda self, x: (x.flatten(1), x)), "one tensor of logits"),
    ],
)
def test_unsupported_operations_are_named(model, message):
    with pytest.raises(ValueError, match=message):
        simplify(model, (2, 8, 8))


def test_unknown_and_wrong_image_shapes():
    with pytest.raises(ValueError, match=r"expected input_shape=\(c, h, w\)"):
        simplify(nn.Flatten())
    with pytest.raises(ValueError, match=r"to be \(c, h, w\), got \(8, 8\)"):
        simplify(nn.Flatten(), (8, 8))


def test_the_model_is_not_changed():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten()).train()
    before = copy.deepcopy(model.state_dict())
    simplify(model, (1, 5, 5))
    assert model[1].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def build_pruned(name: str, images: torch.Tensor) -> nn.Module:
    """Build a network with most weights and some whole channels zero, random norms, and logits that vary per image."""
    torch.manual_seed(0)
    if name == "resnet10":
        model = ResNet(BasicBlock, (1, 1, 1, 1), 10, 1, normalize=models.Normalize([0.2], [0.3]))
        model.atmc_spec = {"input_shape": [1, 28, 28]}
    else:
        model = models.build(name, 10, input_shape=(1, 28, 28), mean=[0.2], std=[0.3], seed=0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                weight = module.weight
                weight *= torch.rand_like(weight) < 0.3
                weight[torch.rand(len(weight)) < 0.2] = 0
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(-0.5, 1.5)
                module.weight[torch.rand(len(module.weight)) < 0.1] = 0
                module.bias.normal_()
                module.momentum = 1.0
        model(images)  # real statistics, none of them so small that it magnifies rounding
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.clamp_(min=0.01)
    return model.eval()


@pytest.mark.parametrize("name", ["lenet", "wrn-10-1", "resnet10", "mobilenetv2"])
def test_networks_on_real_and_adversarial_images(name, few):
    train, val = few
    images = train.pixels[:16].float() / 255
    model = build_pruned(name, images)
    report = simplify_with_report(model)
    x, y = val.pixels[:4].float() / 255, val.labels[:4]
    adversarial = fgsm(model, x, y, Linf(0.1))
    with torch.no_grad():
        for batch in (x, adversarial):
            logits, simplified = model(batch), run_graph(report.graph, batch)
            assert (simplified - logits).abs().max() <= 1e-4 * logits.abs().max()
            assert logits.std(0).max() > 0.01 * logits.abs().max()  # else the line above says nothing
    assert not any(isinstance(node.op, Affine) for node in report.graph.nodes[1:]) or name == "wrn-10-1"
    assert report.macs_after < report.macs_before == sum(layer.macs_before for layer in report.layers)
    assert report.macs_after == sum(layer.macs_after for layer in report.layers)
    lost = sum(layer.channels_before[0] - layer.channels_after[0] for layer in report.layers)
    assert lost > 0.05 * sum(layer.channels_before[0] for layer in report.layers)


@pytest.mark.parametrize("start", ["identity", "svd"])
def test_layers_as_their_factors(start, tmp_path, digits):
    """A wide layer of low rank runs as V and U, which have fewer nonzeros than W."""
    torch.manual_seed(0)
    model = factorize(models.build("lenet", 10, seed=0), start=start)
    with torch.no_grad():
        for name in ("conv2", "fc1"):
            u, v, c = getattr(model, name).parametrizations.weight.parameters()
            u *= 0
            u[:, :3] = torch.randn(len(u), 3)
            v *= torch.rand_like(v) < (0.02 if start == "identity" else 1)
            v[:3] = torch.randn(3, v.shape[1])
            c *= torch.rand_like(c) < 0.02
    artifact.save(model, tmp_path / "m.atmc")
    opened = artifact.open(tmp_path / "m.atmc")
    loaded, factors = opened.model, opened.factors
    assert set(factors) == {"conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"}
    report = simplify_with_report(loaded, factors=factors)
    assert {"conv2", "fc1"} <= {layer.name for layer in report.layers if layer.factored}
    assert report.macs_after < 0.5 * simplify_with_report(loaded, factors={}).macs_after
    x = digits.test.pixels[:8].float() / 255
    with torch.no_grad():
        logits = loaded(x)
        assert (run_graph(report.graph, x) - logits).abs().max() <= 1e-5 * logits.abs().max()
        assert torch.equal(run_graph(simplify(model), x), run_graph(report.graph, x))  # the factors of the model itself
    wrong = {"fc1.weight": weight_forms.factorized_weights(model)["fc2.weight"]}
    with pytest.raises(ValueError, match=r"the factors of fc1\.weight are not those of the model's weight"):
        simplify(fold(model), factors=wrong)


def test_norms_are_folded_into_factors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 40, 3, padding=1), nn.BatchNorm2d(40), nn.ReLU(), nn.Flatten())
    factorize(model)
    with torch.no_grad():
        u, v, c = model[0].parametrizations.weight.parameters()
        u[:, 1], v[2:], c[7] = torch.randn(len(u)), 0, torch.randn(8, 3, 3)
        u[5], c[5], v[0] = 0, 0, 0
        model[1].running_mean.normal_()
        model[1].weight.normal_()
    graph = simplify(model.eval(), (8, 6, 6))
    names = [(type(node.op), node.name) for node in graph.nodes]
    assert names[:4] == [(Conv, "0.V"), (Conv, "0.U"), (Conv, "0.C"), (Add, "0")]
    assert names[4:] == [(Relu, "2"), (Flatten, "3")]
    assert graph.shapes()[1] == (1, 6, 6)
    x = torch.rand(2, 8, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(run_graph(graph, x), model(x))
