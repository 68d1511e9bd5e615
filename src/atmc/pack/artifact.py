"""The model file, version 1.

All numbers are little-endian; the same values give the same bytes.

    bytes        content
    4            "ATMC"
    u16          version, 1
    u32, text    metadata: length, then JSON (UTF-8, sorted keys)
    u16          number of tensors; then for each tensor
      u16, text    name: a key of the plain model's state dict, or KEY.U, KEY.V, KEY.C for a factorized weight
      u8           number of dimensions, at most 8
      u32 each     dimensions
      u8           encoding (`coder.ENCODINGS`)
      u32          bytes of the encoded values, which follow
    32           SHA-256 of everything before

Metadata: {"classes", "input_shape", "model", "structure", "threat", "method", "tool"}. "model" is the zoo model's
specification (`models.build_from_spec`), or names a user's own factory, which is never imported from a file.
"structure" maps each factorized weight to its form and rank (`compress.factorize`); it decodes to W by
`factorize.compose`, the same on every machine. No time stamps; nothing in a file is executed.

Encoded values (`coder`): raw: u8 number type, values. Sparse: positions, then raw values. Codes: codebook, then
packed codes. Positions: u32 nonzeros, u8 mode, u32 bytes, then a bitmap or gaps in units of one or two bytes whose
largest value means "add and go on". Codebook: u16 count, raw values.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from atmc.compress.factorize import FORMS, Form, all_sites, compose, factored, factors_of, structure
from atmc.files import write_beside
from atmc.models import build_from_spec, call_factory
from atmc.models.factory import factory_name
from atmc.pack import coder
from atmc.version import __version__

MAGIC, VERSION = b"ATMC", 1
MAX_METADATA, MAX_DIMENSIONS, MAX_TENSORS = 1 << 24, 8, 65_535
STORED = (torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)
MAX_VALUES = 1 << 27  # of all tensors of a file together: 512 MiB of float32


class ArtifactError(ValueError):
    """The file cannot be used; each subclass is one reason."""


class NotAnArtifact(ArtifactError):
    """The file does not begin as a model file does."""


class UnsupportedVersion(ArtifactError):
    """A format version that this release does not read."""


class ChecksumMismatch(ArtifactError):
    """The bytes are not those that were written: cut off, or damaged."""


class Malformed(ArtifactError):
    """The checksum holds, but the content contradicts itself."""


class FactoryNeeded(ArtifactError):
    """The model is of a user's own class, and no factory was given."""


class FactoryFailed(ArtifactError):
    """The factory that was given raised an error, or returned no module."""


class ModelMismatch(ArtifactError):
    """The file's tensors are not those of the model."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, still encoded."""

    name: str
    shape: tuple[int, ...]
    encoding: int
    data: bytes

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def values(self) -> np.ndarray:
        """Decoded, in shape. Raises `Malformed`."""
        try:
            return coder.decode(self.encoding, self.data, self.size).reshape(self.shape)
        except coder.CodingError as error:
            raise Malformed(f"tensor {self.name}: {error}") from error


@dataclass(frozen=True)
class Content:
    """A parsed file: metadata and encoded tensors."""

    metadata: dict[str, Any]
    entries: tuple[Entry, ...]


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
    shape = input_shape or spec.get("input_shape")
    metadata = {
        "classes": classes or spec.get("num_classes") or _outputs(model),
        "input_shape": list(shape) if shape else None,
        "model": spec,
        "structure": {path: list(form) for path, form in structure(model).items()},
        "threat": threat,
        "method": method,
        "tool": f"atmc {__version__}",
    }
    return pack(metadata, _tensors(model))


def _outputs(model: nn.Module) -> int:
    """Rows of the last linear layer: the number of classes, where nothing else tells it."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError("expected classes=..., since the model does not know how many it has")
    return layers[-1].out_features


def _tensors(model: nn.Module) -> dict[str, np.ndarray]:
    """State dict of the plain model with each factorized weight as its factors, in the model's order."""
    parts = {site.path: factors_of(site) for site in all_sites(model) if factored(site)}
    found: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        path, dot, rest = key.partition("parametrizations.")
        if not dot:
            found[key] = value
            continue
        weight = path + rest.partition(".")[0]
        found.update({f"{weight}.{name}": factor.detach() for name, factor in parts[weight].items()})
    for name, value in found.items():
        if value.dtype not in STORED:
            raise ValueError(f"tensor {name}: cannot store values of type {value.dtype}")
    return {name: value.detach().cpu().contiguous().numpy() for name, value in found.items()}


def pack(metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of a file."""
    if len(tensors) > MAX_TENSORS or any(values.ndim > MAX_DIMENSIONS for values in tensors.values()):
        raise ValueError(f"expected at most {MAX_TENSORS:,} tensors of at most {MAX_DIMENSIONS} dimensions")
    if sum(values.size for values in tensors.values()) > MAX_VALUES:
        raise ValueError(f"expected at most {MAX_VALUES:,} values in all")
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode()
    body = [MAGIC, struct.pack("<HI", VERSION, len(text)), text, struct.pack("<H", len(tensors))]
    for name, values in tensors.items():
        try:
            kind, data = coder.encode(values)
        except ValueError as error:
            raise ValueError(f"tensor {name}: {error}") from error
        key = name.encode()
        body += [struct.pack("<H", len(key)), key, struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)]
        body += [struct.pack("<BI", kind, len(data)), data]
    joined = b"".join(body)
    return joined + hashlib.sha256(joined).digest()


def read(path: str | os.PathLike[str]) -> Content:
    """Parse a file without decoding its tensors.

    Raises:
        ArtifactError: see its subclasses. OSError: the file cannot be read.
    """
    return unpack(Path(path).read_bytes(), str(path))


def unpack(data: bytes, source: str = "file") -> Content:
    """Parse the bytes of a file. Raises `ArtifactError`."""
    if data[:4] != MAGIC:
        raise NotAnArtifact(f"{source} is not an atmc model file: it does not begin with ATMC")
    if len(data) < 6 + 32:
        raise ChecksumMismatch(f"{source} is cut off after {len(data)} bytes")
    (version,) = struct.unpack("<H", data[4:6])
    if version != VERSION:
        raise UnsupportedVersion(f"{source} has format version {version}; this release reads version {VERSION}")
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise ChecksumMismatch(f"{source} is damaged: its checksum does not hold")
    return _parse(coder.Reader(data[6:-32], lambda text: Malformed(f"{source}: {text}")), source)


def _parse(reader: coder.Reader, source: str) -> Content:
    def bad(text: str) -> Malformed:
        return Malformed(f"{source}: {text}")

    (length,) = reader.unpack("I")
    if length > MAX_METADATA:
        raise bad(f"metadata of {length} bytes")
    try:
        metadata = json.loads(bytes(reader.take(length)))
    except (ValueError, RecursionError) as error:
        raise bad(f"metadata is not JSON: {error}") from error
    if not (isinstance(metadata, dict) and isinstance(metadata.get("model"), dict)):
        raise bad("metadata describes no model")
    if not isinstance(metadata.get("structure"), dict):
        raise bad("metadata has no structure")
    entries: dict[str, Entry] = {}
    (count,) = reader.unpack("H")
    for _ in range(count):
        (key_length,) = reader.unpack("H")
        try:
            name = bytes(reader.take(key_length)).decode()
        except UnicodeDecodeError as error:
            raise bad("a tensor's name is not UTF-8") from error
        (dimensions,) = reader.unpack("B")
        if dimensions > MAX_DIMENSIONS:
            raise bad(f"tensor {name} has {dimensions} dimensions")
        shape = reader.unpack(f"{dimensions}I")
        encoding, size = reader.unpack("BI")
        if name in entries:
            raise bad(f"tensor {name} stands twice")
        entries[name] = Entry(name, shape, encoding, bytes(reader.take(size)))
    reader.expect_end()
    values = sum(entry.size for entry in entries.values())
    if values > MAX_VALUES:
        raise bad(f"{values:,} values; at most {MAX_VALUES:,} are read")
    return Content(metadata, tuple(entries.values()))


def load(path: str | os.PathLike[str], *, factory: Callable[..., nn.Module] | None = None) -> nn.Module:
    """The plain module that a file holds, in evaluation mode, on the CPU.

    Args:
        factory: called with num_classes=... where the model is of a user's own class; not called otherwise.

    Raises:
        ArtifactError: see its subclasses. OSError: the file cannot be read.
    """
    return from_bytes(Path(path).read_bytes(), factory=factory, source=str(path))


def from_bytes(data: bytes, *, factory: Callable[..., nn.Module] | None = None, source: str = "file") -> nn.Module:
    """What `load` gives, from the bytes of a file. Raises `ArtifactError`."""
    content = unpack(data, source)
    model = _build(content.metadata, factory, source)
    try:
        state = _state(content, model.state_dict(), source)
    except ModelMismatch as error:
        if factory is None or _in_zoo(content.metadata["model"]):
            raise
        maker = content.metadata["model"].get("name")
        hint = f"{factory_name(factory)} is not its factory" + (f", which was {maker!r}" if maker else "")
        raise ModelMismatch(f"{error}; {hint}") from error
    model.load_state_dict(state, assign=True)
    return model.eval()


def _in_zoo(spec: Mapping[str, Any]) -> bool:
    name = spec.get("name")
    return isinstance(name, str) and ":" not in name


def _build(metadata: Mapping[str, Any], factory: Callable[..., nn.Module] | None, source: str) -> nn.Module:
    spec = metadata["model"]
    name = spec.get("name")
    if _in_zoo(spec):
        try:
            with torch.device("meta"):  # names and shapes alone: memory is taken only once the file is found to fit
                return build_from_spec(spec)
        except ValueError as error:
            raise Malformed(f"{source}: {error}") from error
    if factory is None:
        hint = f" {name!r}" if name else ""
        raise FactoryNeeded(
            f"{source} holds a model of a user's own class{hint}: give the factory that builds it "
            "(factory=... in Python, --model package.module:factory on the command line)"
        )
    classes = metadata.get("classes")
    if not (isinstance(classes, int) and classes >= 1):
        raise Malformed(f"{source} does not say how many classes its model has: {classes!r}")
    try:
        model = call_factory(factory, classes)
    except ValueError as error:
        raise FactoryFailed(f"{source} cannot be loaded: {error}") from error
    model.atmc_spec = spec
    return model


def _state(content: Content, expected: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """A state dict with exactly the expected names, shapes and types."""
    entries = {entry.name: entry for entry in content.entries}
    state = {}
    for name, like in expected.items():
        if name in content.metadata["structure"]:
            values = _compose(name, content.metadata["structure"][name], entries, tuple(like.shape), source)
        elif name in entries:
            entry = entries.pop(name)
            _expect_shape(entry, tuple(like.shape), source)
            values = entry.values()
        else:
            raise ModelMismatch(f"{source} has no tensor {name}, which the model needs")
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        if tensor.dtype != like.dtype:
            raise ModelMismatch(f"{source}: tensor {name} is {tensor.dtype}, the model's is {like.dtype}")
        state[name] = tensor
    if entries:
        raise ModelMismatch(f"{source} has a tensor {next(iter(entries))}, which the model has not")
    return state


def _compose(name: str, form: Any, entries: dict[str, Entry], shape: tuple[int, ...], source: str) -> np.ndarray:
    """W of a factorized weight; takes its factors out of entries."""
    rows, columns = (shape[0], int(np.prod(shape[1:]))) if len(shape) >= 2 else (0, 0)
    if not (isinstance(form, list) and len(form) == 2 and form[0] in FORMS and isinstance(form[1], int)):
        raise Malformed(f"{source}: {name} has no valid form: {form!r}")
    rank = form[1]
    if form[0] != "rank" and f"{name}.C" in entries:
        _expect_shape(entries[f"{name}.C"], shape, source)  # of another model: said before its rank is doubted
    if not 1 <= rank <= min(rows, columns):
        raise Malformed(f"{source}: {name} has rank {rank}, its shape is {shape}")
    shapes = {"U": (rows, rank), "V": (rank, columns)} | ({} if form[0] == "rank" else {"C": shape})
    values = {}
    for part, part_shape in shapes.items():
        entry = entries.pop(f"{name}.{part}", None)
        if entry is None:
            raise ModelMismatch(f"{source} has no tensor {name}.{part}, which the model needs")
        _expect_shape(entry, part_shape, source)
        values[part] = entry.values()
        if values[part].dtype != np.float32:
            raise Malformed(f"{source}: {name}.{part} is not made of floats")
    if form[0] in ("left", "right") and rank != min(rows, columns):
        raise Malformed(f"{source}: {name} has rank {rank}, its form needs {min(rows, columns)}")
    return compose(cast(Form, form[0]), values["U"], values["V"], values.get("C")).reshape(shape)


def _expect_shape(entry: Entry, shape: tuple[int, ...], source: str) -> None:
    """Checked before decoding: nothing larger than the model itself is ever allocated."""
    if entry.shape != shape:
        raise ModelMismatch(f"{source}: tensor {entry.name} has shape {entry.shape}, the model's is {shape}")
