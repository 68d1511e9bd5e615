"""Compare the engine with PyTorch on the same files: logits, predictions, robust accuracy; writes agreement.json.

    python results/deploy/agreement.py [FOLDER ...] [--mnist ../shared/data/mnist] [--cifar ../shared/data/cifar10-jpeg]
        [--n 1000]

Clean images are all test images of MNIST and the first --n of CIFAR-10. Adversarial examples of `pgd-strong` are made
on the decoded model in PyTorch from the first --n images of MNIST and 20 of CIFAR-10, saved, read back and given to the
engine. The LeNets are also run on every kernel: each instruction set of this machine, and Numba.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import atmc
from atmc.data import Images, load_data
from atmc.deploy.engine import native
from atmc.deploy.engine.sparse import SparseNetwork
from atmc.deploy.graph.graph import LogitsFunction
from atmc.evaluation import adversarial_file
from atmc.evaluation.accuracy import run_protocol, summarize
from atmc.evaluation.attacks import build_protocol
from atmc.evaluation.verdicts import Verdicts

HERE = Path(__file__).parent
RESULTS = HERE.parent


def compare(model: nn.Module, run: LogitsFunction, images: torch.Tensor) -> dict[str, Any]:
    """Return the largest difference of logits, and how many predictions are the same."""
    worst = largest = 0.0
    same = 0
    for part in torch.split(images, 500):
        with torch.inference_mode():
            expected = model(part).numpy()
        logits = run(part.numpy())
        worst, largest = max(worst, float(np.abs(logits - expected).max())), max(largest, float(np.abs(expected).max()))
        same += int((logits.argmax(1) == expected.argmax(1)).sum())
    return {"n": len(images), "same_prediction": same, "difference": worst, "largest_logit": largest}


def save_examples(model: nn.Module, test: Images, threat: atmc.Linf, n: int, path: Path) -> None:
    """Write adversarial examples of `pgd-strong` on n images into a file."""
    protocol, verdicts = build_protocol(model, test, threat, "pgd-strong"), Verdicts.fresh(test, n, keep=True)
    for _ in run_protocol(model, test, protocol, verdicts, batch_size=250):
        pass
    examples = adversarial_file.collect(
        model, test.labels, {"pgd-strong": summarize(protocol, verdicts)}, threat=str(threat), seed=0
    )
    examples.save(path)


def open_engines(file: Path, lenet: bool) -> Iterator[tuple[str, LogitsFunction]]:
    """Yield the engine on one and two threads and, for a LeNet, every kernel, each with a name."""
    for threads in (1, 2):
        engine = atmc.Engine(file, threads=threads)
        yield f"Engine, {threads} allowed: {engine.describe()}", engine
    if lenet:
        for name in native.instruction_sets():
            yield f"native, {name}", SparseNetwork(engine.graph, instructions=name)
        yield "numba", SparseNetwork(engine.graph, kernel="numba")


def main() -> None:
    """Compare every file of results/mnist-adversarial and the briefly trained ResNet-18s of results/cifar10."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", default=["mnist", "cifar10"])
    parser.add_argument("--mnist", default="../shared/data/mnist")
    parser.add_argument("--cifar", default="../shared/data/cifar10-jpeg")
    parser.add_argument("--n", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = HERE / "agreement.json"
    files: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
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
                save_examples(model, test, threat, attack_n, path)
                adv = adversarial_file.read(path).adv
                rows = {}
                for name, run in open_engines(file, folder == "mnist"):
                    rows[name] = {
                        "clean": compare(model, run, clean),
                        "adversarial": compare(model, run, adv),
                        "replay": adversarial_file.replay(path, run).to_json(),
                    }
                    print(file.parent.name, name, json.dumps(rows[name]), flush=True)
            files[str(file.relative_to(RESULTS.parent))] = {"threat": str(threat), "engines": rows}
            out.write_text(json.dumps(files, indent=1) + "\n")


if __name__ == "__main__":
    main()
