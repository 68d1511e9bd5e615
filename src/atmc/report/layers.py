"""The section of a report on the layers of a model file: a table and bars, made from `pack.inspect.inspect_file`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atmc.pack.inspect import COLUMNS
from atmc.report import svg
from atmc.report.markup import element, escape, table

REST, METADATA = "biases, norms", "metadata, checksums"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One weight W of the file, with all its tensors.

    Args:
        shape: of W.
        nonzeros: factor -> number of nonzeros; under "W" for a plain weight.
        value_bits: factor -> how its values are stored, such as "16 values, 4 bits".
        rank: number of components that U V has and could have; None for a plain weight.
        file_bytes: column of the inspection -> bytes.
    """

    name: str
    shape: tuple[int, ...]
    nonzeros: dict[str, int]
    value_bits: dict[str, str]
    rank: tuple[int, int] | None
    file_bytes: dict[str, float]

    @property
    def weights(self) -> int:
        """The number of entries of W."""
        return math.prod(self.shape)

    @property
    def total(self) -> int:
        """The nonzeros of all factors."""
        return sum(self.nonzeros.values())


def list_layers(inspection: Mapping[str, Any]) -> tuple[list[Layer], dict[str, float]]:
    """Return the weights of an inspected file in its order, and the bytes of all other tensors by column."""
    factorized: Mapping[str, Any] = inspection["factorized"]
    members: dict[str, dict[str, Any]] = {}
    rest = dict.fromkeys(COLUMNS, 0.0)
    for row in inspection["tensors"]:
        path, _, factor = row["name"].rpartition(".")
        if path in factorized and factor in ("U", "V", "C"):
            members.setdefault(path, {})[factor] = row
        elif row["name"].endswith("weight") and len(row["shape"]) >= 2:
            members[row["name"]] = {"W": row}
        else:
            rest = {column: rest[column] + row["bytes"][column] for column in COLUMNS}
    return [_layer(name, rows, factorized.get(name)) for name, rows in members.items()], rest


def _layer(name: str, rows: Mapping[str, Any], factors: Mapping[str, Any] | None) -> Layer:
    """Return the layer of a weight; rows: factor -> its row of the inspection."""
    whole = rows.get("W") or rows.get("C")
    shape = whole["shape"] if whole else (rows["U"]["shape"][0], rows["V"]["shape"][1])
    return Layer(
        name=name.removesuffix(".weight"),
        shape=tuple(shape),
        nonzeros={factor: row["nonzeros"] for factor, row in rows.items()},
        value_bits={factor: _value_bits(row) for factor, row in rows.items()},
        rank=(factors["components"], factors["largest_rank"]) if factors else None,
        file_bytes={column: sum(row["bytes"][column] for row in rows.values()) for column in COLUMNS},
    )


def _value_bits(row: Mapping[str, Any]) -> str:
    """Return how a tensor's values are stored: as a codebook, or as numbers of 16 or 32 bits."""
    if not row["nonzeros"]:
        return "none"
    return f"{row['levels']} values, {row['bits']} bits" if row["stored"] == "codebook" else str(row["stored"])


def layers_section(inspection: Mapping[str, Any]) -> str:
    """Return the section's markup: bars, a table and a note that explains it."""
    rows, rest = list_layers(inspection)
    note = (
        "Density is nonzeros over entries of W = U V + C. Components are the remaining rank-one terms of U V, of those"
        " possible; 0 means that U V adds nothing. Bits per nonzero are bits of the file, with positions, codebooks"
        " and codes."
    )
    by_factor = {factor: None for row in rows for factor in row.nonzeros}
    nonzeros = [svg.Bar(row.name, {factor: row.nonzeros.get(factor, 0) for factor in by_factor}) for row in rows]
    sizes = [svg.Bar(row.name, row.file_bytes) for row in rows]
    sizes += [svg.Bar(REST, rest), svg.Bar(METADATA, {METADATA: inspection["totals"]["metadata and checksums"]})]
    charts = [
        svg.bar_chart("Nonzeros", nonzeros, unit="nonzeros"),
        svg.bar_chart("Bytes of the file", sizes, unit="bytes"),
    ]
    return element("div", *charts, class_="two") + _table(rows, inspection) + element("p", escape(note), class_="soft")


def _table(rows: Sequence[Layer], inspection: Mapping[str, Any]) -> str:
    """Return one row per layer, and one for the whole file."""
    header = ("layer", "shape of W", "nonzeros", "density", "components", "values", "bytes", "bits/nonzero")
    wide = any(len(row.name) > svg.BESIDE for row in rows)
    kinds = ("path" if wide else "name", "num", "num", "num", "num", "text", "num", "num")
    cells = []
    for row in rows:
        size = round(sum(row.file_bytes.values()))
        rank = f"{row.rank[0]:,} of {row.rank[1]:,}" if row.rank else "plain"
        shape = "×".join(map(str, row.shape))
        figures = _figures(row.total, row.weights)
        cells.append([escape(row.name), shape, *figures, rank, _describe_values(row), *_bits(size, row.total)])
    total, weights = sum(row.total for row in rows), sum(row.weights for row in rows)
    size = int(inspection["file_bytes"])
    cells.append(["whole file", "", *_figures(total, weights), "", "", *_bits(size, total)])
    return table(header, cells, kinds, foot=1)


def _figures(nonzeros: int, weights: int) -> tuple[str, str]:
    """Return the cells of nonzeros and density."""
    return f"{nonzeros:,}", f"{nonzeros / weights * 100:.3g} %" if weights else ""


def _bits(size: int, nonzeros: int) -> tuple[str, str]:
    """Return the cells of bytes and bits per nonzero."""
    return f"{size:,}", f"{8 * size / nonzeros:.1f}" if nonzeros else ""


def _describe_values(row: Layer) -> str:
    """Return how a layer's values are stored, factor by factor."""
    parts = {factor: text for factor, text in row.value_bits.items() if text != "none"}
    if len(parts) > 1 or "W" not in parts:
        return element("br").removesuffix("</br>").join(escape(f"{factor}: {text}") for factor, text in parts.items())
    return escape(parts["W"])
