"""The tensors that a model file holds and their order: for a zoo model they follow from its specification.

See `artifact` for the format.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from atmc.compress.factorize import all_compressible_weights, is_factorized
from atmc.pack.container import Content, ModelMismatch

MAX_DIMENSIONS, MAX_TENSORS, MAX_CLASSES = 8, 16_384, 100_000
TYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


@dataclass(frozen=True)
class Field:
    """A tensor of the plain model: its key in the state dict, its shape and its number type."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def is_weight(self) -> bool:
        """Whether it has a part of the file of its own."""
        return self.dtype == "float32" and len(self.shape) >= 2 and self.size > 0

    @property
    def role(self) -> str:
        """Last part of its name, by which tensors share statistics: "bias", "weight", "running_mean"."""
        return self.name.rpartition(".")[2]


def list_fields(model: nn.Module, *, without: Mapping[str, Any] | None = None) -> list[Field]:
    """Return the tensors of the plain model: module by module in the model's order, "weight" first, then by name.

    Args:
        without: names to leave out.

    Raises:
        ValueError: a type that the format does not hold, or too many tensors or dimensions.
    """
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    shapes = {weight.path: weight.tensor.shape for weight in all_compressible_weights(model) if is_factorized(weight)}
    fields = {name: Field(name, tuple(shape), "float32") for name, shape in shapes.items()}
    names = {kind: name for name, kind in TYPES.items()}
    for key, value in model.state_dict().items():
        if any(key.startswith(f"{path.rpartition('.')[0]}.parametrizations.".lstrip(".")) for path in shapes):
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"the model's state has {key}, a {type(value).__name__}: a model file holds tensors only")
        if value.dtype not in names:
            raise ValueError(f"tensor {key}: cannot store values of type {value.dtype}")
        fields[key] = Field(key, tuple(value.shape), names[value.dtype])
    if len(fields) > MAX_TENSORS or any(len(field.shape) > MAX_DIMENSIONS for field in fields.values()):
        raise ValueError(f"expected at most {MAX_TENSORS:,} tensors of at most {MAX_DIMENSIONS} dimensions")
    kept = [field for field in fields.values() if field.name not in (without or {})]
    return sorted(kept, key=lambda f: (order.get(f.name.rpartition(".")[0], len(order)), f.role != "weight", f.name))


def is_zoo(spec: Mapping[str, Any]) -> bool:
    """Return whether a specification is that of a zoo model."""
    return isinstance(spec.get("name"), str) and ":" not in spec["name"]


def checksum_fields(fields: Sequence[Field]) -> int:
    """Return the CRC-32 of names, shapes and types, by which a release notices that its zoo model has others."""
    return zlib.crc32(repr([(field.name, field.shape, field.dtype) for field in fields]).encode())


def expect_fields(content: Content, expected: Sequence[Field]) -> None:
    """Raise ModelMismatch unless the file holds exactly the tensors of these names, shapes and types, in this order."""
    metadata, source = content.metadata, content.source
    if is_zoo(metadata["model"]):
        if metadata.get("schema") != checksum_fields(expected):
            raise ModelMismatch(f"{source}: the tensors of {metadata['model']['name']} are not those of this release")
        return
    stored = {field.name: field for field in read_fields(content)}
    for field in expected:
        if field.name not in stored:
            raise ModelMismatch(f"{source} has no tensor {field.name}, which the model needs")
        other = stored.pop(field.name)
        if other.shape != field.shape:
            raise ModelMismatch(f"{source}: tensor {field.name} has shape {other.shape}, the model's is {field.shape}")
        if other.dtype != field.dtype:
            raise ModelMismatch(f"{source}: tensor {field.name} is {other.dtype}, the model's is {field.dtype}")
    if stored:
        raise ModelMismatch(f"{source} has a tensor {next(iter(stored))}, which the model lacks")
    if [field.name for field in expected] != [field.name for field in read_fields(content)]:
        raise ModelMismatch(f"{source}: the model's tensors are in another order")


def read_fields(content: Content) -> Iterator[Field]:
    """Yield the tensors that the metadata of a user's own model list. Raises Malformed."""
    rows = content.metadata.get("tensors")
    if not (isinstance(rows, list) and len(rows) <= MAX_TENSORS):
        raise content.malformed("it does not list its tensors")
    seen = set()
    for row in rows:
        match row:
            case [str(name), list(shape), str(dtype)] if dtype in TYPES and len(shape) <= MAX_DIMENSIONS:
                if name in seen:
                    raise content.malformed(f"it lists tensor {name} twice")
                seen.add(name)
                if all(type(side) is int and 0 <= side < 1 << 32 for side in shape):
                    yield Field(name, tuple(cast(list[int], shape)), dtype)
                    continue
        raise content.malformed(f"it lists a tensor without a valid name, shape and type: {str(row)[:80]}")
