"""`atmc inspect`: what is in a model file, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from atmc.cli.accuracy_tables import new_table
from atmc.cli.options import ModelFile
from atmc.cli.terminal import console, is_narrow


def inspect(
    file: ModelFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what is in a model file, tensor by tensor, byte by byte."""
    from atmc.pack.inspect import inspect_file

    contents = inspect_file(file)
    if as_json:
        print(json.dumps(contents, indent=1))
    else:
        console.print(inspection_table(contents, narrow=is_narrow()))


def inspection_table(contents: Mapping[str, Any], *, narrow: bool = False) -> Table:
    """Return the table of a model file's tensors; a narrow one shows only the sum of each tensor's bytes.

    Args:
        contents: what `pack.inspect.inspect_file` returns.
    """
    meta, totals = contents["metadata"], contents["totals"]
    name, threat = meta["model"].get("name") or "own class", meta.get("threat") or "unknown"
    title = f"{contents['file']}: {contents['file_bytes']:,} bytes; {name}, {meta['classes']} classes, threat {threat}"
    parts = ("total", "excess") if narrow else ("positions", "codebook", "codes", "total", "floor", "excess")
    texts = ("tensor", "shape") if narrow else ("tensor", "shape", "stored")
    numbers = ("nonzeros", "bits", *parts) if narrow else ("nonzeros", "levels", "bits", "rank", *parts)
    table = new_table(title, texts, ["bytes" if narrow and number == "total" else number for number in numbers])
    for row in contents["tensors"]:
        sizes = [f"{row['bytes'][part]:,.1f}" if part in row["bytes"] else "" for part in parts]
        owner, _, factor = row["name"].rpartition(".")
        factors = contents["factorized"].get(owner)
        rank = str(factors["components"]) if factor == "U" and factors else ""
        cells = [Text(row["name"]), "×".join(map(str, row["shape"])), row["stored"], f"{row['nonzeros']:,}"]
        cells += [str(row["levels"]), str(row["bits"]), rank, *sizes]
        table.add_row(*(cell for i, cell in enumerate(cells) if not (narrow and i in (2, 4, 6))))
    outside = totals["metadata and checksums"]
    sums = {part: totals[part] for part in ("positions", "codebook", "codes", "floor", "excess")}
    sums["total"] = contents["file_bytes"] - outside
    blank = [""] * (len(table.columns) - 2 - len(parts))
    table.add_section()
    nonzeros = f"{totals['nonzeros']:,}"
    before = [*blank[:1], nonzeros, *blank[1:]] if narrow else [*blank[:2], nonzeros, *blank[2:]]
    table.add_row("all tensors", *before, *(f"{sums[part]:,.1f}" for part in parts))
    table.add_row("metadata, CRCs", "", *blank, *(f"{outside:,.1f}" if part == "total" else "" for part in parts))
    dead = f"{totals['dead_outputs']:,} outputs and {totals['dead_inputs']:,} inputs of weights are dead"
    table.caption = f"bytes; rank: terms of U V that are not 0; floor: log2 C(N, k) + k H(codes); {dead}"
    return table
