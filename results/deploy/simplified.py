"""What the simplification takes out of committed files, and that their logits stay; writes simplified.md.

python results/deploy/simplified.py [--mnist ../shared/data/mnist] [--n 2000]

Logits are compared for the MNIST files, on the first --n test images and on as many PGD examples (4 steps, eps 0.1).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import atmc
from atmc.data import load_data
from atmc.deploy.graph.graph import run_graph
from atmc.deploy.graph.simplify import simplify_with_report
from atmc.pack import artifact
from atmc.robust.attacks import pgd

HERE = Path(__file__).parent
HEAD = """# What the simplification takes out

`python results/deploy/simplified.py`. Channels: outputs of all convolutions and linear layers. Multiply-adds leave
zeros out, so that they fall only where a weight was used that had no effect, or where the factors are less work.
Difference:
the largest of any logit between PyTorch and the simplified graph, over the largest |logit|, on the first {n:,} MNIST
test images and on as many PGD examples of them (4 steps, eps 0.1); "same class" counts both.

| file | channels | multiply-adds | layers as factors | difference | same class |
|---|---|---|---|---|---|
"""


def row(file: Path, images: torch.Tensor | None, labels: torch.Tensor) -> str:
    """A line of the table; images (n, c, h, w) to compare on, if any."""
    loaded = artifact.open(file)
    model = loaded.model
    found = simplify_with_report(model, loaded.input_shape, loaded.factors)
    before, after = (
        sum(getattr(layer, f"channels_{when}")[0] for layer in found.layers) for when in ("before", "after")
    )
    factored = ", ".join(layer.name for layer in found.layers if layer.factored)
    compared = "| |"
    if images is not None:
        adv = pgd(model, images, labels, atmc.Linf(0.1), steps=4, step_size=0.05)
        with torch.no_grad():
            both = torch.cat((images, adv))
            ours, theirs = run_graph(found.graph, both), model(both)
        same = int((ours.argmax(1) == theirs.argmax(1)).sum())
        compared = f"{float((ours - theirs).abs().max() / theirs.abs().max()):.1g} | {same:,} of {len(both):,} |"
    name, work = "/".join(file.parts[-3:-1]), f"{found.macs_before:,} → {found.macs_after:,}"
    return f"| {name} | {before:,} → {after:,} | {work} | {factored} | {compared}"


def main() -> None:
    """Every file of results/mnist, and the briefly trained ResNet-18s of results/cifar10."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist", default="../shared/data/mnist")
    parser.add_argument("--n", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    test = load_data(options.mnist).test
    images, labels = test.float_pixels(slice(0, options.n)), test.labels[: options.n]
    lines = [row(file, images, labels) for file in sorted(HERE.parent.glob("mnist/*/model.atmc"))]
    lines += [row(file, None, labels) for file in sorted(HERE.parent.glob("cifar10/brief-*/model.atmc"))]
    (HERE / "simplified.md").write_text(HEAD.format(n=options.n) + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
