"""Write README.md from about.md, size.json and time.json. Run: python results/files/table.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
EXACT, LOSSY = ("zstd -19", "xz -9e", "deep compression"), "NNCodec, 1 % error"


def ratio(value: float | None, target: float | None = None) -> str:
    """'0.987', in bold above the target."""
    if value is None:
        return "–"
    return f"**{value:.3f}**" if target is not None and value > target else f"{value:.3f}"


def number(value: float | None) -> str:
    """'7.41'."""
    return "–" if value is None else f"{value:.2f}"


def name(row: dict[str, Any]) -> str:
    """A file's run, or what a random tensor is."""
    if "file" in row:
        return f"`{Path(row['file']).parent.name}`"
    return f"{row['positions_drawn']}, {'x'.join(map(str, row['shape']))}, {row['ratio_dense']:.1%}"


def floors(files: list[dict[str, Any]]) -> list[str]:
    """Size and floor of each file."""
    lines = [
        "| file | bytes | of them weights | biases, norms | nonzeros | positions, bits each | their floor | ratio "
        "| codes, bits each | codebooks, bytes | ratio to the floor, tensors with a codebook (nonzeros in them) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in files:
        lines.append(
            f"| {name(row)} | {row['bytes']:,} | {row['weights_bytes']:,} | {row['biases_norms_bytes']:,} "
            f"| {row['nonzeros']:,} | {number(row['positions'])} | {number(row['position_floor'])} "
            f"| {ratio(row['position_ratio'], 1.0)} | {number(row['codes'])} | {row['codebook_bytes']:,.0f} "
            f"| {ratio(row['ratio'], 1.0)} ({row['codebook_nonzeros']:,}) |"
        )
    return lines


def tensors(files: list[dict[str, Any]]) -> list[str]:
    """Every tensor to which the target of 1.05 applies: the range of a file."""
    lines = ["| file | such tensors | smallest ratio | largest ratio | of tensor |", "|---|---|---|---|---|"]
    for row in files:
        rows = [tensor for tensor in row["tensors"] if tensor["target_applies"]]
        if rows:
            low, high = (pick(rows, key=lambda tensor: tensor["ratio"]) for pick in (min, max))
            lines.append(
                f"| {name(row)} | {len(rows)} | {ratio(low['ratio'])} | {ratio(high['ratio'], 1.05)} "
                f"| {high['name']}, {high['nonzeros']:,} nonzeros |"
            )
    return lines


def coders(rows: list[dict[str, Any]]) -> list[str]:
    """Bytes of the weights under each coder."""
    lines = [
        f"| weights of | ours | {' | '.join(EXACT)} | ours over the best of these three | {LOSSY} (its error) "
        "| ours, exact, over it | ours, 1 % error (its error) | over NNCodec | ours, exact, over the best of all |",
        "|---|---|" + "---|" * (len(EXACT) + 6),
    ]
    for row in rows:
        found, rounded = row["coders"], row.get("ours_at_error")
        cells = [f"{found[rival]['bytes']:,}" for rival in EXACT] + [ratio(row["ours_over_best_exact_rival"], 0.9)]
        if rounded:
            lossy, ours = found[LOSSY]["bytes"], found["ours"]["bytes"]
            cells += [f"{lossy:,} ({found[LOSSY]['error']:.2%})", ratio(ours / lossy, 0.9)]
            cells += [f"{rounded['bytes']:,} ({rounded['error']:.2%})", ratio(row["at_error_over_nncodec"], 0.9)]
        else:
            cells += ["–"] * 4
        cells.append(f"{ratio(row['ours_over_best_rival'], 0.9)} ({row['best_rival']})")
        lines.append(f"| {name(row)} | {found['ours']['bytes']:,} | {' | '.join(cells)} |")
    return lines


def random_floors(rows: list[dict[str, Any]]) -> list[str]:
    """Random tensors against their floor."""
    lines = [
        "| positions, shape, density | nonzeros | bits each, all | positions | floor | ratio | codes | floor "
        "| ratio, both |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        target = 1.03 if row["positions_drawn"] == "uniform" else 1.0
        lines.append(
            f"| {name(row)} | {row['nonzeros']:,} | {row['bits_a_nonzero']:.2f} | {row['positions']:.2f} "
            f"| {row['position_floor']:.2f} | {ratio(row['position_ratio'], target)} | {row['codes']:.2f} "
            f"| {row['code_floor']:.2f} | {ratio(row['ratio'], target)} |"
        )
    return lines


def times(report: dict[str, Any]) -> list[str]:
    """Seconds."""
    lines = ["| what | median, seconds | all |", "|---|---|---|"]
    for what, found in report["seconds"].items():
        lines.append(f"| {what} | {ratio(found['median'], report['target_seconds'])} | {found['all']} |")
    return lines


def main() -> None:
    """Fill the tables in."""
    text = (HERE / "about.md").read_text()
    size, time = (json.loads((HERE / file).read_text()) for file in ("size.json", "time.json"))
    tables = {
        "floors": floors(size["files"]),
        "tensors": tensors(size["files"]),
        "coders": coders(size["files"]),
        "random floors": random_floors(size["random"]),
        "random coders": coders(size["random"]),
        "times": times(time),
    }
    for mark, lines in tables.items():
        text = text.replace(f"<!-- table: {mark} -->", "\n".join(lines))
    (HERE / "README.md").write_text(text)


if __name__ == "__main__":
    main()
