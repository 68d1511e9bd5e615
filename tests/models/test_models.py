from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from atmc.models import NAMES, Normalize, build, build_from_spec, conv_linear_weights
from atmc.models.mobilenet import ConvNorm, InvertedResidual
from atmc.models.resnet import BasicBlock, Bottleneck, ResNet
from atmc.models.wide_resnet import PreactivationBlock, WideResNet, parse_name
from atmc.models.zoo import ZOO, ZooModel

SMALL = ("lenet", "resnet18", "resnet50", "wrn-10-1", "mobilenetv2")  # one of every family and block


def images(model: nn.Module, n: int = 3, *, side: int = 16) -> Tensor:
    spec: Any = model.atmc_spec
    channels: int = spec["input_shape"][0]
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(1))


def small(name: str, **arguments: Any) -> nn.Module:
    """Build a seeded model for 16x16 images with random running statistics, in evaluation mode."""
    model = build(name, 10, input_shape=(1 if name == "lenet" else 3, 16, 16), seed=3, **arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the running statistics become this batch's
    with torch.no_grad():
        model.train()(images(model, 8))
    return model.eval()


def scramble(model: nn.Module) -> None:
    """Give every batch norm random scales, shifts and statistics."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


# ---- structure -------------------------------------------------------------------------------------------------------


def basic_resnet_weights(blocks: tuple[int, ...], classes: int) -> int:
    total, inputs = 9 * 3 * 64, 64
    for count, width in zip(blocks, (64, 128, 256, 512), strict=True):
        for index in range(count):
            total += 9 * (inputs if index == 0 else width) * width + 9 * width * width
        total += inputs * width if inputs != width else 0
        inputs = width
    return total + 512 * classes


def wide_resnet_weights(depth: int, width: int, classes: int) -> int:
    total, inputs = 9 * 3 * 16, 16
    for outputs in (16 * width, 32 * width, 64 * width):
        total += 9 * inputs * outputs + ((depth - 4) // 3 - 1) * 9 * outputs**2
        total += inputs * outputs if inputs != outputs else 0
        inputs = outputs
    return total + inputs * classes


@pytest.mark.parametrize(
    ("name", "classes", "weights"),
    [
        ("lenet", 10, 430_500),  # the paper's
        ("lenet", 10, 20 * 25 + 50 * 20 * 25 + 500 * 50 * 4 * 4 + 10 * 500),
        ("resnet18", 10, basic_resnet_weights((2, 2, 2, 2), 10)),
        ("resnet18", 10, 11_164_352),
        ("resnet34", 10, 21_265_088),  # the paper's
        ("resnet34", 10, basic_resnet_weights((3, 4, 6, 3), 10)),
        ("resnet34", 100, 21_311_168),  # the paper's
        ("wrn-16-8", 10, 10_954_160),  # the paper's
        ("wrn-16-8", 10, wide_resnet_weights(16, 8, 10)),
        ("wrn-28-10", 100, wide_resnet_weights(28, 10, 100)),
        ("wrn-10-1", 7, wide_resnet_weights(10, 1, 7)),
    ],
)
def test_conv_and_linear_weights(name: str, classes: int, weights: int) -> None:
    with torch.device("meta"):
        assert conv_linear_weights(build(name, classes)) == weights


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [  # published totals of the ImageNet forms; ours has a 3x3 stem, the residual networks' a 7x7 stem
        ("resnet18", 1000, 11_689_512 - 64 * 3 * (49 - 9)),
        ("resnet34", 1000, 21_797_672 - 64 * 3 * (49 - 9)),
        ("resnet50", 1000, 25_557_032 - 64 * 3 * (49 - 9)),
        ("mobilenetv2", 1000, 3_504_872),
        ("wrn-28-10", 10, 36_479_194),
    ],
)
def test_all_parameters(name: str, classes: int, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build(name, classes).parameters()) == parameters


def test_conv_linear_weights_counts_every_kind_once_and_no_bias() -> None:
    linear = nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = linear.weight
    layers = [nn.Conv1d(2, 3, 4), nn.Conv2d(2, 3, 4, groups=1), nn.Conv3d(1, 2, 3), linear, linear, tied]
    other = [nn.BatchNorm2d(9), nn.Embedding(5, 5), nn.ConvTranspose2d(2, 2, 2)]
    assert conv_linear_weights(nn.Sequential(*layers, *other)) == 24 + 96 + 54 + 16
    assert conv_linear_weights(nn.ReLU()) == 0


@pytest.mark.parametrize(
    ("name", "layer", "shape"),
    [
        ("resnet18", "layer1", (64, 32, 32)),
        ("resnet18", "layer4", (512, 4, 4)),
        ("resnet50", "layer4", (2048, 4, 4)),
        ("wrn-16-8", "block1", (128, 32, 32)),
        ("wrn-16-8", "block3", (512, 8, 8)),
        ("mobilenetv2", "blocks.2", (24, 32, 32)),
        ("mobilenetv2", "blocks.16", (320, 4, 4)),
        ("mobilenetv2", "head", (1280, 4, 4)),
    ],
)
def test_resolution_inside(name: str, layer: str, shape: tuple[int, ...]) -> None:
    seen: list[torch.Size] = []
    with torch.device("meta"):
        model = build(name, 10)
        model.get_submodule(layer).register_forward_hook(lambda _module, _inputs, out: seen.append(out.shape))
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert seen == [(2, *shape)]


@pytest.mark.parametrize("shape", [(2, 16, 16), (1, 17, 29), (3, 64, 20)])
def test_lenet_takes_other_shapes(shape: tuple[int, int, int]) -> None:
    assert build("lenet", 4, input_shape=shape)(torch.zeros(2, *shape)).shape == (2, 4)


@pytest.mark.parametrize("name", SMALL[1:])
def test_other_networks_take_any_height_and_width(name: str) -> None:
    model = build(name, 5, input_shape=(2, 7, 5)).eval()
    for size in ((7, 5), (1, 1), (16, 9)):
        assert model(torch.zeros(1, 2, *size)).shape == (1, 5)


# ---- what the layers compute -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shifts", "logit"),
    [((0.0, 0.0, 0.0), 1.0), ((0.5, 0.25, -1.0), 0.75), ((-2.0, 0.25, 0.5), 0.75), ((0.0, -2.0, 0.5), 0.5),
     ((0.0, 0.0, -2.0), 0.0)],
)  # fmt: skip
def test_lenet_on_a_constant_image(shifts: tuple[float, float, float], logit: float) -> None:
    model = build("lenet", 3)
    for name, shift in zip(("conv1", "conv2", "fc1", "fc2"), (*shifts, 0.0), strict=True):
        weight, bias = model.get_submodule(name).parameters()
        nn.init.constant_(weight, 1 / weight[0].numel())  # every output is the mean of its inputs, shifted
        nn.init.constant_(bias, shift)
    torch.testing.assert_close(model(torch.ones(1, 1, 28, 28)), torch.full((1, 3), logit))


def test_lenet_pools_by_the_maximum() -> None:
    model = build("lenet", 3)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        weights["conv1.weight"][:, 0, 2, 2] = 1.0
        weights["conv2.weight"][:, :, 2, 2] = 1 / 20
        weights["fc1.weight"][0, :16] = 1.0
        weights["fc2.weight"][:, 0] = torch.tensor([1.0, 2.0, 3.0])
    dot = torch.zeros(1, 1, 28, 28)
    dot[..., 14, 14] = 1.0
    torch.testing.assert_close(model(dot), torch.tensor([[1.0, 2.0, 3.0]]))


@pytest.mark.parametrize(("kind", "last"), [(BasicBlock, "bn2"), (Bottleneck, "bn3")])
def test_a_residual_block_without_its_branch_is_its_shortcut(
    kind: type[BasicBlock] | type[Bottleneck], last: str
) -> None:
    x = torch.randn(2, 8, 6, 6)
    for stride, width in ((1, 8 // kind.expansion), (2, 8)):
        block = kind(8, width, stride).eval()
        scramble(block)
        norm = block.get_submodule(last)
        assert isinstance(norm, nn.BatchNorm2d)
        nn.init.zeros_(norm.weight)
        nn.init.constant_(norm.bias, -0.25)
        expected = torch.relu(block.shortcut(x) - 0.25)
        torch.testing.assert_close(block(x), expected)
        assert isinstance(block.shortcut, nn.Identity) == (stride == 1)
        assert expected.shape == (2, width * kind.expansion, 6 // stride, 6 // stride)


def test_a_preactivation_block_without_its_branch_is_its_shortcut() -> None:
    x = torch.randn(2, 8, 6, 6)
    same, wider = PreactivationBlock(8, 8, 1, 0.0).eval(), PreactivationBlock(8, 12, 2, 0.0).eval()
    for block in (same, wider):
        scramble(block)
        nn.init.zeros_(block.conv2.weight)
    assert torch.equal(same(x), x)
    assert wider.convShortcut is not None
    weight = wider.convShortcut.weight[:, :, 0, 0]
    expected = torch.einsum("oi,nihw->nohw", weight, torch.relu(wider.bn1(x))[..., ::2, ::2])
    torch.testing.assert_close(wider(x), expected)


@pytest.mark.parametrize(("outputs", "stride", "expansion"), [(8, 1, 1), (8, 1, 6), (8, 2, 6), (12, 1, 6)])
def test_an_inverted_residual_ends_linear_and_adds_only_equal_shapes(outputs: int, stride: int, expansion: int) -> None:
    x = torch.randn(2, 8, 6, 6)
    block = InvertedResidual(8, outputs, stride, expansion).eval()
    assert block.depthwise.conv.weight.shape == (8 * expansion, 1, 3, 3)
    nn.init.zeros_(block.project.bn.weight)
    nn.init.constant_(block.project.bn.bias, -7.0)
    constant = torch.full((2, outputs, 6 // stride, 6 // stride), -7.0)
    torch.testing.assert_close(block(x), x + constant if (outputs, stride) == (8, 1) else constant)


def test_conv_norm_clips_at_six_where_active() -> None:
    x = torch.tensor([-10.0, 3.0, 30.0]).view(3, 1, 1, 1)
    for active, expected in ((True, [0.0, 3.0, 6.0]), (False, [-10.0, 3.0, 30.0])):
        layer = ConvNorm(1, 1, 1, active=active).eval()
        nn.init.ones_(layer.conv.weight)
        torch.testing.assert_close(layer(x).flatten(), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_depthwise_weights_start_like_any_other() -> None:
    model = build("mobilenetv2", 10, seed=0)
    weight = model.get_parameter("blocks.16.depthwise.conv.weight")
    assert weight.shape == (960, 1, 3, 3)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.03)


def test_convolutions_start_at_the_variance_of_fan_out() -> None:
    for model in (build("resnet18", 10, seed=0), build("wrn-10-4", 10, seed=0), build("mobilenetv2", 10, seed=0)):
        checked = 0
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 8_000:
                fan_out = module.out_channels // module.groups * math.prod(module.kernel_size)
                assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)
                assert module.bias is None
                checked += 1
        assert checked >= 3


@pytest.mark.parametrize(
    ("name", "norm", "last", "expected"),
    [
        ("wrn-10-1", "bn1", "fc", {-1.0: 0.0, 2.0: 2.0}),
        ("mobilenetv2", "head.bn", "fc", {-1.0: 0.0, 2.0: 2.0, 9.0: 6.0}),
    ],
)
def test_a_network_ends_with_activation_average_and_linear(
    name: str, norm: str, last: str, expected: dict[float, float]
) -> None:
    model = small(name)
    weight, bias = model.get_submodule(norm).parameters()
    nn.init.zeros_(weight)
    for value, activated in expected.items():
        nn.init.constant_(bias, value)
        features = torch.full((3, len(bias)), activated)
        torch.testing.assert_close(model(images(model)), model.get_submodule(last)(features))


def test_a_resnet_stem_is_activated() -> None:
    model = small("resnet18")
    assert isinstance(model, ResNet)
    nn.init.zeros_(model.bn1.weight)
    nn.init.constant_(model.bn1.bias, -1.0)
    maps = model.layer4(model.layer3(model.layer2(model.layer1(torch.zeros(3, 64, 16, 16)))))
    torch.testing.assert_close(model(images(model)), model.linear(maps.mean((2, 3))))


def test_dropout_acts_in_training_only() -> None:
    model = build("wrn-10-1", 10, dropout=0.5, seed=0)
    x = images(model)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.5] * 3
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


# ---- layout, batch, gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_outputs_depend_on_neither_layout_nor_batch(name: str) -> None:
    model = small(name)
    x = images(model)
    with torch.no_grad():
        logits = model(x)
        torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.cat([model(x[i : i + 1]) for i in range(3)]), logits, rtol=1e-4, atol=1e-4)
        assert (logits[0] - logits[1]).abs().max() > 1e-3
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch.testing.assert_close(model(x), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_reach_the_image_and_every_parameter(name: str) -> None:
    model = small(name, mean=[0.5] * (1 if name == "lenet" else 3), std=[0.2] * (1 if name == "lenet" else 3))
    x = images(model).requires_grad_()
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = nn.functional.cross_entropy(model(x), torch.arange(3))
    gradients = torch.autograd.grad(loss, (x, *parameters))  # raises if something is not reached
    assert [name for name, g in zip(("x", *names), gradients, strict=True) if not g.abs().sum() > 0] == []


# ---- normalization ---------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0.01, 4)), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_normalize_is_its_closed_form(statistics: list[tuple[float, float]]) -> None:
    layer = Normalize([m for m, _ in statistics], [s for _, s in statistics])
    assert layer.mean.shape == layer.std.shape == (len(statistics), 1, 1)
    x = torch.rand(2, len(statistics), 3, 2)
    out = layer(x)
    for channel, (mean, std) in enumerate(statistics):
        expected = (x[:, channel].double() - mean) / std
        torch.testing.assert_close(out[:, channel].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_the_model_normalizes_first(name: str) -> None:
    mean, std = ([0.3], [0.5]) if name == "lenet" else ([0.1, 0.2, 0.3], [0.25, 0.5, 2.0])
    model, bare = small(name, mean=mean, std=std), small(name)
    assert next(iter(model.named_children()))[0] == "normalize"
    assert isinstance(bare.normalize, nn.Identity)
    state = model.state_dict()
    assert {key for key in state if key.startswith("normalize")} == {"normalize.mean", "normalize.std"}
    bare.load_state_dict({key: value for key, value in state.items() if not key.startswith("normalize")})
    x = images(model)
    shifted = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(model(x), bare(shifted))
    assert not torch.allclose(model(x), bare(x))


def test_normalize_refuses_images_of_other_channels() -> None:
    with pytest.raises(ValueError, match=r"expected images of 3 channels, .* got \(2, 1, 4, 4\)"):
        Normalize([0.5] * 3, [0.5] * 3)(torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="expected images of 1 channels"):
        Normalize([0.5], [0.5])(torch.zeros(5))


BAD_STATISTICS: list[tuple[object, object, str]] = [
    ([0.1, 0.2], [1.0, 1.0], r"expected one value of mean for each channel \(3\), got 2"),
    ([0.1] * 3, [1.0], r"expected one value of std for each channel \(3\), got 1"),
    ([], [], "got 0"),
    ([0.1] * 3, [1.0, 0.0, 1.0], "expected std > 0, got 0.0"),
    ([0.1] * 3, [1.0, -1.0, 1.0], "expected std > 0, got -1.0"),
    ([0.1] * 3, [1.0, 1e-45, 1.0], "expected std > 0, got 1e-45"),
    ([0.1, math.nan, 0.1], [1.0] * 3, "expected mean to be finite in float32, got nan"),
    ([0.1] * 3, [1.0, math.inf, 1.0], "expected std to be finite in float32, got inf"),
    ([1e39, 0.0, 0.0], [1.0] * 3, "expected mean to be finite in float32"),
    ([10**400, 0, 0], [1] * 3, "expected mean to be finite in float32"),
    (["0.1"] * 3, [1.0] * 3, "expected mean to hold numbers only, got '0.1'"),
    ([True] * 3, [1.0] * 3, "expected mean to hold numbers only, got True"),
    ("abc", [1.0] * 3, "expected mean to be a list of numbers, got str"),
    (None, [1.0] * 3, "expected mean and std both or neither, got only std"),
    ([1.0] * 3, None, "expected mean and std both or neither, got only mean"),
]


@pytest.mark.parametrize(("mean", "std", "message"), BAD_STATISTICS)
def test_bad_statistics(mean: Any, std: Any, message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build("resnet18", 10, mean=mean, std=std)
    if isinstance(mean, list) and isinstance(std, list) and (len(mean) != 2):
        with pytest.raises(ValueError, match="expected"):
            Normalize(mean, std)


# ---- seeds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lenet", "wrn-10-1"])
def test_a_seed_fixes_the_weights_and_leaves_the_random_state(name: str) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = build(name, 10, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again, other = build(name, 10, seed=5).state_dict(), build(name, 10, seed=6)
    assert all(torch.equal(value, again[key]) for key, value in first.state_dict().items())
    assert not torch.equal(*(next(model.parameters()) for model in (first, other)))
    torch.manual_seed(5)
    drawn = build(name, 10).state_dict()  # the same stream, taken from the caller's random state
    assert all(torch.equal(value, again[key]) for key, value in drawn.items())
    assert not torch.equal(next(build(name, 10).parameters()), next(first.parameters()))


def test_seeded_weights_are_drawn_on_the_cpu_for_another_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = next(build("lenet", 10, seed=5).parameters())
    moves: list[torch.device] = []
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(nn.Module, "to", lambda _self, device: moves.append(device))
    assert torch.equal(next(build("lenet", 10, seed=5).parameters()), expected)
    assert moves == [torch.device("cuda")]


def test_the_default_device_meta_is_kept() -> None:
    with torch.device("meta"):
        model = build("lenet", 10, mean=[0.5], std=[0.5], seed=0)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


# ---- arguments -------------------------------------------------------------------------------------------------------


BAD_ARGUMENTS: list[tuple[object, dict[str, object], str]] = [
    ("resnet19", {}, "unknown model 'resnet19': expected one of lenet, .*:factory; did you mean 'resnet18'"),
    ("RESNET50", {}, "did you mean 'resnet50'"),
    ("wrn-16", {}, "did you mean 'wrn-16-8'"),
    ("qqq", {}, "unknown model 'qqq': expected one of lenet, .*package.module:factory$"),
    ("", {}, "unknown model ''"),
    ("x" * 10**6, {}, "unknown model 'xxxx"),
    (None, {}, "expected a model's name, got NoneType"),
    ("wrn-17-8", {}, "expected a depth of 10, 16, 22, .* got 17"),
    ("wrn-4-8", {}, "expected a depth of 10, 16, 22, .* got 4"),
    ("wrn-130-1", {}, "expected a depth of 10, 16, 22, .* got 130"),
    ("wrn-16-21", {}, "expected a width of 1 to 20 .* got 21"),
    ("wrn-016-8", {}, "unknown model"),
    ("wrn-16-8\n", {}, "unknown model"),
    ("wrn-16-\u0668", {}, "unknown model"),
    ("resnet18", {"num_classes": 1}, "expected num_classes to be an integer from 2 to 100000, got 1"),
    ("resnet18", {"num_classes": 100_001}, "expected num_classes"),
    ("resnet18", {"num_classes": 10.0}, "expected num_classes"),
    ("resnet18", {"num_classes": True}, "expected num_classes"),
    ("resnet18", {"input_shape": (3, 32)}, r"expected input_shape to be \(C, H, W\)"),
    ("resnet18", {"input_shape": 32}, r"expected input_shape to be \(C, H, W\), got 32"),
    ("resnet18", {"input_shape": (0, 32, 32)}, "expected the number of channels to be an integer from 1 to 1024"),
    ("resnet18", {"input_shape": (1025, 32, 32)}, "expected the number of channels"),
    ("resnet18", {"input_shape": (3, 0, 32)}, "expected the height of the images"),
    ("resnet18", {"input_shape": (3, 32, 4097)}, "expected the width of the images"),
    ("resnet18", {"input_shape": (3, "32", 32)}, "expected the height of the images"),
    ("lenet", {"input_shape": (1, 15, 28)}, "expected images of at least 16x16 pixels for lenet, got 15x28"),
    ("lenet", {"input_shape": (1, 28, 15)}, "expected images of at least 16x16 pixels for lenet, got 28x15"),
    ("lenet", {"input_shape": (1, 4096, 4096)}, "expected smaller images for lenet"),
    ("lenet", {"seed": -1}, "expected seed to be an integer from 0"),
    ("lenet", {"seed": 1.5}, "expected seed to be an integer from 0"),
    ("lenet", {"dropout": 0.3}, "unknown option 'dropout': expected none for lenet"),
    ("wrn-10-1", {"drop": 0.3}, "unknown option 'drop': expected dropout for wrn-10-1"),
    ("wrn-10-1", {"dropout": 1.0}, "expected 0 <= dropout < 1, got 1.0"),
    ("wrn-10-1", {"dropout": -0.1}, "expected 0 <= dropout < 1, got -0.1"),
    ("wrn-10-1", {"dropout": math.nan}, "expected dropout to be a finite number, got nan"),
    ("wrn-10-1", {"dropout": "0.3"}, "expected dropout to be a finite number, got '0.3'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments(name: Any, arguments: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build(name, **{"num_classes": 10} | arguments)


def test_wide_resnet_checks_its_own_arguments() -> None:
    for depth, width, dropout in ((18, 1, 0.0), (10, 0, 0.0), (10, 1, 2.0)):
        with pytest.raises(ValueError, match="expected"):
            WideResNet(depth, width, 10, dropout=dropout)
    assert parse_name("wrn-28-10") == (28, 10)
    assert parse_name("wrn-28-10-2") is None


# ---- specs -----------------------------------------------------------------------------------------------------------


def same_structure(model: nn.Module, other: nn.Module) -> bool:
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (model, other)]
    return repr(model) == repr(other) and shapes[0] == shapes[1]


@pytest.mark.parametrize("name", [*NAMES, "wrn-22-3"])
def test_a_spec_of_every_model_round_trips_through_json(name: str) -> None:
    extra: dict[str, Any] = {"dropout": 0.25} if name.startswith("wrn") else {}
    with torch.device("meta"):
        plain = build(name, 10)
        model = build(name, 7, input_shape=(2, 20, 24), mean=(0, 0.5), std=[0.2, 0.3], **extra)
        for built in (plain, model):
            spec = json.loads(json.dumps(built.atmc_spec))
            again = build_from_spec(spec)
            assert again.atmc_spec == built.atmc_spec == spec
            assert same_structure(again, built)
    assert not same_structure(plain, model)
    assert model.atmc_spec == {"name": name, "num_classes": 7, "input_shape": [2, 20, 24], "mean": [0.0, 0.5],
                               "std": [0.2, 0.3], "options": extra}  # fmt: skip
    assert plain.atmc_spec == {"name": name, "num_classes": 10, "mean": None, "std": None,
                               "input_shape": [1, 28, 28] if name.startswith("lenet") else [3, 32, 32],
                               "options": {"dropout": 0.0} if extra else {}}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_a_rebuilt_model_computes_the_same(name: str) -> None:
    channels = 1 if name == "lenet" else 3
    model = small(name, mean=[0.4] * channels, std=[0.3] * channels)
    state = torch.get_rng_state()
    again = build_from_spec(model.atmc_spec).eval()
    assert torch.equal(torch.get_rng_state(), state)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images(model)), model(images(model)))


SPEC: dict[str, object] = {"name": "wrn-10-1", "num_classes": 10, "input_shape": [3, 32, 32], "mean": [0.5, 0.5, 0.5],
                           "std": [0.2, 0.2, 0.2], "options": {"dropout": 0.5}}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"name": "resnet19"}, {"name": None}, {"name": ["lenet"]}, {"name": "wrn-99994-1"}, {"name": "wrn-10-9999"},
     {"num_classes": "10"}, {"num_classes": 10**9}, {"num_classes": None}, {"num_classes": 10.0},
     {"input_shape": None}, {"input_shape": []}, {"input_shape": [3, 32, 10**6]}, {"input_shape": [10**6, 32, 32]},
     {"input_shape": {"0": 3, "1": 32, "2": 32}}, {"input_shape": [1, 32, 32]}, {"input_shape": "332"},
     {"mean": None}, {"std": None}, {"std": [0.2, 0.2, 0]}, {"mean": [0.5, 0.5, math.nan]}, {"mean": [0.5, 0.5]},
     {"mean": [[0.5], [0.5], [0.5]]}, {"mean": 0.5}, {"options": None}, {"options": []}, {"options": {"width": 2}},
     {"options": {"dropout": "0"}}, {"options": {"dropout": 1}}, {"options": {"dropout": True}}, {"extra": 1}],
)  # fmt: skip
def test_malformed_specs(change: dict[str, object]) -> None:
    with torch.device("meta"):
        build_from_spec(SPEC)
        with pytest.raises(ValueError, match=r"expected|unknown"):
            build_from_spec(SPEC | change)


@pytest.mark.parametrize("missing", list(SPEC))
def test_specs_lacking_a_key(missing: str) -> None:
    with pytest.raises(ValueError, match="expected a model's spec to have the keys"):
        build_from_spec({key: value for key, value in SPEC.items() if key != missing})


@pytest.mark.parametrize("spec", [None, [], "lenet", 3, {}, [SPEC]])
def test_values_that_are_no_spec(spec: object) -> None:
    with pytest.raises(ValueError, match="expected a model's spec"):
        build_from_spec(spec)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(NAMES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3) | st.just("dropout"), inner),
    max_leaves=6,
)


@given(st.sampled_from(list(SPEC)), JSON)
@settings(max_examples=150, deadline=None)
def test_a_spec_is_refused_or_taken_as_it_is(key: str, value: object) -> None:
    spec = SPEC | {key: value}
    with torch.device("meta"):
        try:
            model = build_from_spec(spec)
        except ValueError:
            return
    assert model.atmc_spec == (spec if spec["options"] != {} else spec | {"options": {"dropout": 0.0}})


def test_a_network_is_added_to_the_zoo_by_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def builder(classes: int, shape: tuple[int, int, int], *, normalize: nn.Module | None, scale: float) -> nn.Module:
        return nn.Sequential(
            normalize or nn.Identity(), nn.Flatten(), nn.Linear(int(scale) * math.prod(shape), classes)
        )

    monkeypatch.setitem(ZOO, "perceptron", ZooModel(builder=builder, input_shape=(1, 4, 4), options={"scale": 1}))
    model = build("perceptron", 3, mean=[0.5], std=[0.5])
    assert model(torch.zeros(2, 1, 4, 4)).shape == (2, 3)
    assert model.atmc_spec == {"name": "perceptron", "num_classes": 3, "input_shape": [1, 4, 4], "mean": [0.5],
                               "std": [0.5], "options": {"scale": 1.0}}  # fmt: skip
    assert same_structure(build_from_spec(model.atmc_spec), model)
    with pytest.raises(ValueError, match="unknown option 'scall': expected scale for perceptron; did you mean 'scale'"):
        build("perceptron", 3, scall=2)


# ---- factories -------------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Return a function that writes a module into an empty current folder and returns its unique name."""
    monkeypatch.chdir(tmp_path)

    def write_module(source: str) -> str:
        name = f"atmc_factory_{tmp_path.name}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text("import torch\n" + source)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write_module


NET = "def make(num_classes):\n    return torch.nn.Linear(4, num_classes)\n"


def test_a_factory_of_the_current_folder(write: Callable[[str], str]) -> None:
    name = write(NET) + ":make"
    path, state = list(sys.path), torch.get_rng_state()
    model = build(name, 6, input_shape=(1, 2, 2), seed=1)
    assert sys.path == path
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(model, nn.Linear)
    assert model.atmc_spec == {"name": name, "num_classes": 6, "input_shape": [1, 2, 2]}
    again = build(name, 6, seed=1)
    assert torch.equal(next(again.parameters()), model.weight)
    assert again.atmc_spec == {"name": name, "num_classes": 6, "input_shape": None}


def test_a_factory_that_imports_when_it_is_called(write: Callable[[str], str], tmp_path: Path) -> None:
    path = list(sys.path)
    (tmp_path / "atmc_late_blocks.py").write_text("import torch\n" + NET)
    late = write(
        "def make(num_classes):\n    from atmc_late_blocks import make as inner\n    return inner(num_classes)\n"
    )
    assert isinstance(build(f"{late}:make", 6), nn.Linear)
    assert sys.path == path


def test_draws_of_the_import_do_not_move_a_factorys_seed(write: Callable[[str], str]) -> None:
    name = write("torch.rand(5)\n" + NET) + ":make"
    first, second = build(name, 6, seed=1), build(name, 6, seed=1)  # only the first imports
    assert torch.equal(*(next(model.parameters()) for model in (first, second)))


def test_a_factory_in_a_package(write: Callable[[str], str], tmp_path: Path) -> None:
    package = write("") + "_package"
    (tmp_path / package).mkdir()
    (tmp_path / package / "nets.py").write_text("import torch\n" + NET)
    assert isinstance(build(f"{package}.nets:make", 3), nn.Linear)


@pytest.mark.parametrize(
    ("source", "attribute", "message"),
    [
        (NET, "mak", "unknown factory 'mak': expected a callable of the module .*; did you mean 'make'"),
        ("", "zzz", "unknown factory 'zzz': expected a callable of the module '[a-z0-9_]*'$"),
        ("make = 3\n", "make", "to be callable, got int"),
        ("def make(num_classes):\n    return 'net'\n", "make", "to return a torch.nn.Module, got str"),
        ("def make(classes):\n    return torch.nn.Linear(4, classes)\n", "make", "callable with num_classes alone"),
        ("def make(num_classes, w):\n    return torch.nn.Linear(4, w)\n", "make", "callable with num_classes alone"),
        ("import atmc_no_such_module\n", "make", "cannot import .* No module named 'atmc_no_such_module'"),
        ("width\n", "make", "cannot import .*: NameError: name 'width' is not defined"),
        ("def make(num_classes)\n", "make", "cannot import .*: SyntaxError: expected ':'"),
        (
            "def make(num_classes):\n    1 / 0\n",
            "make",
            "factory .*:make failed .*: ZeroDivisionError: division by zero$",
        ),
        ("def make(num_classes):\n    {}['w']\n", "make", "failed for num_classes=10: KeyError: 'w'$"),
        ("def make(num_classes):\n    assert num_classes < 3\n", "make", "failed for num_classes=10: AssertionError$"),
        ("def make(num_classes):\n    raise OSError('a\\nb')\n", "make", "OSError: a$"),
        (NET, "make:", "expected a factory as package.module:factory"),
        (NET, "", "expected a factory as package.module:factory"),
    ],
)
def test_bad_factories(write: Callable[[str], str], source: str, attribute: str, message: str) -> None:
    path = list(sys.path)
    name = f"{write(source)}:{attribute}"
    with pytest.raises(ValueError, match=message):
        build(name, 10)
    assert sys.path == path


@pytest.mark.parametrize("name", [":make", ".a:make", "a..b:make", "a b:make", "atmc_no_such_module:make"])
def test_bad_factory_modules(name: str) -> None:
    with pytest.raises(ValueError, match=r"expected a factory as package.module:factory|No module named"):
        build(name, 10)


def test_bad_arguments_of_a_factory(write: Callable[[str], str]) -> None:
    name = write(NET) + ":make"
    for arguments in ({"mean": [0.5]}, {"std": [0.5]}, {"dropout": 0.1}):
        with pytest.raises(ValueError, match="expected no mean, std or options for the factory"):
            build(name, 10, **arguments)
    with pytest.raises(ValueError, match="expected num_classes"):
        build(name, 0)
    with pytest.raises(ValueError, match="expected the width of the images"):
        build(name, 10, input_shape=(1, 2, 0))
    assert name.partition(":")[0] not in sys.modules  # arguments are checked before anything is imported


def test_a_spec_never_imports_a_factory(write: Callable[[str], str]) -> None:
    module = write(NET)
    for spec in ({"name": f"{module}:make", "num_classes": 10, "input_shape": None}, SPEC | {"name": f"{module}:make"}):
        with pytest.raises(ValueError, match="a factory is needed to build it"):
            build_from_spec(spec)
    assert module not in sys.modules


def test_resnet_block_counts_follow_the_paper() -> None:
    with torch.device("meta"):
        for name, kind, blocks in (("resnet18", BasicBlock, [2, 2, 2, 2]), ("resnet34", BasicBlock, [3, 4, 6, 3]),
                                   ("resnet50", Bottleneck, [3, 4, 6, 3])):  # fmt: skip
            model = build(name, 10)
            assert isinstance(model, ResNet)
            stages = [model.layer1, model.layer2, model.layer3, model.layer4]
            assert [len(stage) for stage in stages] == blocks
            assert all(isinstance(block, kind) for stage in stages for block in stage)
