"""Report what simplification removes from committed files, and how their logits change; writes simplified.md.

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
HEAD = """# What simplification removes

`python results/deploy/simplified.py` writes this page. Channels are the outputs of all convolutions and linear layers.
Multiply-adds of zero weights are not counted, so the number falls only if weights without effect are removed or if the
factors are less work. The difference is the largest of any logit between PyTorch and the simplified graph, over the
largest |logit|, on the first {n:,} MNIST test images and on as many PGD examples of them (4 steps, eps 0.1); "same
class" counts both.

| file | channels | multiply-adds | layers as factors | difference | same class |
|---|---|---|---|---|---|
"""


def format_row(file: Path, images: torch.Tensor | None, labels: torch.Tensor) -> str:
    """Return a row of the table; images: (n, c, h, w) to compare on, or None."""
    loaded = artifact.open(file)
    model = loaded.model
    report = simplify_with_report(model, loaded.input_shape, loaded.factors)
    before, after = (
        sum(getattr(layer, f"channels_{when}")[0] for layer in report.layers) for when in ("before", "after")
    )
    factored = ", ".join(layer.name for layer in report.layers if layer.factored)
    compared = "| |"
    if images is not None:
        adv = pgd(model, images, labels, atmc.Linf(0.1), steps=4, step_size=0.05)
        with torch.no_grad():
            both = torch.cat((images, adv))
            logits, expected = run_graph(report.graph, both), model(both)
        same = int((logits.argmax(1) == expected.argmax(1)).sum())
        compared = f"{float((logits - expected).abs().max() / expected.abs().max()):.1g} | {same:,} of {len(both):,} |"
    name, work = "/".join(file.parts[-3:-1]), f"{report.macs_before:,} → {report.macs_after:,}"
    return f"| {name} | {before:,} → {after:,} | {work} | {factored} | {compared}"


def main() -> None:
    """Simplify every file of results/mnist-adversarial and the briefly trained ResNet-18s of results/cifar10."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist", default="../shared/data/mnist")
    parser.add_argument("--n", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    test = load_data(options.mnist).test
    images, labels = test.float_pixels(slice(0, options.n)), test.labels[: options.n]
    lines = [format_row(file, images, labels) for file in sorted(HERE.parent.glob("mnist/*/model.atmc"))]
    lines += [format_row(file, None, labels) for file in sorted(HERE.parent.glob("cifar10/brief-*/model.atmc"))]
    (HERE / "simplified.md").write_text(HEAD.format(n=options.n) + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
