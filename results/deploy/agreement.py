"""The engine against PyTorch on the same files: logits, predictions, robust accuracy replayed; writes agreement.json.

python results/deploy/agreement.py [FOLDER ...] [--mnist ../shared/data/mnist] [--cifar ../shared/data/cifar10-jpeg]
    [--n 1000]

Clean: every test image of MNIST, the first --n of CIFAR-10. Adversarial: `pgd-strong` on the first --n of MNIST (20 of
CIFAR-10), made on the decoded model in PyTorch, saved, read back and shown to the engine. For the LeNets the same with
every kernel: each instruction set of this machine, and Numba.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import atmc
from atmc.data import Images, load_data
from atmc.deploy.engine import native
from atmc.deploy.engine.sparse import SparseNetwork
from atmc.evaluation import adversarial_file
from atmc.evaluation.accuracy import run_protocol, summarize
from atmc.evaluation.attacks import build_protocol
from atmc.evaluation.verdicts import Verdicts

HERE = Path(__file__).parent
RESULTS = HERE.parent
Network = Callable[[np.ndarray], np.ndarray]


def compare(model: nn.Module, network: Network, images: torch.Tensor) -> dict[str, Any]:
    """Largest difference of logits, and how many predictions are the same."""
    worst = largest = 0.0
    same = 0
    for part in torch.split(images, 500):
        with torch.inference_mode():
            expected = model(part).numpy()
        found = network(part.numpy())
        worst, largest = max(worst, float(np.abs(found - expected).max())), max(largest, float(np.abs(expected).max()))
        same += int((found.argmax(1) == expected.argmax(1)).sum())
    return {"n": len(images), "same_prediction": same, "difference": worst, "largest_logit": largest}


def saved(model: nn.Module, test: Images, threat: atmc.Linf, n: int, path: Path) -> None:
    """Adversarial examples of `pgd-strong` in a file."""
    protocol, verdicts = build_protocol(model, test, threat, "pgd-strong"), Verdicts.fresh(test, n, keep=True)
    for _ in run_protocol(model, test, protocol, verdicts, batch_size=250):
        pass
    found = adversarial_file.collect(
        model, test.labels, {"pgd-strong": summarize(protocol, verdicts)}, threat=str(threat), seed=0
    )
    found.save(path)


def engines(file: Path, lenet: bool) -> Iterator[tuple[str, Network]]:
    """The engine as users get it, and of a LeNet every kernel there is."""
    for threads in (1, 2):
        engine = atmc.Engine(file, threads=threads)
        yield f"Engine, {threads} allowed: {engine.describe()}", engine
    if lenet:
        for name in native.instruction_sets():
            yield f"native, {name}", SparseNetwork(engine.graph, instructions=name)
        yield "numba", SparseNetwork(engine.graph, kernel="numba")


def main() -> None:
    """Every file of results/mnist, and the briefly trained ResNet-18s of results/cifar10."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", default=["mnist", "cifar10"])
    parser.add_argument("--mnist", default="../shared/data/mnist")
    parser.add_argument("--cifar", default="../shared/data/cifar10-jpeg")
    parser.add_argument("--n", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    written = HERE / "agreement.json"
    found: dict[str, Any] = json.loads(written.read_text()) if written.exists() else {}
    for folder, data, threat, attack_n in (
        ("mnist", options.mnist, atmc.Linf(76 / 255), options.n),
        ("cifar10", options.cifar, atmc.Linf(8 / 255), 20),
    ):
        if folder not in options.folders:
            continue
        test = load_data(data).test
        clean = test.float_pixels(torch.arange(len(test) if folder == "mnist" else options.n))
        for file in sorted(RESULTS.glob(f"{folder}/{'*' if folder == 'mnist' else 'brief-*'}/model.atmc")):
            model = atmc.load(file)
            with tempfile.TemporaryDirectory() as temporary:
                path = Path(temporary, "adv.npz")
                saved(model, test, threat, attack_n, path)
                adv = adversarial_file.read(path).adv
                rows = {}
                for name, network in engines(file, folder == "mnist"):
                    rows[name] = {
                        "clean": compare(model, network, clean),
                        "adversarial": compare(model, network, adv),
                        "replay": adversarial_file.replay(path, network).to_json(),
                    }
                    print(file.parent.name, name, json.dumps(rows[name]), flush=True)
            found[str(file.relative_to(RESULTS.parent))] = {"threat": str(threat), "engines": rows}
            written.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
