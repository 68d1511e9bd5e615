"""The zoo of networks: `ZOO` is the one table of their names, `build` and `build_from_spec` make them.

A built model carries ``atmc_spec``, a JSON-able dict from which `build_from_spec` makes the same architecture again:

    {"name": "wrn-16-8", "num_classes": 10, "input_shape": [3, 32, 32], "mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2],
     "options": {"dropout": 0.3}}

``mean`` and ``std`` are null if the model does not normalize. The spec of a user's own model, built from
``package.module:factory``, has the first three keys only; its ``input_shape`` is null if it is not known.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from numbers import Integral
from typing import TypeVar

import torch
from torch import nn

from atmc.core.errors import unknown
from atmc.core.rng import MAX_SEED
from atmc.core.torch_state import own_generators
from atmc.models.factory import call_factory, import_factory
from atmc.models.lenet import LeNet
from atmc.models.mobilenet import MobileNetV2
from atmc.models.normalize import Normalize, check_statistics
from atmc.models.resnet import BasicBlock, Bottleneck, ResNet
from atmc.models.wide_resnet import WideResNet, check_size, parse_name

Shape = tuple[int, int, int]  # (C, H, W) of the images
Builder = Callable[..., nn.Module]  # (num_classes, shape, *, normalize, **options) -> network
_MAX_CLASSES, _MAX_CHANNELS, _MAX_SIDE = 100_000, 1024, 4096
_SPEC_ATTRIBUTE = "atmc_spec"
_Built = TypeVar("_Built")


@dataclass(frozen=True, kw_only=True)
class ZooModel:
    """What the zoo knows about a network.

    Args:
        builder: makes it: (num_classes, (C, H, W), *, normalize, **options) -> network. It checks the options' ranges.
        input_shape: (C, H, W) of its images, if none is given.
        options: name -> default of each numerical option.
    """

    builder: Builder
    input_shape: Shape = (3, 32, 32)
    options: Mapping[str, float] = field(default_factory=dict)


def _resnet(block: type[BasicBlock] | type[Bottleneck], *blocks: int) -> ZooModel:
    return ZooModel(builder=lambda classes, shape, **rest: ResNet(block, blocks, classes, shape[0], **rest))


def _wide_resnet(depth: int, width: int) -> ZooModel:
    check_size(depth, width)
    return ZooModel(
        builder=lambda classes, shape, **rest: WideResNet(depth, width, classes, shape[0], **rest),
        options={"dropout": 0.0},
    )


ZOO: dict[str, ZooModel] = {
    "lenet": ZooModel(builder=LeNet, input_shape=(1, 28, 28)),
    "lenet-caffe": ZooModel(builder=partial(LeNet, relu=False), input_shape=(1, 28, 28)),  # the paper's
    "resnet18": _resnet(BasicBlock, 2, 2, 2, 2),
    "resnet34": _resnet(BasicBlock, 3, 4, 6, 3),
    "resnet50": _resnet(Bottleneck, 3, 4, 6, 3),
    "wrn-16-8": _wide_resnet(16, 8),
    "wrn-28-10": _wide_resnet(28, 10),
    "mobilenetv2": ZooModel(builder=lambda classes, shape, **rest: MobileNetV2(classes, shape[0], **rest)),
}
"""The networks by name. Every other ``wrn-D-W`` with D = 4 + 6 n is known too, by `find_model`."""

NAMES = tuple(ZOO)
"""The names that help and errors list."""


def find_model(name: object) -> ZooModel:
    """Return what the zoo knows about the network of a name.

    Raises:
        ValueError: no network has this name.
    """
    if not isinstance(name, str):
        raise ValueError(f"expected a model's name, got {type(name).__name__}")
    if name in ZOO:
        return ZOO[name]
    size = parse_name(name)
    if size is not None:
        return _wide_resnet(*size)
    raise unknown("model", name, NAMES, expected=f"one of {', '.join(NAMES)} or package.module:factory")


def build(
    name: str,
    num_classes: int,
    *,
    input_shape: Shape | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int | None = None,
    **options: object,
) -> nn.Module:
    """Build a network with fresh weights, in training mode, that maps images in [0, 1] to logits.

    Args:
        name: ``lenet``, ``resnet18``, ``resnet34``, ``resnet50``, ``wrn-D-W`` (such as ``wrn-28-10``),
            ``mobilenetv2``, or ``package.module:factory``, a callable ``factory(num_classes=...) -> nn.Module`` that
            is imported with the current folder importable.
        num_classes: number of logits, 2 to 100,000.
        input_shape: (C, H, W) of the images; by default (1, 28, 28) for lenet and (3, 32, 32) for the others.
        mean, std: C numbers each in pixel units: the model's first layer computes (x - mean) / std. Both or none;
            none for a factory, whose model normalizes by itself.
        seed: the weights are drawn from the CPU's generator, seeded with this number, and the random state is left as
            it was; None draws from the random state as it is.
        options: ``dropout`` (0 <= dropout < 1, default 0) for ``wrn-D-W``; the others have none.

    Raises:
        ValueError: the name is unknown (the nearest one is suggested), a factory cannot be imported, fails or returns
            no nn.Module, or an argument is out of range.

    >>> net = build("lenet", 10, mean=[0.1307], std=[0.3081], seed=0)
    >>> net.atmc_spec["input_shape"], conv_linear_weights(net)
    ([1, 28, 28], 430500)
    """
    if isinstance(name, str) and ":" in name:
        if mean is not None or std is not None or options:
            raise ValueError(f"expected no mean, std or options for the factory {name}, whose model has its own")
        classes = _check_integer("num_classes", num_classes, 2, _MAX_CLASSES)
        shape = None if input_shape is None else _check_shape(input_shape)
        return _build_from_factory(name, classes, shape, seed)
    return _build_zoo_model(_check_spec(name, num_classes, input_shape, mean, std, options), seed)


def build_from_spec(spec: object) -> nn.Module:
    """Build the zoo network that a spec (see the head of this file) describes; its weights have no meaning.

    The spec may come from an untrusted file: every entry is checked, sizes are bounded, and nothing is ever imported.
    The random state is left as it was.

    Raises:
        ValueError: this is not the ``atmc_spec`` of a zoo model (that of a factory's model is not).

    >>> net = build_from_spec({"name": "lenet", "num_classes": 10, "input_shape": [1, 28, 28], "mean": None,
    ...                        "std": None, "options": {}})
    >>> type(net).__name__
    'LeNet'
    """
    if not isinstance(spec, dict):
        raise ValueError(f"expected a model's spec to be a dict, got {type(spec).__name__}")
    name = spec.get("name")
    if isinstance(name, str) and ":" in name:
        raise ValueError(f"expected a model of the zoo, got {reprlib.repr(name)}: a factory is needed to build it")
    keys = {"name", "num_classes", "input_shape", "mean", "std", "options"}
    if spec.keys() != keys:
        raise ValueError(f"expected a model's spec to have the keys {sorted(keys)}, got {reprlib.repr(list(spec))}")
    if spec["input_shape"] is None:
        raise ValueError("expected a model's spec to have an input_shape, got None")
    arguments = (spec[key] for key in ("num_classes", "input_shape", "mean", "std", "options"))
    return _build_zoo_model(_check_spec(name, *arguments), seed=0)


def conv_linear_weights(model: nn.Module) -> int:
    """Count the entries in the weights of all Conv1d, Conv2d, Conv3d and Linear modules, without biases.

    This is the denominator of the paper's ratios. A weight that several modules share counts once. Of a factorized
    weight the product is counted, not the factors.

    >>> conv_linear_weights(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 5)))
    58
    """
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    weights = {module.weight for module in model.modules() if isinstance(module, kinds)}  # tensors hash by identity
    return sum(weight.numel() for weight in weights)


@dataclass(frozen=True)
class _Spec:
    """A checked spec; its fields are the keys of ``atmc_spec``."""

    name: str
    num_classes: int
    input_shape: list[int]
    mean: list[float] | None
    std: list[float] | None
    options: dict[str, float]


def _check_spec(
    name: object, num_classes: object, input_shape: object, mean: object, std: object, options: object
) -> _Spec:
    """Return the spec with its defaults filled in; raise ValueError for entries that no network of the zoo has."""
    row = find_model(name)
    shape = _check_shape(row.input_shape if input_shape is None else input_shape)
    if (mean is None) != (std is None):
        raise ValueError(f"expected mean and std both or neither, got only {'std' if mean is None else 'mean'}")
    means, stds = (None, None) if mean is None else check_statistics(mean, std, channels=shape[0])
    classes = _check_integer("num_classes", num_classes, 2, _MAX_CLASSES)
    return _Spec(
        name=str(name),
        num_classes=classes,
        input_shape=list(shape),
        mean=means,
        std=stds,
        options=_check_options(str(name), options, row.options),
    )


def _check_options(name: str, options: object, defaults: Mapping[str, float]) -> dict[str, float]:
    """Return all options of a network, those not given at their defaults."""
    if not isinstance(options, dict):
        raise ValueError(f"expected options to be a dict, got {type(options).__name__}")
    for key in options:
        if key not in defaults:
            raise unknown("option", key, defaults, expected=f"{', '.join(defaults) or 'none'} for {name}")
    return {key: _check_number(key, options.get(key, default)) for key, default in defaults.items()}


def _check_shape(shape: object) -> Shape:
    if not isinstance(shape, (list, tuple)) or len(shape) != 3:
        raise ValueError(f"expected input_shape to be (C, H, W), got {reprlib.repr(shape)}")
    channels, height, width = shape
    return (
        _check_integer("the number of channels", channels, 1, _MAX_CHANNELS),
        _check_integer("the height of the images", height, 1, _MAX_SIDE),
        _check_integer("the width of the images", width, 1, _MAX_SIDE),
    )


def _check_integer(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
        if low <= number <= high:
            return number
    raise ValueError(f"expected {name} to be an integer from {low} to {high}, got {reprlib.repr(value)}")


def _check_number(name: str, value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)
    raise ValueError(f"expected {name} to be a finite number, got {reprlib.repr(value)}")


def _build_zoo_model(spec: _Spec, seed: int | None) -> nn.Module:
    def build_network() -> nn.Module:
        normalize = None if spec.mean is None or spec.std is None else Normalize(spec.mean, spec.std)
        builder = find_model(spec.name).builder
        return builder(spec.num_classes, tuple(spec.input_shape), normalize=normalize, **spec.options)

    model = _call_with_seed(build_network, seed)
    setattr(model, _SPEC_ATTRIBUTE, asdict(spec))
    return model


def _call_with_seed(build_value: Callable[[], _Built], seed: int | None) -> _Built:
    """Return ``build_value()``, called with the CPU's generator at a seed, and set the generator back.

    A module is moved to the default device. Without a seed the call draws from the generator as it is.
    """
    if seed is None:
        return build_value()
    start = _check_integer("seed", seed, 0, MAX_SEED)
    default_device = torch.get_default_device()
    drawn_on = default_device if default_device.type == "meta" else torch.device("cpu")
    with own_generators(torch.device("cpu")), drawn_on:
        torch.default_generator.manual_seed(start)
        built = build_value()
    if isinstance(built, nn.Module) and default_device.type != drawn_on.type:
        built.to(default_device)
    return built


def _build_from_factory(name: str, num_classes: int, input_shape: Shape | None, seed: int | None) -> nn.Module:
    factory = import_factory(name)
    model = _call_with_seed(lambda: call_factory(factory, num_classes, name), seed)
    shape = None if input_shape is None else list(input_shape)
    setattr(model, _SPEC_ATTRIBUTE, {"name": name, "num_classes": num_classes, "input_shape": shape})
    return model
