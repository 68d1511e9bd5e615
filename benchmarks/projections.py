"""Measure the time of the projections: zero_kmeans of a million values, and the exact top-k of ResNet-34's factors.

    python benchmarks/projections.py --threads 2 --repeats 5

Prints one JSON object: medians in seconds over `repeats` runs after one warm-up, with the machine they were taken on.
The top-k is compared with `torch.topk` over the concatenated magnitudes; both return one mask per tensor.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atmc.commands.bench.figures import processor_name
from atmc.compress.projections import largest_masks, zero_kmeans

WEIGHTS = 21_265_088  # conv and linear weights of ResNet-34, CIFAR form
VALUES = 1_000_000
LEVELS = 256


def resnet34_matrices() -> Iterator[tuple[int, int]]:
    """Yield (out, in * kh * kw) of every conv and linear weight of ResNet-34, CIFAR form."""
    yield 64, 27
    before = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield width, before * 9
            yield width, width * 9
            if block == 0 and before != width:
                yield width, before
            before = width
    yield 10, 512


def resnet34_factors(seed: int = 0) -> list[Tensor]:
    """Draw U, V and C of every weight: normal values at He's scale for V, at a hundredth of it for U and C."""
    generator = torch.Generator().manual_seed(seed)
    factors = []
    for rows, columns in resnet34_matrices():
        inner, scale = min(rows, columns), math.sqrt(2 / columns)
        for shape, size in (((rows, inner), 0.01), ((inner, columns), 1.0), ((rows, columns), 0.01)):
            factors.append(torch.randn(shape, generator=generator) * scale * size)
    return factors


def topk_masks(tensors: list[Tensor], k: int) -> list[Tensor]:
    """Compute the masks by torch.topk over all tensors at once, as a reference."""
    magnitudes = torch.cat([tensor.abs().flatten() for tensor in tensors])
    mask = torch.zeros(len(magnitudes), dtype=torch.bool)
    mask[torch.topk(magnitudes, k, sorted=False).indices] = True
    parts = torch.split(mask, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Return the median wall-clock time of a call, after one warm-up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times), 4)


def bench_kmeans(repeats: int) -> dict[str, dict[str, float]]:
    """Measure zero_kmeans on one thread: seconds for VALUES nonzeros and LEVELS levels.

    A warm start has the centers of values that differ by 1 % of their median.
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(VALUES, generator=generator)
    cauchy = normal / torch.randn(VALUES, generator=generator)
    results = {}
    for name, x in (("normal", normal), ("heavy_tailed", cauchy)):
        quantized, centers = zero_kmeans(x, LEVELS)
        moved = x + 0.01 * x.abs().median() * torch.randn(VALUES, generator=generator)
        results[name] = {
            "cold": median_seconds(partial(zero_kmeans, x, LEVELS), repeats),
            "warm": median_seconds(partial(zero_kmeans, moved, LEVELS, centers=centers), repeats),
            "warm_10_iterations": median_seconds(
                partial(zero_kmeans, moved, LEVELS, centers=centers, iterations=10), repeats
            ),
            "error": float(((x - quantized).double() ** 2).sum()),
        }
    return results


def bench_topk(repeats: int, threads: int) -> dict[str, Any]:
    """Measure exact masks of the k largest entries of all factors, in seconds, for k = 0.5 % and 1 % of the weights."""
    torch.set_num_threads(threads)
    factors = resnet34_factors()
    results: dict[str, Any] = {"entries": sum(factor.numel() for factor in factors), "tensors": len(factors)}
    for ratio in (0.005, 0.01):
        k = int(ratio * WEIGHTS)
        ours = median_seconds(partial(largest_masks, factors, k), repeats)
        theirs = median_seconds(partial(topk_masks, factors, k), repeats)
        pairs = list(zip(largest_masks(factors, k), topk_masks(factors, k), strict=True))
        differ = sum(int((a != b).sum()) for a, b in pairs)
        results[f"k={k}"] = {
            "largest_masks": ours,
            "torch_topk": theirs,
            "topk_over_ours": round(theirs / ours, 2),
            "marked": sum(int(mask.sum()) for mask, _ in pairs),
            "entries_that_differ": differ,
        }
    return results


def main() -> None:
    """Measure both projections, and print the figures."""
    parser = argparse.ArgumentParser(description="Times of zero_kmeans and of the exact global top-k.")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch threads for the top-k (zero_kmeans: one)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median is taken")
    arguments = parser.parse_args()
    machine = {
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    report = {
        "machine": machine,
        "repeats": arguments.repeats,
        "zero_kmeans": {"threads": 1, "nonzeros": VALUES, "levels": LEVELS, **bench_kmeans(arguments.repeats)},
        "top_k": {"threads": arguments.threads, **bench_topk(arguments.repeats, arguments.threads)},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
