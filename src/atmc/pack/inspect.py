"""Show what is in a model file, tensor by tensor, and how far each tensor is from the floor of information theory."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from atmc.pack.artifact import MAX_VALUES, decode, read
from atmc.pack.sortable_floats import fits_float16
from atmc.pack.weight_coder import CodeLengths, entropy_bits, log2_binomial
from atmc.pack.weight_forms import PLAIN, Weight

COLUMNS = ("positions", "codebook", "codes", "header")


def inspect_file(path: str | os.PathLike[str], *, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """Return metadata, one row per stored tensor, and totals: every byte of the file is in one of them.

    A row holds name, shape, values (number of entries), nonzeros, levels (distinct nonzero values), stored ("codebook",
    "fp16", "fp32", "zero", "other"), bits (per code or value), and bytes, which are code lengths and may be fractions:
    positions, codebook, codes (or plain values), header, total; for a matrix of a weight also floor, the bytes of
    positions without contexts and of codes under their own frequencies (log2 C(N, k) + k H), and excess, positions and
    codes above it.

    Raises:
        ArtifactError: as `artifact.load`. OSError: the file cannot be read.
    """
    content = read(path)
    decoded = decode(content, max_values=max_values)
    rows, factorized, dead = [], {}, {}
    for name, (weight, lengths) in decoded.weights.items():
        for (part, values), part_lengths in zip(weight.parts.items(), lengths, strict=True):
            rows.append(_describe_tensor(name if part == "W" else f"{name}.{part}", values, part_lengths))
        if weight.form != PLAIN:
            factorized[name] = _describe_factors(weight)
        dead[name] = _count_dead(weight)
    for name, (values, bits) in decoded.others.items():
        rows.append(_describe_tensor(name, values, CodeLengths(values=bits), is_weight=False))
    sums = {key: round(sum(row["bytes"][key] for row in rows), 3) for key in COLUMNS}
    return {
        "file": str(path),
        "file_bytes": content.size,
        "metadata": content.metadata,
        "tensors": rows,
        "totals": {
            "nonzeros": sum(row["nonzeros"] for row in rows),
            **sums,
            "floor": round(sum(row["bytes"].get("floor", 0.0) for row in rows), 3),
            "excess": round(sum(row["bytes"].get("excess", 0.0) for row in rows), 3),
            "metadata and checksums": round(content.size - sum(sums.values()), 3),
            "dead_outputs": sum(outputs for outputs, _ in dead.values()),
            "dead_inputs": sum(inputs for _, inputs in dead.values()),
        },
        "factorized": factorized,
        "dead_channels": {name: {"outputs": outputs, "inputs": inputs} for name, (outputs, inputs) in dead.items()},
    }


def _describe_tensor(name: str, values: np.ndarray, lengths: CodeLengths, *, is_weight: bool = True) -> dict[str, Any]:
    """Return the row of a stored tensor, see `inspect_file`."""
    nonzero = values[values != 0]
    levels = len(np.unique(nonzero))
    stored, bits = _describe_storage(nonzero, levels, lengths)
    sizes = {
        "positions": lengths.positions / 8,
        "codebook": lengths.codebook / 8,
        "codes": lengths.values / 8,
        "header": lengths.header / 8,
        "total": lengths.total / 8,
    }
    if is_weight:
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


def _describe_storage(nonzero: np.ndarray, levels: int, lengths: CodeLengths) -> tuple[str, int]:
    """Return how values are stored, and the bits per value before entropy coding."""
    if nonzero.dtype != np.float32:
        return "other", 8 * nonzero.dtype.itemsize
    if not len(nonzero):
        return "zero", 0
    if lengths.codebook:
        return "codebook", (levels - 1).bit_length()
    return ("fp16", 16) if fits_float16(nonzero) else ("fp32", 32)


def _describe_factors(weight: Weight) -> dict[str, Any]:
    """Return the form, the number of columns of U, and the number of terms of U V that are not zero."""
    live = weight.parts["U"].any(axis=0) & weight.parts["V"].any(axis=1)
    return {"form": weight.form, "largest_rank": weight.rank, "components": int(live.sum())}


def _count_dead(weight: Weight) -> tuple[int, int]:
    """Return the numbers of outputs and of inputs for which W holds nothing but zeros."""
    w = weight.value()
    w = w.reshape(w.shape[0], w.shape[1] if w.ndim > 1 else 1, -1)
    return int((~w.any(axis=(1, 2))).sum()), int((~w.any(axis=(0, 2))).sum())
