"""Where our engine's time goes: the operations of a network, one image, one thread.

    python benchmarks/engine_profile.py --out results/deploy [--only resnet18-trained-99 ...]

The cases are those of engines.py. An operation's time is that of the program up to it less that of the program
before it: medians of 15 times 20 runs. Adds to profile.json, by kind of operation and side of its output: how many,
microseconds, multiply-adds, and those done: with a layer's padding to whole registers, and where four outputs are
taken together with the zeros among them.
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
from engines import CASES, ROOT, Case, sparse, update

import atmc
from atmc.deploy.engine.engine import Engine
from atmc.deploy.engine.program import KINDS, VECTOR, Program
from atmc.deploy.engine.sparse import SparseNetwork, allocate_aligned, open_kernel

ROUNDS, RUNS = 15, 20


def seconds(network: SparseNetwork, program: Program, images: np.ndarray) -> list[float]:
    """Of the first k operations, k = 0, 1, ...; they take turns."""
    parts = [replace(program, ops=program.ops[:count].copy()) for count in range(len(program.ops) + 1)]
    arena, logits = allocate_aligned(program.arena_floats), np.empty((1, program.classes), np.float32)
    kernel, _ = open_kernel()
    found: list[list[float]] = [[] for _ in parts]
    for _ in range(ROUNDS):
        for part, times in zip(parts, found, strict=True):
            call = kernel.bind(part, arena, images, logits)
            call()
            start = time.perf_counter()
            for _ in range(RUNS):
                call()
            times.append((time.perf_counter() - start) / RUNS)
    return [statistics.median(times) for times in found]


def work(program: Program, op: Any) -> tuple[int, int]:
    """Multiply-adds of an operation: of nonzeros and pixels, and all that the kernel does."""
    if KINDS[op["kind"]] not in ("convolve", "convolve_fours", "dot"):
        return 0, 0
    outputs = -(-int(op["channels"]) // 4) if KINDS[op["kind"]] == "convolve_fours" else int(op["channels"])
    begin, end = (int(program.starts[op["rows"] + i]) for i in (0, outputs))
    nonzeros = int(np.count_nonzero(program.nonzeros["weight"][begin:end]))
    lanes = 1 if KINDS[op["kind"]] == "dot" else int(op["vectors"]) * VECTOR
    return nonzeros * int(op["out_height"] * op["out_width"]), (end - begin) * lanes


def profiled(case: Case) -> dict[str, Any]:
    """Rows by kind and side, and what a call costs before it does anything."""
    with tempfile.TemporaryDirectory() as folder:
        file = ROOT / case.file if case.file else Path(folder, "model.atmc")
        if not case.file:
            atmc.save(sparse(case), file)
        graph = Engine(file, threads=1, prefer="sparse").graph
    network = SparseNetwork(graph, threads=1)
    program, images = network.program(1), np.random.default_rng(0).random((1, *graph.input_shape), np.float32)
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    times = seconds(network, program, images)
    for op, last, now in zip(program.ops, times, times[1:], strict=False):
        key = KINDS[op["kind"]], int(op["out_height"])
        row = rows.setdefault(key, {"kind": key[0], "side": key[1], "ops": 0, "us": 0.0, "macs": 0, "done": 0})
        macs, done = work(program, op)
        for name, value in (("ops", 1), ("us", 1e6 * (now - last)), ("macs", macs), ("done", done)):
            row[name] += value
    ends = {"call_us": 1e6 * times[0], "total_us": 1e6 * times[-1]}
    return {"kernel": network.kernel_name, **ends, "rows": list(rows.values())}


def main() -> None:
    """Profile every case that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "deploy")
    parser.add_argument("--only", nargs="*", choices=CASES, default=["resnet18-uniform-99", "resnet18-trained-99"])
    given = parser.parse_args()
    for name in given.only:
        found = profiled(CASES[name])
        update(given.out / "profile.json", lambda old, name=name, found=found: old.update({name: found}))  # type: ignore[misc]
        print(name, found["kernel"], f"{found['total_us']:.1f} us, {found['call_us']:.1f} of them for the call")
        for row in sorted(found["rows"], key=lambda row: -row["us"]):
            rate = row["macs"] / row["us"] / 1e3
            print("  {kind:>14} side {side:>2}: {ops:>2} ops {us:8.1f} us".format(**row), f"{rate:6.1f} GMAC/s", end="")
            print(f", {row['done'] / max(row['macs'], 1):.2f} times the multiply-adds needed" if row["macs"] else "")


if __name__ == "__main__":
    main()
