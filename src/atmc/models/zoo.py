"""The zoo: `build` is the only place where a name becomes a network.

A built model carries ``atmc_spec``, a JSON-able dict from which `build_from_spec` makes the same structure again:

    {"name": "wrn-16-8", "num_classes": 10, "input_shape": [3, 32, 32], "mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2],
     "options": {"dropout": 0.3}}

``mean`` and ``std`` are null where nothing is normalized. The spec of a user's own model, built from
``package.module:factory``, has the first three keys only, with ``input_shape`` null where it is not known.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import TypeVar

import torch
from torch import nn

from atmc.models.factory import call_factory, import_factory
from atmc.models.lenet import LeNet
from atmc.models.mobilenet import MobileNetV2
from atmc.models.normalize import Normalize, checked_statistics
from atmc.models.resnet import BasicBlock, Bottleneck, ResNet
from atmc.models.wide_resnet import WideResNet, check_size, checked_dropout, parse_name

NAMES = ("lenet", "resnet18", "resnet34", "resnet50", "wrn-16-8", "wrn-28-10", "mobilenetv2")
"""Names to offer a user; every ``wrn-D-W`` with D = 4 + 6 n is a name too."""

_RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
_MAX_CLASSES, _MAX_CHANNELS, _MAX_SIDE, _MAX_NAME = 100_000, 1024, 4096, 200
_SPEC_ATTRIBUTE = "atmc_spec"
_Made = TypeVar("_Made")


def build(
    name: str,
    num_classes: int,
    *,
    input_shape: tuple[int, int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int | None = None,
    **options: object,
) -> nn.Module:
    """A network with fresh weights, in training mode, that maps images in [0, 1] to logits.

    Args:
        name: ``lenet``, ``resnet18``, ``resnet34``, ``resnet50``, ``wrn-D-W`` (such as ``wrn-28-10``),
            ``mobilenetv2``, or ``package.module:factory``, a callable ``factory(num_classes=...) -> nn.Module`` that
            is imported with the current folder importable.
        num_classes: number of logits, 2 to 100,000.
        input_shape: (C, H, W) of the images; (1, 28, 28) for lenet and (3, 32, 32) for the others where it is None.
        mean, std: C numbers each in pixel units: the model's first layer computes (x - mean) / std. Both or none;
            none for a factory, whose model normalizes by itself.
        seed: draws the weights from the CPU's generator set to this number, and leaves the random state as it was;
            None draws from the random state as it is.
        options: ``dropout`` (0 <= dropout < 1, default 0) for ``wrn-D-W``; the others have none.

    Raises:
        ValueError: for an unknown name (the nearest one is suggested), for a factory that cannot be imported, fails or
            returns no nn.Module, and for arguments out of range.

    >>> net = build("lenet", 10, mean=[0.1307], std=[0.3081], seed=0)
    >>> net.atmc_spec["input_shape"], conv_linear_weights(net)
    ([1, 28, 28], 430500)
    """
    if isinstance(name, str) and ":" in name:
        if mean is not None or std is not None or options:
            raise ValueError(f"expected no mean, std or options for the factory {name}, whose model has its own")
        classes = _integer("num_classes", num_classes, 2, _MAX_CLASSES)
        shape = None if input_shape is None else _image_shape(input_shape)
        return _from_factory(name, classes, shape, seed)
    return _from_zoo(_checked_spec(name, num_classes, input_shape, mean, std, options), seed)


def build_from_spec(spec: object) -> nn.Module:
    """The zoo network that a spec (see the head of this file) describes, with weights of no meaning.

    The spec may come from an untrusted file: every entry is checked, sizes are bounded, and nothing is ever imported.
    The random state is left as it was.

    Raises:
        ValueError: for anything that is not the ``atmc_spec`` of a zoo model, a factory's among them.

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
    return _from_zoo(_checked_spec(name, *arguments), seed=0)


def conv_linear_weights(model: nn.Module) -> int:
    """Number of entries in the weights of all Conv1d, Conv2d, Conv3d and Linear modules, biases not counted.

    The denominator of the paper's ratios. A weight that several modules share counts once. Meant for plain modules:
    of a factorized one it counts the product, not the factors.

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


def _checked_spec(
    name: object, num_classes: object, input_shape: object, mean: object, std: object, options: object
) -> _Spec:
    known = _known_name(name)
    if input_shape is None:
        input_shape = (1, 28, 28) if known == "lenet" else (3, 32, 32)
    shape = _image_shape(input_shape)
    if (mean is None) != (std is None):
        raise ValueError(f"expected mean and std both or neither, got only {'std' if mean is None else 'mean'}")
    means, stds = (None, None) if mean is None else checked_statistics(mean, std, channels=shape[0])
    classes = _integer("num_classes", num_classes, 2, _MAX_CLASSES)
    return _Spec(known, classes, list(shape), means, stds, _checked_options(known, options))


def _known_name(name: object) -> str:
    """The name, if a network of the zoo has it; ValueError with the nearest name otherwise."""
    if not isinstance(name, str):
        raise ValueError(f"expected a model's name, got {type(name).__name__}")
    size = parse_name(name)
    if size is not None:
        check_size(*size)
        return name
    if name in NAMES:
        return name
    near = difflib.get_close_matches(name[:_MAX_NAME].lower(), NAMES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(NAMES)} or package.module:factory"
    raise ValueError(f"unknown model {reprlib.repr(name)}; {hint}")


def _checked_options(name: str, options: object) -> dict[str, float]:
    """All options of a network, those not given at their defaults."""
    if not isinstance(options, dict):
        raise ValueError(f"expected options to be a dict, got {type(options).__name__}")
    known = {} if parse_name(name) is None else {"dropout": 0.0}
    for key in options:
        if key not in known:
            raise ValueError(f"unknown option {reprlib.repr(key)} for {name}, which has {', '.join(known) or 'none'}")
    return {key: checked_dropout(options.get(key, default)) for key, default in known.items()}


def _image_shape(shape: object) -> tuple[int, int, int]:
    if not isinstance(shape, (list, tuple)) or len(shape) != 3:
        raise ValueError(f"expected input_shape to be (C, H, W), got {reprlib.repr(shape)}")
    channels, height, width = shape
    return (
        _integer("the number of channels", channels, 1, _MAX_CHANNELS),
        _integer("the height of the images", height, 1, _MAX_SIDE),
        _integer("the width of the images", width, 1, _MAX_SIDE),
    )


def _integer(word: str, value: object, low: int, high: int) -> int:
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
        if low <= number <= high:
            return number
    raise ValueError(f"expected {word} to be an integer from {low} to {high}, got {reprlib.repr(value)}")


def _from_zoo(spec: _Spec, seed: int | None) -> nn.Module:
    model = _seeded(lambda: _network(spec), seed)
    setattr(model, _SPEC_ATTRIBUTE, asdict(spec))
    return model


def _network(spec: _Spec) -> nn.Module:
    channels, height, width = spec.input_shape
    normalize = None if spec.mean is None or spec.std is None else Normalize(spec.mean, spec.std)
    if spec.name == "lenet":
        return LeNet(spec.num_classes, (channels, height, width), normalize=normalize)
    if spec.name == "mobilenetv2":
        return MobileNetV2(spec.num_classes, channels, normalize=normalize)
    if spec.name in _RESNETS:
        block, blocks = _RESNETS[spec.name]
        return ResNet(block, blocks, spec.num_classes, channels, normalize=normalize)
    size = parse_name(spec.name)
    assert size is not None
    return WideResNet(*size, spec.num_classes, channels, dropout=spec.options["dropout"], normalize=normalize)


def _seeded(make: Callable[[], _Made], seed: int | None) -> _Made:
    """``make()`` with the CPU's generator at ``seed`` and put back afterwards; a model goes to the default device."""
    if seed is None:
        return make()
    start = _integer("seed", seed, 0, 2**63 - 1)
    home = torch.get_default_device()
    drawn_on = home if home.type == "meta" else torch.device("cpu")
    with torch.random.fork_rng(devices=[]), drawn_on:
        torch.default_generator.manual_seed(start)
        made = make()
    if isinstance(made, nn.Module) and home.type != drawn_on.type:
        made.to(home)
    return made


def _from_factory(name: str, num_classes: int, input_shape: tuple[int, int, int] | None, seed: int | None) -> nn.Module:
    factory = import_factory(name)
    model = _seeded(lambda: call_factory(factory, num_classes, name), seed)
    shape = None if input_shape is None else list(input_shape)
    setattr(model, _SPEC_ATTRIBUTE, {"name": name, "num_classes": num_classes, "input_shape": shape})
    return model
