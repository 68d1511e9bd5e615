"""What is in a model file, tensor by tensor, and how far each lies from what information theory allows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from atmc.pack.artifact import MAX_VALUES, decode, unpack
from atmc.pack.weight_coder import Spent, entropy_bits, log2_binomial
from atmc.pack.weight_forms import PLAIN, Weight

COLUMNS = ("positions", "codebook", "codes", "header")


def inspection(path: str | os.PathLike[str], *, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """Metadata, one row a stored tensor, and totals: every byte of the file is in one of them.

    A row holds name, shape, values (entries), nonzeros, levels (distinct nonzero values), stored ("codebook", "fp16",
    "fp32", "zero", "other"), bits (of a code or value), and bytes, whole code lengths as fractions: positions,
    codebook, codes (or plain values), header, total; for a weight's tensor also floor, the bytes that positions without
    contexts and codes under their own frequencies take (log2 C(N, k) + k H), and excess, positions and codes over it.

    Raises:
        ArtifactError: as `artifact.load`. OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()
    content = unpack(data, str(path))
    decoded = decode(content, max_values=max_values)
    rows, factorized, dead = [], {}, {}
    for name, (weight, spent) in decoded.weights.items():
        for (part, values), length in zip(weight.parts.items(), spent, strict=True):
            rows.append(_row(name if part == "W" else f"{name}.{part}", values, length))
        if weight.form != PLAIN:
            factorized[name] = _rank(weight)
        dead[name] = _dead(weight)
    for name, (values, bits) in decoded.others.items():
        rows.append(_row(name, values, Spent(values=bits), small=True))
    sums = {key: round(sum(row["bytes"][key] for row in rows), 3) for key in COLUMNS}
    return {
        "file": str(path),
        "file_bytes": len(data),
        "metadata": content.metadata,
        "tensors": rows,
        "totals": {
            "nonzeros": sum(row["nonzeros"] for row in rows),
            **sums,
            "floor": round(sum(row["bytes"].get("floor", 0.0) for row in rows), 3),
            "excess": round(sum(row["bytes"].get("excess", 0.0) for row in rows), 3),
            "metadata and checksums": round(len(data) - sum(sums.values()), 3),
            "dead_outputs": sum(outputs for outputs, _ in dead.values()),
            "dead_inputs": sum(inputs for _, inputs in dead.values()),
        },
        "factorized": factorized,
        "dead_channels": {name: {"outputs": outputs, "inputs": inputs} for name, (outputs, inputs) in dead.items()},
    }


def _row(name: str, values: np.ndarray, spent: Spent, *, small: bool = False) -> dict[str, Any]:
    nonzero = values[values != 0]
    levels = len(np.unique(nonzero))
    stored, bits = _stored(nonzero, levels, spent)
    sizes = {
        "positions": spent.positions / 8,
        "codebook": spent.codebook / 8,
        "codes": spent.values / 8,
        "header": spent.header / 8,
        "total": spent.total / 8,
    }
    if not small:
        floor = (log2_binomial(values.size, len(nonzero)) + entropy_bits(nonzero)) / 8
        sizes |= {"floor": floor, "excess": sizes["positions"] + sizes["codes"] - floor}
    return {
        "name": name,
        "shape": list(values.shape),
        "values": int(values.size),
        "nonzeros": len(nonzero),
        "levels": levels,
        "stored": stored,
        "bits": bits,
        "bytes": {key: round(size, 3) for key, size in sizes.items()},
    }


def _stored(nonzero: np.ndarray, levels: int, spent: Spent) -> tuple[str, int]:
    """How values are held, and the bits of one before entropy coding."""
    if nonzero.dtype != np.float32:
        return "other", 8 * nonzero.dtype.itemsize
    if not len(nonzero):
        return "zero", 0
    if spent.codebook:
        return "codebook", (levels - 1).bit_length()
    with np.errstate(over="ignore"):
        half = np.array_equal(nonzero.astype(np.float16).astype(np.float32), nonzero)
    return ("fp16", 16) if half else ("fp32", 32)


def _rank(weight: Weight) -> dict[str, Any]:
    """Form, largest rank, and the rank of what U and V add to C and the identity's term."""
    live = weight.parts["U"].any(axis=0) & weight.parts["V"].any(axis=1)
    return {"form": weight.form, "largest_rank": weight.rank, "components": int(live.sum())}


def _dead(weight: Weight) -> tuple[int, int]:
    """Outputs, and inputs, of which W holds nothing but zeros."""
    w = weight.value()
    w = w.reshape(w.shape[0], w.shape[1] if w.ndim > 1 else 1, -1)
    return int((~w.any(axis=(1, 2))).sum()), int((~w.any(axis=(0, 2))).sum())
