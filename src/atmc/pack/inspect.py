"""What is in a model file, without building the model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from atmc.pack import coder
from atmc.pack.artifact import Content, Entry, Malformed, unpack


def inspection(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Metadata, one row a tensor, and totals: every byte of the file is in one column.

    A row holds name, shape, values, nonzeros, levels (distinct nonzero values), encoding, and bytes: header,
    positions, codebook, codes, values, total.

    Raises:
        ArtifactError: as `artifact.load`. OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()
    content = unpack(data, str(path))
    rows = [_row(entry) for entry in content.entries]
    described = sum(row["bytes"]["total"] for row in rows)
    return {
        "file": str(path),
        "file_bytes": len(data),
        "metadata": content.metadata,
        "tensors": rows,
        "totals": {
            "nonzeros": sum(row["nonzeros"] for row in rows),
            **{
                key: sum(row["bytes"][key] for row in rows)
                for key in ("header", "positions", "codebook", "codes", "values")
            },
            "metadata and checksum": len(data) - described,
        },
        "factorized": _ranks(content),
    }


def _row(entry: Entry) -> dict[str, Any]:
    values = entry.values()
    nonzero = values[values != 0]
    header = 2 + len(entry.name.encode()) + 1 + 4 * len(entry.shape) + 1 + 4
    sizes = coder.part_sizes(entry.encoding, entry.data, entry.size)
    return {
        "name": entry.name,
        "shape": list(entry.shape),
        "values": entry.size,
        "nonzeros": len(nonzero),
        "levels": len(np.unique(nonzero)),
        "encoding": coder.ENCODINGS[entry.encoding],
        "bytes": {"header": header, **sizes, "total": header + len(entry.data)},
    }


def _ranks(content: Content) -> dict[str, dict[str, Any]]:
    """Per factorized weight: its form, and the rank of what its factors add to C and the identity's term."""
    entries = {entry.name: entry for entry in content.entries}
    found: dict[str, dict[str, Any]] = {}
    for path, form in content.metadata["structure"].items():
        if not (isinstance(form, list) and len(form) == 2):
            raise Malformed(f"{path} has no valid form: {form!r}")
        if f"{path}.U" not in entries or f"{path}.V" not in entries:
            raise Malformed(f"factors of {path} are missing")
        u, v = entries[f"{path}.U"].values(), entries[f"{path}.V"].values()
        if u.ndim != 2 or v.ndim != 2 or u.shape[1] != v.shape[0]:
            raise Malformed(f"factors of {path} do not fit each other")
        rows, columns = u.any(axis=0), v.any(axis=1)
        found[path] = {"form": form[0], "largest_rank": u.shape[1], "components": int((rows & columns).sum())}
    return found
