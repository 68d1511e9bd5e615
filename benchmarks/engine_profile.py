"""Profile the sparse engine by operation: one image, one thread.

    python benchmarks/engine_profile.py --out results/deploy [--only resnet18-trained-99 ...]

The cases are those of engines.py. The time of an operation is that of the program up to and including it minus that of
the program before it; both are medians of 15 times 20 runs. profile.json gets, by kind of operation and side of its
output: the number of operations, microseconds, the multiply-adds needed, and those done. The latter include those
in padding up to whole registers, and those of zeros in groups of four outputs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from engines import CASES, ROOT, Case, build_sparse, read_cases

import atmc
from atmc.commands.outputs import write_json
from atmc.deploy.engine.engine import Engine
from atmc.deploy.engine.program import KINDS, VECTOR, Program
from atmc.deploy.engine.sparse import SparseNetwork, allocate_aligned, open_kernel

ROUNDS, RUNS = 15, 20


def time_prefixes(program: Program, images: np.ndarray) -> list[float]:
    """Return the seconds of the first k operations of a program, for k = 0, 1, ...; the prefixes take turns."""
    prefixes = [replace(program, ops=program.ops[:count].copy()) for count in range(len(program.ops) + 1)]
    arena, logits = allocate_aligned(program.arena_floats), np.empty((1, program.classes), np.float32)
    kernel, _ = open_kernel()
    times: list[list[float]] = [[] for _ in prefixes]
    for _ in range(ROUNDS):
        for prefix, prefix_times in zip(prefixes, times, strict=True):
            call = kernel.bind(prefix, arena, images, logits)
            call()
            start = time.perf_counter()
            for _ in range(RUNS):
                call()
            prefix_times.append((time.perf_counter() - start) / RUNS)
    return [statistics.median(prefix_times) for prefix_times in times]


def count_macs(program: Program, op: Any) -> tuple[int, int]:
    """Return the multiply-adds of an operation: those of nonzeros and pixels, and all that the kernel does."""
    if KINDS[op["kind"]] not in ("convolve", "convolve_fours", "dot"):
        return 0, 0
    outputs = -(-int(op["channels"]) // 4) if KINDS[op["kind"]] == "convolve_fours" else int(op["channels"])
    begin, end = (int(program.starts[op["rows"] + i]) for i in (0, outputs))
    nonzeros = int(np.count_nonzero(program.nonzeros["weight"][begin:end]))
    lanes = 1 if KINDS[op["kind"]] == "dot" else int(op["vectors"]) * VECTOR
    return nonzeros * int(op["out_height"] * op["out_width"]), (end - begin) * lanes


def profile(case: Case) -> dict[str, Any]:
    """Return rows by kind and side, the time of a call without operations, and that of all."""
    with tempfile.TemporaryDirectory() as folder:
        file = ROOT / case.file if case.file else Path(folder, "model.atmc")
        if not case.file:
            atmc.save(build_sparse(case), file)
        graph = Engine(file, threads=1, prefer="sparse").graph
    network = SparseNetwork(graph, threads=1)
    program, images = network.program(1), np.random.default_rng(0).random((1, *graph.input_shape), np.float32)
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    times = time_prefixes(program, images)
    for op, last, now in zip(program.ops, times, times[1:], strict=False):
        key = KINDS[op["kind"]], int(op["out_height"])
        row = rows.setdefault(key, {"kind": key[0], "side": key[1], "ops": 0, "us": 0.0, "macs": 0, "done": 0})
        macs, done = count_macs(program, op)
        for name, value in (("ops", 1), ("us", 1e6 * (now - last)), ("macs", macs), ("done", done)):
            row[name] += value
    ends = {"call_us": 1e6 * times[0], "total_us": 1e6 * times[-1]}
    return {"kernel": network.kernel_name, **ends, "rows": list(rows.values())}


def main() -> None:
    """Profile the cases that were named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "deploy")
    parser.add_argument("--only", nargs="*", choices=CASES, default=["resnet18-uniform-99", "resnet18-trained-99"])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        figures = profile(CASES[name])
        write_json(options.out / "profile.json", read_cases(options.out / "profile.json") | {name: figures})
        print(name, figures["kernel"], f"{figures['total_us']:.1f} us, {figures['call_us']:.1f} of them for the call")
        for row in sorted(figures["rows"], key=lambda row: -row["us"]):
            rate = row["macs"] / row["us"] / 1e3
            print("  {kind:>14} side {side:>2}: {ops:>2} ops {us:8.1f} us".format(**row), f"{rate:6.1f} GMAC/s", end="")
            print(f", {row['done'] / max(row['macs'], 1):.2f} times the multiply-adds needed" if row["macs"] else "")


if __name__ == "__main__":
    main()
