"""The outer layers of a model file: parts with lengths and checksums, deflated metadata, and the errors of a file.

See `artifact` for the format.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAGIC, VERSION = b"ATMC", 3
MAX_METADATA = 1 << 20  # bytes of JSON
DICTIONARY = (
    b'"classes":10,"input_shape":[3,224,224],"tensors":[["blocks.0.conv.weight",[64,64,3,3],"float32"],["layers.0.bias",['
    b'128],"float32"],"int64"],"num_batches_tracked",{"method":"alr","method":"nap","method":"da","method":"ap","method":'
    b'"al0","method":"al0q","method":"atmc","model":{"input_shape":[1,28,28],"mean":null,"name":"mobilenetv2","name":"wrn'
    b'-16-8","name":"resnet50","name":"resnet34","input_shape":[3,32,32],"mean":[0.4914,0.4822,0.4465],"name":"resnet18",'
    b'"name":"lenet","num_classes":100,"num_classes":10,"options":{"dropout":0.0},"options":{},"std":[0.247,0.2435,0.2616'
    b'],"std":null},"norms":true,"norms":false,"schema":0,"threat":"l1:12","threat":"l2:0.5","threat":"linf:0.3","threat"'
    b':"linf:8/255","tool":"atmc 0.1.0"}'
)


class ArtifactError(ValueError):
    """The file cannot be used; each subclass is one reason."""


class NotAnArtifact(ArtifactError):
    """The file does not begin with ATMC."""


class UnsupportedVersion(ArtifactError):
    """The file has a format version that this release does not read."""


class ChecksumMismatch(ArtifactError):
    """The bytes are not those that were written: the file is cut off or damaged."""


class Malformed(ArtifactError):
    """The checksums hold, but the content contradicts itself."""


class TooLarge(ArtifactError):
    """The file describes a model larger than the caller allows."""


class FactoryNeeded(ArtifactError):
    """The model is of a user's own class, and no factory was given."""


class FactoryFailed(ArtifactError):
    """The factory that was given raised an error, or returned no module."""


class ModelMismatch(ArtifactError):
    """The file's tensors are not those of the model."""


@dataclass(frozen=True)
class Content:
    """A file taken apart, with valid checksums.

    Args:
        metadata: what the file says of its model; "classes" and "input_shape" are always among the keys.
        parts: the bytes of each weight's part and of the last part, still encoded.
        size: bytes of the whole file.
        source: name of the file in errors.
    """

    metadata: dict[str, Any]
    parts: tuple[bytes, ...]
    size: int
    source: str

    def malformed(self, text: str) -> Malformed:
        """Return a Malformed error of this text, which names the file."""
        return Malformed(f"{self.source}: {text}")


def read_input_shape(metadata: Mapping[str, Any], source: str) -> tuple[int, int, int] | None:
    """Return (c, h, w) of the images, or None if the metadata do not say it.

    Raises:
        Malformed: what they say is no shape of an image.
    """
    shape = metadata.get("input_shape")
    if not shape:
        return None
    if not (isinstance(shape, list) and len(shape) == 3 and all(type(side) is int and side > 0 for side in shape)):
        raise Malformed(f"{source}: its images have no valid shape: {shape!r:.40}")
    return shape[0], shape[1], shape[2]


def pack_parts(metadata: Mapping[str, Any], parts: Sequence[bytes]) -> bytes:
    """Return the bytes of a file: metadata, then parts."""
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode()
    data = MAGIC + struct.pack("<H", VERSION)
    check = zlib.crc32(data)
    for part in [_deflate(text), *parts]:
        check = zlib.crc32(part, check)
        data += encode_varint(len(part)) + part + struct.pack("<I", check)
    return data


def unpack(data: bytes, source: str = "file") -> Content:
    """Take the bytes of a file apart: check version and checksums, and read the metadata. Raises `ArtifactError`."""
    if data[:4] != MAGIC:
        raise NotAnArtifact(f"{source} is not an atmc model file: it does not begin with ATMC")
    if len(data) < 6:
        raise ChecksumMismatch(f"{source} is cut off after {len(data)} bytes")
    (version,) = struct.unpack("<H", data[4:6])
    if version != VERSION:
        raise UnsupportedVersion(f"{source} has format version {version}; this release reads version {VERSION}")
    reader, check, parts = Reader(data[6:], source), zlib.crc32(data[:6]), []
    while not reader.done:
        part = reader.take(reader.take_varint())
        check = zlib.crc32(part, check)
        if struct.pack("<I", check) != reader.take(4):
            raise ChecksumMismatch(f"{source} is damaged: a checksum does not hold")
        parts.append(part)
    if len(parts) < 2:
        raise ChecksumMismatch(f"{source} is cut off after {len(data)} bytes")
    return Content(_read_metadata(parts[0], source), tuple(parts[1:]), len(data), source)


class Reader:
    """A reader that takes bytes off the front of a buffer and never past its end.

    Args:
        source: name of the file in errors.
        error: the error to raise if fewer bytes are left than are needed.
    """

    def __init__(self, data: bytes, source: str, error: type[ArtifactError] = ChecksumMismatch) -> None:
        self._data, self._source, self._error, self.at = data, source, error, 0

    @property
    def done(self) -> bool:
        """Whether nothing is left."""
        return self.at == len(self._data)

    def take(self, count: int) -> bytes:
        """Return the next count bytes."""
        left = len(self._data) - self.at
        if count > left:
            raise self._error(f"{self._source} is cut off or damaged: {count} bytes expected, {left} left")
        self.at += count
        return self._data[self.at - count : self.at]

    def take_varint(self) -> int:
        """Return an integer of 7 bits per byte, the lowest first, of at most 5 bytes."""
        number = 0
        for shift in range(0, 35, 7):
            (byte,) = self.take(1)
            number |= (byte & 127) << shift
            if byte < 128:
                return number
        raise self._error(f"{self._source} is damaged: a length of more than 5 bytes")


def encode_varint(number: int) -> bytes:
    """Return the bytes of an integer, 7 bits per byte, the lowest first."""
    octets = []
    while number > 127:
        octets.append(number & 127 | 128)
        number >>= 7
    return bytes([*octets, number])


def _deflate(text: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
    return packer.compress(text) + packer.flush()


def _read_metadata(part: bytes, source: str) -> dict[str, Any]:
    unpacker = zlib.decompressobj(-15, DICTIONARY)
    try:
        text = unpacker.decompress(part, MAX_METADATA)
        whole = unpacker.eof and not unpacker.unused_data
        metadata = json.loads(text) if whole else None
    except (zlib.error, ValueError, RecursionError) as error:
        raise Malformed(f"{source}: metadata are not deflated JSON: {error}") from error
    if not whole:
        raise Malformed(f"{source}: metadata of more than {MAX_METADATA:,} bytes, or cut off")
    if not (isinstance(metadata, dict) and isinstance(metadata.get("model"), dict)):
        raise Malformed(f"{source}: metadata describe no model")
    for key, name_in_model in (("input_shape", "input_shape"), ("classes", "num_classes")):
        metadata.setdefault(key, metadata["model"].get(name_in_model))
    return metadata
