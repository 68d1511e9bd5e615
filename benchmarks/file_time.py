"""Measure the time to write and to read a ResNet-34 of which 99.5 % of the weights are zero, on one core.

    python benchmarks/file_time.py --out results/files

Writes time.json: medians over 5 processes of the first call in each (which includes Numba's start from its cache) and
of the second. The weights are random, seed 0: `file_size.draw_tensor`, density log-normal over rows and input
channels, 16 values per tensor; batch norm is random float32. Imports and reading the file from disk are not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from file_size import draw_tensor
from torch import nn

from atmc import models
from atmc.models.batch_norm import make_affine
from atmc.pack import artifact

ROOT = Path(__file__).parents[1]
REPEATS, TARGET = 5, 1.0


@torch.no_grad()
def build_sparse_resnet34() -> nn.Module:
    """Build the network to write."""
    model = models.build("resnet34", 10, seed=0).eval()
    noise = torch.Generator().manual_seed(0)
    for seed, parameter in enumerate(model.parameters()):
        if parameter.dim() > 1:
            shape = tuple(parameter.shape)
            parameter.copy_(torch.from_numpy(draw_tensor("log-normal", shape, 0.005, seed)))
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=noise))
    return make_affine(model)


def time_calls(direction: str, folder: Path) -> list[float]:
    """Return the seconds of the first and of the second call in this process; direction: encode or decode."""
    torch.set_num_threads(1)
    times = []
    if direction == "encode":
        model = models.build("resnet34", 10).eval()
        model.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
        for _ in range(2):
            start = time.perf_counter()
            data = artifact.to_bytes(model)
            times.append(time.perf_counter() - start)
        assert data == (folder / "model.atmc").read_bytes()
        return times
    data = (folder / "model.atmc").read_bytes()
    for _ in range(2):
        start = time.perf_counter()
        artifact.from_bytes(data)
        times.append(time.perf_counter() - start)
    return times


def measure(folder: Path) -> dict[str, Any]:
    """Return the medians, after one process of each direction that fills Numba's cache."""
    medians: dict[str, Any] = {}
    for direction in ("encode", "decode"):
        command = [sys.executable, __file__, "--worker", direction, str(folder)]
        runs = []
        for _ in range(REPEATS + 1):
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs.append(json.loads(output))
        for name, times in zip(("first call", "second call"), zip(*runs[1:], strict=True), strict=True):
            medians[f"{direction}, {name}"] = {
                "median": round(statistics.median(times), 3),
                "all": [round(seconds, 3) for seconds in times],
            }
    return medians


def main() -> None:
    """Write the network, and measure both directions."""
    parser = argparse.ArgumentParser(description="Measure the time to write and to read a sparse ResNet-34.")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "files")
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(time_calls(arguments.worker[0], Path(arguments.worker[1]))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build_sparse_resnet34()
        torch.save(model.state_dict(), folder / "state.pt")
        size = artifact.save(model, folder / "model.atmc")
        weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        report: dict[str, Any] = {
            "machine": {"cores": os.cpu_count(), "threads": 1, "load_average": round(os.getloadavg()[0], 2)},
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "weights": sum(weight.numel() for weight in weights),
            "nonzeros": sum(int(weight.count_nonzero()) for weight in weights),
            "bytes": size,
            "target_seconds": TARGET,
            "repeats": REPEATS,
            "seconds": measure(folder),
        }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "time.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
