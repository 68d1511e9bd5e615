"""The model file, version 3.

Numbers are little-endian, a varint is LEB128 of at most 5 bytes; equal values give equal bytes. This is the format in
short; docs/file-format.md is the specification, from which tests/pack/second_decoder.py was written.

    bytes        content
    4            "ATMC"
    u16          version, 3
    part         metadata: JSON (sorted keys), raw deflate with `container.DICTIONARY` as preset dictionary
    part each    a weight: every float32 tensor of two or more dimensions, in the order of `tensor_list.list_fields`
    part         all other tensors (biases, batch norm, buffers), in the same order, see `other_tensors`

A part is its length as a varint, its bytes, and a u32: the CRC-32 of the bytes, started from that of the part before,
and for the first from that of the six bytes before it, so that parts cannot change places.

A weight's part:

    u8           form: 0 W itself; 1 (U + I) V + C; 2 U (V + I) + C; 3 U V + C; 4 U V
    varint       rank, unless the form is 0
    code         of U, V and C, or of W: each with its length as a varint before it, but for the last

The code of a matrix (`weight_coder`, `arithmetic`; no bytes: all zero) begins with this header, each field of equally
likely bits:

    bits         field
    1            1: all zero, nothing follows
    2            group size of the positions: 0 no entry is zero, no positions; else a number in `Layout.group_sizes`
    3            scale of the contexts of the positions; only if there are positions
    1            values are float16, else float32
    1            there is a codebook
    8            size of the codebook less 1; only if there is one
    1            values are coded under contexts of their neighbors
    3            scale of the contexts of the values

Then follow the positions, the codebook in ascending order, and the codes or plain values in row-major order.

The last part is one code of all its tensors. A float32 tensor has one bit for a single repeated value, one for float16,
and, if values differ, one for zeros, whose places follow as flags; then plain values, under contexts that tensors of
one role (last part of their names) share. Other types are stored byte by byte.

W of a factorized weight is part of the format: summed in float64 in a fixed order and rounded once
(`factorize.compose`).

Metadata: {"model", "threat", "method", "tool", "norms"} and, of a zoo model, "schema", the CRC-32 of its fields, or, of
a user's own model, "tensors", its fields as [name, shape, type], with "classes" and "input_shape" if "model" lacks
them. "model" is the zoo model's specification (`models.build_from_spec`), or names a user's own factory, which is never
imported from a file. "norms": batch norms are affine, without statistics (`models.batch_norm`). Nothing in a file is
executed.
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
from atmc.core.modules import copy_state, unwrap
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
    pack_parts,
    read_input_shape,
    unpack,
)
from atmc.pack.other_tensors import decode_other_tensors, encode_other_tensors
from atmc.pack.sortable_floats import Int64s
from atmc.pack.tensor_list import (
    MAX_CLASSES,
    Field,
    checksum_fields,
    expect_fields,
    is_zoo,
    list_fields,
    read_fields,
)
from atmc.pack.weight_coder import CodeLengths, CodingError, TooManySides
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
    "read",
    "save",
    "to_bytes",
    "unpack",
]

MAX_VALUES = 1 << 26  # of all tensors of a file together, unless the caller allows more: 256 MiB of float32
COMPOSE_COST = 64  # multiply-adds that composing a file's factors may take, for each value that the file may hold


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
        return read_input_shape(self.metadata, self.source)


@dataclass(frozen=True)
class Decoded:
    """All tensors of a file as they are stored, with their code lengths.

    Args:
        weights: name -> (weight, code lengths of each of its matrices).
        others: name -> (values in their shape, code length in bits).
    """

    weights: dict[str, tuple[Weight, list[CodeLengths]]]
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
    """Write a model, factorized or plain, to a file (see `to_bytes`), and return its size in bytes.

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
    """Return the bytes of a model's file, factorized or plain: a pure function of its values.

    Zeros, repeated values and values that float16 holds exactly are stored compactly; nothing is rounded.

    Args:
        model: built by `models.build`, which knows its own structure, or any module (loading it needs a factory).
        input_shape: (c, h, w), if the model does not know it.
        classes: number of classes, if the model does not know it.
        threat, method: what the model was trained for and how, for the metadata.

    Raises:
        ValueError: a value is not finite, or of a type that the format does not hold.
    """
    model = unwrap(model)
    spec = getattr(model, "atmc_spec", None) or {"name": None}
    count = classes or spec.get("num_classes") or _count_outputs(model)
    if not 1 <= count <= MAX_CLASSES:
        raise ValueError(f"expected 1 to {MAX_CLASSES:,} classes, got {count}")
    affine = batch_norm.is_affine(model)
    fields = list_fields(model, without=batch_norm.affine_statistics(model) if affine else {})
    shape = input_shape or spec.get("input_shape")
    metadata: dict[str, Any] = {
        "model": spec,
        "threat": threat,
        "method": method,
        "tool": f"atmc {__version__}",
        "norms": affine,
    }
    if shape and list(shape) != spec.get("input_shape"):
        metadata["input_shape"] = list(shape)
    if count != spec.get("num_classes"):
        metadata["classes"] = count
    if is_zoo(spec):
        metadata["schema"] = checksum_fields(fields)
    else:
        metadata["tensors"] = [[field.name, list(field.shape), field.dtype] for field in fields]
    state = model.state_dict()
    others = [(field, state[field.name].detach().cpu().numpy()) for field in fields if not field.is_weight]
    return _encode(metadata, weight_forms.list_weights(model, fields), others)


def _encode(
    metadata: Mapping[str, Any], weights: Sequence[tuple[Field, Weight]], others: Sequence[tuple[Field, np.ndarray]]
) -> bytes:
    """Return the bytes of a file that holds these tensors. Raises ValueError as `to_bytes` does."""
    if sum(field.size for field, _ in [*weights, *others]) > MAX_VALUES:
        raise ValueError(f"expected at most {MAX_VALUES:,} values in all")
    coder_run.prepare(sum(field.size for field, _ in weights) // 2)  # each option is measured
    parts: list[bytes] = []
    input_counts = None
    for field, weight in weights:
        try:
            parts.append(weight_forms.encode_part(weight, input_counts))
        except ValueError as error:
            raise ValueError(f"tensor {field.name}: {error}") from error
        input_counts = weight.output_counts()
    for field, values in others:
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(f"tensor {field.name}: expected finite values, got nan or infinity")
    parts.append(encode_other_tensors([(field.role, values) for field, values in others])[0])
    return pack_parts(metadata, parts)


def _count_outputs(model: nn.Module) -> int:
    """Return the rows of the last linear layer: the number of classes, if nothing else tells it."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError("expected classes=..., since the model does not know how many it has")
    return layers[-1].out_features


def read(path: str | os.PathLike[str]) -> Content:
    """Read a file and take it apart, without decoding its tensors.

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
    expected = list_fields(model, without=implied)
    try:
        expect_fields(content, expected)
    except ModelMismatch as error:
        if factory is None or is_zoo(content.metadata["model"]):
            raise
        stored_name = content.metadata["model"].get("name")
        named = f", which was {stored_name!r}" if stored_name else ""
        raise ModelMismatch(f"{error}; {factory_name(factory)} is not its factory{named}") from error
    decoded = _decode(content, expected, max_values)
    state = copy_state(model.state_dict(), torch.Tensor.detach)  # keeps the versions of modules
    state.clear()
    state.update(implied)
    for field in expected:
        stored = decoded.weights.get(field.name)
        values = stored[0].value() if stored else decoded.others[field.name][0]
        if not np.isfinite(values).all():
            raise content.malformed(f"tensor {field.name}: a value is not finite")
        state[field.name] = torch.from_numpy(np.ascontiguousarray(values))
    shared = _list_shared(model)
    model.load_state_dict(state, assign=True)
    _share_again(model, shared)
    factors = {name: weight for name, (weight, _) in decoded.weights.items() if weight.form != PLAIN}
    return LoadedModel(model.eval(), factors, content.metadata, source)


def _list_shared(model: nn.Module) -> list[list[str]]:
    """List the groups of names under which one parameter stands several times, as tied weights do."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _share_again(model: nn.Module, shared: list[list[str]]) -> None:
    """Make one parameter of those that were one, in place, unless the file gives them different values."""
    for first, *others in shared:
        parameter = model.get_parameter(first)
        for name in others:
            path, _, last = name.rpartition(".")
            if torch.equal(model.get_parameter(name), parameter):
                setattr(model.get_submodule(path), last, parameter)


def decode(content: Content, *, max_values: int = MAX_VALUES) -> Decoded:
    """Decode all tensors of a file, without the code of a user's own class. Raises `ArtifactError`."""
    if is_zoo(content.metadata["model"]):
        model = _build(content, None, max_values)
        expected = list_fields(model, without=_implied_statistics(content, model))
        expect_fields(content, expected)
    else:
        expected = list(read_fields(content))
    return _decode(content, expected, max_values)


def _implied_statistics(content: Content, model: nn.Module) -> dict[str, Tensor]:
    """State dict entries that the file leaves out because its batch norms are affine."""
    return batch_norm.affine_statistics(model) if content.metadata.get("norms") is True else {}


def _decode(content: Content, expected: Sequence[Field], max_values: int) -> Decoded:
    _expect_few_values(content, expected, max_values)
    weight_fields = [field for field in expected if field.is_weight]
    other_fields = [field for field in expected if not field.is_weight]
    if len(content.parts) != len(weight_fields) + 1:
        raise content.malformed(f"{len(content.parts) - 1} weights; its model has {len(weight_fields)}")
    coder_run.prepare(sum(field.size for field in weight_fields) // 16 + 8 * sum(map(len, content.parts)))
    weights: dict[str, tuple[Weight, list[CodeLengths]]] = {}
    input_counts = None
    for field, part in zip(weight_fields, content.parts, strict=False):
        try:
            weights[field.name] = _decode_part(part, field, input_counts, content)
        except TooManySides as error:
            raise TooLarge(f"{content.source}: tensor {field.name}: {error}") from error
        except CodingError as error:
            raise content.malformed(f"tensor {field.name}: {error}") from error
        input_counts = weights[field.name][0].output_counts()
    if sum(weight.cost for weight, _ in weights.values()) > COMPOSE_COST * max_values:
        limit = COMPOSE_COST * max_values
        raise TooLarge(f"{content.source}: its factors take over {limit:,} multiply-adds to compose")
    kinds = [(field.role, np.dtype(field.dtype), field.size) for field in other_fields]
    try:
        arrays, lengths = decode_other_tensors(content.parts[-1], kinds)
    except CodingError as error:
        raise content.malformed(f"biases and norms: {error}") from error
    shaped = (array.reshape(field.shape) for array, field in zip(arrays, other_fields, strict=True))
    others = zip((field.name for field in other_fields), zip(shaped, lengths, strict=True), strict=True)
    return Decoded(weights, dict(others))


def _expect_few_values(content: Content, expected: Iterable[Field], max_values: int) -> None:
    total = sum(field.size for field in expected)
    if total > max_values:
        raise TooLarge(f"{content.source}: {total:,} values; at most {max_values:,} are read")


def _decode_part(
    part: bytes, field: Field, input_counts: Int64s | None, content: Content
) -> tuple[Weight, list[CodeLengths]]:
    reader = Reader(part, f"{content.source}: tensor {field.name}", Malformed)
    (number,) = reader.take(1)
    if number >= len(FORMS):
        raise content.malformed(f"tensor {field.name} has no valid form: {number}")
    form, rank = FORMS[number], 0
    rows, columns = field.shape[0], field.size // field.shape[0]
    if form != PLAIN:
        rank = reader.take_varint()
        square = {"left": rows, "right": columns}.get(form, rank)  # the identity is added to a square factor
        if not 1 <= rank <= min(rows, columns) or rank != square:
            raise content.malformed(f"tensor {field.name} has rank {rank}, its shape is {field.shape}")
    names = list(weight_forms.part_layouts(form, field.shape, rank))
    encoded = [reader.take(reader.take_varint()) for _ in names[:-1]]
    encoded.append(reader.take(len(part) - reader.at))
    return weight_forms.decode_weight(form, field.shape, rank, encoded, input_counts)


class _NoInitialValues(TorchFunctionMode):
    """A mode in which the functions of torch.nn.init do nothing.

    Meta tensors hold no values, and the first such call on one takes a second of imports.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def _build(content: Content, factory: Callable[..., nn.Module] | None, max_values: int) -> nn.Module:
    """Build the model of a file without its values: a zoo model on the meta device, a user's own by its factory."""
    metadata, source = content.metadata, content.source
    spec = metadata["model"]
    name = spec.get("name")
    if is_zoo(spec):
        try:
            # names and shapes only: memory for values is taken after the file's size was checked
            with torch.device("meta"), _NoInitialValues():
                return build_from_spec(spec)
        except ValueError as error:
            raise content.malformed(str(error)) from error
    if factory is None:
        hint = f" {name!r}" if name else ""
        raise FactoryNeeded(
            f"{source} holds a model of a user's own class{hint}: give the factory that builds it "
            "(factory=... in Python, --model package.module:factory on the command line)"
        )
    classes = metadata.get("classes")
    if not (type(classes) is int and 1 <= classes <= MAX_CLASSES):
        raise content.malformed(f"expected 1 to {MAX_CLASSES:,} classes of its model, got {classes!r:.40}")
    _expect_few_values(content, read_fields(content), max_values)
    try:
        model = call_factory(factory, classes)
    except ValueError as error:
        raise FactoryFailed(f"{source} cannot be loaded: {error}") from error
    model.atmc_spec = spec
    return model
