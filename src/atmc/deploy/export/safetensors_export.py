"""Export the decoded weights of a model as a state dict in a .safetensors file."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import nn

from atmc.core.files import write_beside


def to_safetensors(model: nn.Module, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None) -> int:
    """Write the state dict of a plain module, whole or not at all, and return the size in bytes; see `to_bytes`."""
    return write_beside(Path(path), to_bytes(model, metadata=metadata))


def to_bytes(model: nn.Module, *, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of a .safetensors file of a plain module's state dict, with its names, shapes and types.

    The same values give the same bytes: the metadata is sorted, which safetensors itself does not do.

    Args:
        metadata: strings to store beside the tensors.
    """
    state = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    data = save(state, metadata=dict(metadata or {}))
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]
