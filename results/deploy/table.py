"""Write README.md from about.md and the figures beside this file. Run: python results/deploy/table.py"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OURS = "atmc"
TARGETS = {90: {1: 2, 64: 2}, 95: {1: 4, 64: 3.5}, 99: {1: 12, 64: 10}, 99.5: {1: 20, 64: 15}}  # of ResNets, float32
INT8_TARGETS = {99: 4}
LENET_TARGET = 3
RIVALS = (
    ("PyTorch", "PyTorch"),
    ("PyTorch, channels_last", "channels_last"),
    ("ONNX Runtime", "ONNX Runtime"),
    ("OpenVINO", "OpenVINO"),
    ("ONNX Runtime, unsimplified", "ONNX Runtime, as it is"),
    ("OpenVINO, unsimplified", "OpenVINO, as it is"),
    ("OpenVINO, its default", "OpenVINO bf16"),
    ("ONNX Runtime int8", "ONNX Runtime int8"),
    ("OpenVINO int8", "OpenVINO int8"),
)


def times(session: dict[str, Any], batch: int) -> dict[str, dict[str, Any]]:
    """By engine: its row, with the figures of one thread and this batch."""
    found = {}
    for row in session["engines"]:
        for each in row["times"]:
            if (each["threads"], each["batch"]) == (1, batch):
                found[row["engine"]] = row | each
    return found


def factor(session: dict[str, Any], batch: int, precision: str) -> tuple[float, str]:
    """How many times as fast we are as the best engine of a precision, and which that is."""
    rows = times(session, batch)
    best = min(
        (row for name, row in rows.items() if name != OURS and matches(row, precision)),
        key=lambda row: float(row["median_ms"]),
    )
    return best["median_ms"] / rows[OURS]["median_ms"], best["engine"]


def matches(row: dict[str, Any], kind: str) -> bool:
    """Whether an engine is of a precision; 'as it is': float32, on the network that nobody simplified."""
    plain = row["engine"].startswith("PyTorch") or row["engine"].endswith("unsimplified")
    if kind == "as it is":
        return bool(plain and row["precision"] == "float32")
    return bool(row["precision"] == kind)


def target(case: dict[str, Any], batch: int, precision: str) -> float | None:
    """What the issue asks for, if it does."""
    if precision in ("as it is", "bfloat16"):
        return None
    if precision == "int8":
        return INT8_TARGETS.get(case["zeros"]) if case["network"].startswith("resnet") else None
    if case["network"] == "lenet":
        return LENET_TARGET
    return TARGETS[case["zeros"]][batch] if case["network"].startswith("resnet") else None


def cell(case: dict[str, Any], batch: int, precision: str) -> str:
    """'17.4 (16.9 to 18.0), of 12', bold where the target is missed; the best engine's name."""
    found = [factor(session, batch, precision) for session in case["sessions"]]
    values = [value for value, _ in found]
    middle, wanted = statistics.median(values), target(case, batch, precision)
    text = f"{middle:.3g}"
    if len(values) > 1:
        text += f" ({min(values):.3g}–{max(values):.3g})"
    if wanted is not None:
        text = f"{text} of {wanted}" if middle >= wanted else f"**{text} of {wanted}**"
    return text


def speedups(cases: dict[str, Any]) -> list[str]:
    """One row a case."""
    lines = [
        "| network | pattern | zeros | multiply-adds left "
        "| batch 1: float32 | as it is | int8 | bf16 | batch 64: float32 | as it is | int8 | bf16 |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases.values():
        macs = case["sessions"][0]["macs"]
        cells = [cell(case, batch, kind) for batch in (1, 64) for kind in ("float32", "as it is", "int8", "bfloat16")]
        lines.append(
            f"| {case['network']} | {case['pattern']} | {case['zeros']:g} % | {macs['left'] / macs['dense']:.2%} "
            f"| {' | '.join(cells)} |"
        )
    return lines


def milliseconds(cases: dict[str, Any], batch: int) -> list[str]:
    """The medians behind the factors, with half the distance of the quartiles, of the session in the middle."""
    lines = [
        f"| network | pattern | zeros | atmc | {' | '.join(title for _, title in RIVALS)} |",
        "|---|---|---|---|" + "---|" * len(RIVALS),
    ]
    for case in cases.values():
        rows = times(middle(case, batch), batch)
        cells = [spread(rows[name]) if name in rows else "" for name in (OURS, *(name for name, _ in RIVALS))]
        lines.append(f"| {case['network']} | {case['pattern']} | {case['zeros']:g} % | {' | '.join(cells)} |")
    return lines


def middle(case: dict[str, Any], batch: int) -> dict[str, Any]:
    """The session whose factor against float32 is the median, or just below it."""
    ordered = sorted(case["sessions"], key=lambda session: factor(session, batch, "float32")[0])
    session: dict[str, Any] = ordered[(len(ordered) - 1) // 2]
    return session


def spread(row: dict[str, Any]) -> str:
    """'1.23 ±0.04'."""
    return f"{digits(row['median_ms'], 3)} ±{digits((row['q3_ms'] - row['q1_ms']) / 2, 1)}"


def digits(value: float, count: int) -> str:
    """So many significant digits, never as a power of ten."""
    return f"{float(f'{value:.{count}g}'):,.{max(0, count - 1 - math.floor(math.log10(value)))}f}" if value else "0"


def memory(cases: dict[str, Any]) -> list[str]:
    """File sizes and peaks of memory."""
    lines = [
        "| network | pattern | zeros | engine "
        "| file, bytes | MB to load | MB, batch 1 | MB, batch 64 | accuracy | difference |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases.values():
        if case["pattern"] != "trained" and case["zeros"] != 99:
            continue
        for row in case["sessions"][-1]["engines"]:
            peaks = [row["load_bytes"], *(row["run_bytes"][str(batch)] for batch in (1, 64))]
            accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
            cells = [f"{row['file_bytes']:,}", *(f"{peak / 1e6:.1f}" for peak in peaks)]
            cells += [accuracy, f"{row['difference']:.1g}"]
            title = f"{case['network']} | {case['pattern']} | {case['zeros']:g} %"
            lines.append(f"| {title} | {row['engine']} | {' | '.join(cells)} |")
    return lines


def profiles(found: dict[str, Any]) -> list[str]:
    """Where the time goes, by kind of operation and side of its output; parts under 3 % are left out."""
    lines = [
        "| case | operation | side | how many | µs | share | GMAC/s | done / needed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, profile in found.items():
        for row in sorted(profile["rows"], key=lambda row: -float(row["us"])):
            share = row["us"] / profile["total_us"]
            if share < 0.03:
                continue
            work = f"{row['macs'] / row['us'] / 1e3:.1f} | {row['done'] / row['macs']:.2f}" if row["macs"] else " | "
            lines.append(
                f"| {name} | `{row['kind']}` | {row['side']} | {row['ops']} | {row['us']:.1f} | {share:.0%} | {work} |"
            )
    return lines


def about_machine(cases: dict[str, Any]) -> str:
    """Machine, versions and dates."""
    sessions = [session for case in cases.values() for session in case["sessions"]]
    machine, versions = sessions[-1]["machine"], sessions[-1]["versions"]
    dates = sorted({session["date"] for session in sessions})
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    runs = sorted({row["runs"] for session in sessions for row in session["engines"] if "runs" in row})
    return (
        f"{machine['processor']}, {machine['processors']} processors, {machine['system']}; {names}; "
        f"{' and '.join(dates)}. Our engine ran {' or '.join(runs)}."
    )


def main() -> None:
    """Fill the tables in."""
    text = (HERE / "about.md").read_text()
    cases = json.loads((HERE / "engines.json").read_text())
    profile = HERE / "profile.json"
    tables = {
        "machine": [about_machine(cases)],
        "speedups": speedups(cases),
        "milliseconds 1": milliseconds(cases, 1),
        "milliseconds 64": milliseconds(cases, 64),
        "memory": memory(cases),
        "profiles": profiles(json.loads(profile.read_text())) if profile.exists() else [],
    }
    for mark, lines in tables.items():
        text = text.replace(f"<!-- table: {mark} -->", "\n".join(lines))
    (HERE / "README.md").write_text(text)


if __name__ == "__main__":
    main()
