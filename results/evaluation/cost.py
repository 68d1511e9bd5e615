"""Standard AutoAttack through `atmc.evaluate` against calling pyautoattack directly; writes cost.json.

python results/evaluation/cost.py [--models results/mnist] [--data ../shared/data/mnist] [--n 20] [--rounds 3]

Same images, batch, device, seed and one thread, in turn in one process. pyautoattack gets the model as `atmc.load`
gives it, and once more in the memory layout that atmc chooses for itself. The checks are timed apart.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import lenet, write
from pyautoattack import AutoAttack

import atmc
from atmc.data import load_data
from atmc.evaluation.evaluate import prepare


def seconds(run: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    """All three in turn, a few times; the median of each counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="results/mnist")
    parser.add_argument("--data", default="../shared/data/mnist")
    parser.add_argument("--run", default="atmc8-0015")
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    threat, model = atmc.Linf(76 / 255), lenet(Path(options.models) / options.run)
    test = load_data(options.data).test.take(slice(0, options.n))
    x, y = test.float_pixels(slice(None)), test.labels
    fast, _ = prepare(model, test)

    def direct(network: torch.nn.Module) -> None:
        attack = AutoAttack(network, norm="Linf", eps=threat.eps, seed=0, version="standard")
        attack.verbose = False
        attack.run_standard_evaluation(x, y, batch_size=500)

    ways: dict[str, Callable[[], object]] = {
        "atmc.evaluate": lambda: atmc.evaluate(model, test, threat=threat, attack="autoattack", checks=False),
        "pyautoattack, same layout": lambda: direct(fast),
        "pyautoattack": lambda: direct(model),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            times[name].append(round(seconds(way), 2))
            print(name, times[name][-1], flush=True)
    medians = {name: statistics.median(found) for name, found in times.items()}
    report = atmc.evaluate(model, load_data(options.data).test, threat=threat, attack="pgd-strong", n=100)
    found = {"model": options.run, "threat": str(threat), "n": options.n, "batch_size": 500, "threads": 1, "seed": 0}
    found |= {"seconds": times, "versions": {"torch": torch.__version__, "atmc": atmc.__version__}}
    for name in ("pyautoattack, same layout", "pyautoattack"):
        found[f"ratio to {name}"] = round(medians["atmc.evaluate"] / medians[name], 3)
    found["checks on 100 images, seconds"] = report.seconds["checks"]
    found["pgd-strong on the same 100, seconds"] = report.seconds["pgd-strong"]
    write("cost.json", found)
    print(found)


if __name__ == "__main__":
    main()
