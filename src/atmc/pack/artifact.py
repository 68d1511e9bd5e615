"""The model file, version 3.

All numbers are little-endian, a varint is LEB128 of at most 5 bytes; the same values give the same bytes.

    bytes        content
    4            "ATMC"
    u16          version, 3
    part         metadata: JSON (UTF-8, sorted keys), deflated (raw, with DICTIONARY as preset dictionary)
    part each    a weight: every float32 tensor of two or more dimensions, in the order of `fields`
    part         everything else: biases, batch_norm, buffers, in the order of `fields` (`small.write_small`)

A part is its length as a varint, its bytes, and a u32: the CRC-32 of the bytes, begun from that of the part before and
for the first from that of the six bytes before it, so that parts cannot change places.

A weight's part:

    u8           form: 0 W itself; 1 (U + I) V + C; 2 U (V + I) + C; 3 U V + C; 4 U V
    varint       rank, where there are factors
    then for U, V, C or for W: the length as a varint, where another follows, and the arithmetic code (`coder`)

Arithmetic code (`bits`, all in integers): first one bit, 1 for all zero; two bits for the group size of the positions
(0: no entry is zero, no positions; else an index into `Matrix.groups`) and, with positions, three for their prior's
scale; one for float16 or float32, one for a codebook, with one eight for its size less 1, one for the values'
surroundings (`bits.code_placed`; see `coder.MAX_NEAR`), three for the prior's scale of the values; then the positions,
the codebook's values ascending, and codes or plain values in row-major order. Zeros at the end are cut off. Everything
else is one such code: of a float32 tensor one bit for a single repeated value, one for float16, and where values differ
one for zeros among them, whose places follow as flags; then plain values, under statistics that tensors of one role
(last part of their names) share; other types byte by byte.

W of a factorized weight is defined: summed in float64 in a fixed order and rounded once (`factorize.compose`).

Metadata: {"model", "threat", "method", "tool", "norms"} and, of a zoo model, "schema", the CRC-32 of its fields, or, of
a user's own model, "tensors", its fields as [name, shape, type], with "classes" and "input_shape" where "model" lacks
them. "model" is the zoo model's specification (`models.build_from_spec`), or names a user's own factory, which is never
imported from a file. "norms": batch norms are affine, without statistics (`norms`). Nothing in a file is executed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from atmc.core.files import write_beside
from atmc.core.version import __version__
from atmc.models import batch_norm, build_from_spec, call_factory
from atmc.models.factory import factory_name
from atmc.pack import coder_run, weight_forms
from atmc.pack.container import (
    VERSION,
    ArtifactError,
    ChecksumMismatch,
    Content,
    FactoryFailed,
    FactoryNeeded,
    Malformed,
    ModelMismatch,
    NotAnArtifact,
    Reader,
    TooLarge,
    UnsupportedVersion,
    input_shape,
    pack_parts,
    unpack,
)
from atmc.pack.other_tensors import read_small, write_small
from atmc.pack.sortable_floats import Integers
from atmc.pack.tensor_list import MAX_CLASSES, Field, expect_fields, fields, is_zoo, listed, schema
from atmc.pack.weight_coder import CodingError, Spent, TooManySides
from atmc.pack.weight_forms import FORMS, PLAIN, Weight

__all__ = [
    "VERSION",
    "ArtifactError",
    "ChecksumMismatch",
    "Content",
    "FactoryFailed",
    "FactoryNeeded",
    "LoadedModel",
    "Malformed",
    "ModelMismatch",
    "NotAnArtifact",
    "TooLarge",
    "UnsupportedVersion",
    "decode",
    "from_bytes",
    "load",
    "open",
    "pack",
    "read",
    "save",
    "to_bytes",
    "unpack",
]

MAX_VALUES = 1 << 26  # of all tensors of a file together, unless the caller allows more: 256 MiB of float32
WORK = 64  # multiply-adds that composing a file's factors may take, for each value that it may hold


@dataclass(frozen=True)
class LoadedModel:
    """A model file that was read and decoded once (see `open`).

    Args:
        model: the plain module, in evaluation mode, on the CPU.
        factors: name of a weight -> its factors, for each weight that the file holds as factors.
        metadata: what the file says of its model.
        source: name of the file in errors.
    """

    model: nn.Module
    factors: dict[str, Weight]
    metadata: dict[str, Any]
    source: str

    @property
    def input_shape(self) -> tuple[int, int, int] | None:
        """(c, h, w) of the images, or None if the file does not say it. Raises Malformed if it is no image shape."""
        return input_shape(self.metadata, self.source)


@dataclass(frozen=True)
class Decoded:
    """All tensors of a file as they are stored, with their code lengths.

    Args:
        weights: name -> (weight, code lengths of each of its matrices).
        others: name -> (values in their shape, code length in bits).
    """

    weights: dict[str, tuple[Weight, list[Spent]]]
    others: dict[str, tuple[np.ndarray, float]]


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    input_shape: Sequence[int] | None = None,
    classes: int | None = None,
    threat: str | None = None,
    method: str | None = None,
) -> int:
    """Write a model, factorized or plain, to a file (see `to_bytes`); its size in bytes.

    Raises:
        ValueError: a value is not finite, or of a type that the format does not hold.
        OSError: the file cannot be written; an old file of that name is untouched.
    """
    data = to_bytes(model, input_shape=input_shape, classes=classes, threat=threat, method=method)
    return write_beside(Path(path), data)


def to_bytes(
    model: nn.Module,
    *,
    input_shape: Sequence[int] | None = None,
    classes: int | None = None,
    threat: str | None = None,
    method: str | None = None,
) -> bytes:
    """The file of a model, factorized or plain: a pure function of its values.

    Zeros, repeated values and values that float16 holds are found and stored compactly; nothing is rounded.

    Args:
        model: built by `models.build`, which knows its own structure, or any module (loading it needs a factory).
        input_shape: (c, h, w), where the model does not know it.
        classes: number of classes, where the model does not know it.
        threat, method: what the model was trained for and how, for the metadata.

    Raises:
        ValueError: a value is not finite, or of a type that the format does not hold.
    """
    spec = getattr(model, "atmc_spec", None) or {"name": None}
    count = classes or spec.get("num_classes") or _outputs(model)
    if not 1 <= count <= MAX_CLASSES:
        raise ValueError(f"expected 1 to {MAX_CLASSES:,} classes, got {count}")
    affine = batch_norm.is_affine(model)
    kept = fields(model, without=batch_norm.implied_statistics(model) if affine else {})
    shape = input_shape or spec.get("input_shape")
    metadata: dict[str, Any] = {"model": spec, "threat": threat, "method": method, "tool": f"atmc {__version__}"}
    metadata["norms"] = affine
    if shape and list(shape) != spec.get("input_shape"):
        metadata["input_shape"] = list(shape)
    if count != spec.get("num_classes"):
        metadata["classes"] = count
    if is_zoo(spec):
        metadata["schema"] = schema(kept)
    else:
        metadata["tensors"] = [[field.name, list(field.shape), field.dtype] for field in kept]
    state = model.state_dict()
    small = [(field, state[field.name].detach().cpu().numpy()) for field in kept if not field.is_weight]
    return pack(metadata, weight_forms.in_order(model, kept), small)


def pack(
    metadata: Mapping[str, Any], weights: Sequence[tuple[Field, Weight]], small: Sequence[tuple[Field, np.ndarray]]
) -> bytes:
    """The bytes of a file. Raises ValueError as `to_bytes`."""
    if sum(field.size for field, _ in [*weights, *small]) > MAX_VALUES:
        raise ValueError(f"expected at most {MAX_VALUES:,} values in all")
    coder_run.prepare(sum(field.size for field, _ in weights) // 2)  # options are measured
    parts: list[bytes] = []
    hint = None
    for field, weight in weights:
        try:
            parts.append(weight_forms.to_part(weight, hint))
        except ValueError as error:
            raise ValueError(f"tensor {field.name}: {error}") from error
        hint = weight.row_counts()
    for field, values in small:
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(f"tensor {field.name}: expected finite values, got nan or infinity")
    parts.append(write_small([(field.role, values) for field, values in small])[0])
    return pack_parts(metadata, parts)


def _outputs(model: nn.Module) -> int:
    """Rows of the last linear layer: the number of classes, where nothing else tells it."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError("expected classes=..., since the model does not know how many it has")
    return layers[-1].out_features


def read(path: str | os.PathLike[str]) -> Content:
    """Take a file apart without decoding its tensors.

    Raises:
        ArtifactError: see its subclasses. OSError: the file cannot be read.
    """
    return unpack(Path(path).read_bytes(), str(path))


def open(
    path: str | os.PathLike[str],
    *,
    factory: Callable[..., nn.Module] | None = None,
    max_values: int = MAX_VALUES,
) -> LoadedModel:
    """Read and decode a model file once: its module, its factors and its metadata.

    Args:
        factory: called with num_classes=... if the model is of a user's own class; not called otherwise.
        max_values: largest number of values that a file may ask memory for.

    Raises:
        ArtifactError: see its subclasses. OSError: the file cannot be read.
    """
    return _restore(Path(path).read_bytes(), factory, str(path), max_values)


def load(
    path: str | os.PathLike[str],
    *,
    factory: Callable[..., nn.Module] | None = None,
    max_values: int = MAX_VALUES,
) -> nn.Module:
    """Return the plain module that a file holds, in evaluation mode, on the CPU.

    Args:
        factory: called with num_classes=... if the model is of a user's own class; not called otherwise.
        max_values: largest number of values that a file may ask memory for.

    Raises:
        ArtifactError: see its subclasses. OSError: the file cannot be read.
    """
    return open(path, factory=factory, max_values=max_values).model


def from_bytes(
    data: bytes,
    *,
    factory: Callable[..., nn.Module] | None = None,
    source: str = "file",
    max_values: int = MAX_VALUES,
) -> nn.Module:
    """Return what `load` returns, from the bytes of a file. Raises `ArtifactError`."""
    return _restore(data, factory, source, max_values).model


def _restore(data: bytes, factory: Callable[..., nn.Module] | None, source: str, max_values: int) -> LoadedModel:
    content = unpack(data, source)
    model = _build(content, factory, max_values)
    implied = _implied_statistics(content, model)
    expected = fields(model, without=implied)
    try:
        expect_fields(content, expected)
    except ModelMismatch as error:
        if factory is None or is_zoo(content.metadata["model"]):
            raise
        maker = content.metadata["model"].get("name")
        hint = f"{factory_name(factory)} is not its factory" + (f", which was {maker!r}" if maker else "")
        raise ModelMismatch(f"{error}; {hint}") from error
    decoded = _decode(content, expected, max_values)
    state: dict[str, Tensor] = dict(implied)
    for field in expected:
        stored = decoded.weights.get(field.name)
        values = stored[0].value() if stored else decoded.others[field.name][0]
        if not np.isfinite(values).all():
            raise content.bad(f"tensor {field.name}: a value is not finite")
        state[field.name] = torch.from_numpy(np.ascontiguousarray(values))
    model.load_state_dict(state, assign=True)
    factors = {name: weight for name, (weight, _) in decoded.weights.items() if weight.form != PLAIN}
    return LoadedModel(model.eval(), factors, content.metadata, source)


def decode(content: Content, *, max_values: int = MAX_VALUES) -> Decoded:
    """Decode all tensors of a file, without the code of a user's own class. Raises `ArtifactError`."""
    if is_zoo(content.metadata["model"]):
        model = _build(content, None, max_values)
        expected = fields(model, without=_implied_statistics(content, model))
        expect_fields(content, expected)
    else:
        expected = list(listed(content))
    return _decode(content, expected, max_values)


def _implied_statistics(content: Content, model: nn.Module) -> dict[str, Tensor]:
    """State dict entries that the file leaves out because its batch norms are affine."""
    return batch_norm.implied_statistics(model) if content.metadata.get("norms") is True else {}


def _decode(content: Content, expected: Sequence[Field], max_values: int) -> Decoded:
    _expect_room(content, expected, max_values)
    big = [field for field in expected if field.is_weight]
    small = [field for field in expected if not field.is_weight]
    if len(content.parts) != len(big) + 1:
        raise content.bad(f"{len(content.parts) - 1} weights; its model has {len(big)}")
    coder_run.prepare(sum(field.size for field in big) // 16 + 8 * sum(map(len, content.parts)))
    weights: dict[str, tuple[Weight, list[Spent]]] = {}
    hint = None
    for field, part in zip(big, content.parts, strict=False):
        try:
            weights[field.name] = _read_weight(part, field, hint, content)
        except TooManySides as error:
            raise TooLarge(f"{content.source}: tensor {field.name}: {error}") from error
        except CodingError as error:
            raise content.bad(f"tensor {field.name}: {error}") from error
        hint = weights[field.name][0].row_counts()
    if sum(weight.cost for weight, _ in weights.values()) > WORK * max_values:
        raise TooLarge(f"{content.source}: its factors take over {WORK * max_values:,} multiply-adds to compose")
    kinds = [(field.role, np.dtype(field.dtype), field.size) for field in small]
    try:
        arrays, lengths = read_small(content.parts[-1], kinds)
    except CodingError as error:
        raise content.bad(f"biases and norms: {error}") from error
    shaped = (array.reshape(field.shape) for array, field in zip(arrays, small, strict=True))
    others = zip((field.name for field in small), zip(shaped, lengths, strict=True), strict=True)
    return Decoded(weights, dict(others))


def _expect_room(content: Content, expected: Iterable[Field], max_values: int) -> None:
    total = sum(field.size for field in expected)
    if total > max_values:
        raise TooLarge(f"{content.source}: {total:,} values; at most {max_values:,} are read")


def _read_weight(part: bytes, field: Field, hint: Integers | None, content: Content) -> tuple[Weight, list[Spent]]:
    reader = Reader(part, f"{content.source}: tensor {field.name}", Malformed)
    (number,) = reader.take(1)
    if number >= len(FORMS):
        raise content.bad(f"tensor {field.name} has no valid form: {number}")
    form, rank = FORMS[number], 0
    rows, columns = field.shape[0], field.size // field.shape[0]
    if form != PLAIN:
        rank = reader.varint()
        square = {"left": rows, "right": columns}.get(form, rank)  # where the identity is added
        if not 1 <= rank <= min(rows, columns) or rank != square:
            raise content.bad(f"tensor {field.name} has rank {rank}, its shape is {field.shape}")
    names = list(weight_forms.layouts(form, field.shape, rank))
    encoded = [reader.take(reader.varint()) for _ in names[:-1]]
    encoded.append(reader.take(len(part) - reader.at))
    return weight_forms.read(form, field.shape, rank, encoded, hint)


class _NoInitialValues(TorchFunctionMode):
    """Functions of torch.nn.init do nothing; on meta tensors the first of them would take a second, for imports."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def _build(content: Content, factory: Callable[..., nn.Module] | None, max_values: int = MAX_VALUES) -> nn.Module:
    metadata, source = content.metadata, content.source
    spec = metadata["model"]
    name = spec.get("name")
    if is_zoo(spec):
        try:
            with (
                torch.device("meta"),
                _NoInitialValues(),
            ):  # names and shapes alone: memory is taken only once the file is found to fit
                return build_from_spec(spec)
        except ValueError as error:
            raise content.bad(str(error)) from error
    if factory is None:
        hint = f" {name!r}" if name else ""
        raise FactoryNeeded(
            f"{source} holds a model of a user's own class{hint}: give the factory that builds it "
            "(factory=... in Python, --model package.module:factory on the command line)"
        )
    classes = metadata.get("classes")
    if not (type(classes) is int and 1 <= classes <= MAX_CLASSES):
        raise content.bad(f"it does not say how many classes its model has, at most {MAX_CLASSES:,}: {classes!r:.40}")
    _expect_room(content, listed(content), max_values)
    try:
        model = call_factory(factory, classes)
    except ValueError as error:
        raise FactoryFailed(f"{source} cannot be loaded: {error}") from error
    model.atmc_spec = spec
    return model
