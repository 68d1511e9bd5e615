"""Time standard AutoAttack through `atmc.evaluate` and by calls of pyautoattack itself; write cost.json.

python results/evaluation/cost.py [--models FOLDER] [--data ../shared/data/mnist] [--n 20] [--rounds 3]

Same images, batch, device, seed and one thread, in turn in one process. pyautoattack gets the model as `atmc.load`
returns it, and once more in the memory layout that atmc chooses for itself. The checks are timed separately.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pyautoattack import AutoAttack

import atmc
from atmc.commands.outputs import write_json
from atmc.data import load_data
from atmc.evaluation.evaluate import prepare


def seconds(run: Callable[[], object]) -> float:
    """Return the time that a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    """Time all three in turn, a few times; the median of each counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="results/mnist-adversarial")
    parser.add_argument("--data", default="../shared/data/mnist")
    parser.add_argument("--run", default="atmc8-0015")
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    threat, model = atmc.Linf(76 / 255), atmc.load(Path(options.models) / options.run / "model.atmc")
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
    medians = {name: statistics.median(seconds_of_calls) for name, seconds_of_calls in times.items()}
    report = atmc.evaluate(model, load_data(options.data).test, threat=threat, attack="pgd-strong", n=100)
    figures: dict[str, Any] = {
        "model": options.run,
        "threat": str(threat),
        "n": options.n,
        "batch_size": 500,
        "threads": 1,
        "seed": 0,
    }
    figures |= {"seconds": times, "versions": {"torch": torch.__version__, "atmc": atmc.__version__}}
    for name in ("pyautoattack, same layout", "pyautoattack"):
        figures[f"ratio to {name}"] = round(medians["atmc.evaluate"] / medians[name], 3)
    figures["checks on 100 images, seconds"] = report.seconds["checks"]
    figures["pgd-strong on the same 100, seconds"] = report.seconds["pgd-strong"]
    write_json(Path(__file__).with_name("cost.json"), figures)
    print(figures)


if __name__ == "__main__":
    main()
