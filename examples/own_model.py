"""Compress a network of your own: a small vision transformer, written here, on the handwritten digits.

    python examples/own_model.py
    atmc compress --model examples.own_model:vision_transformer --data digits --threat linf:0.1 --ratio 0.1 --bits 4 \
        --out runs/vit                                            # the same through the command line

Any module that maps images in [0, 1] to logits can be compressed. Attention weights are factored like other matrices.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

import atmc
from atmc.training.loop import StepDone
from atmc.training.runner import EpochDone


class VisionTransformer(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) at 1/1000 of the size, for 28 x 28 x 1 images.

    It has patches of 7 x 7 pixels, learned positions, and pre-norm encoder layers, and classifies the mean token.
    """

    def __init__(self, num_classes: int, width: int = 48, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.positions = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, classes) for images (n, 1, 28, 28) in [0, 1]."""
        tokens = self.patches(2 * x - 1).flatten(2).transpose(1, 2) + self.positions
        return cast(Tensor, self.head(self.norm(self.encoder(tokens)).mean(1)))


def vision_transformer(num_classes: int) -> nn.Module:
    """Build the model that ``--model examples.own_model:vision_transformer`` names."""
    return VisionTransformer(num_classes)


def show(event: StepDone | EpochDone) -> None:
    """Print one line per epoch."""
    if isinstance(event, EpochDone):
        record = event.record
        print(
            f"{record.phase:>5} {record.epoch:>2}  clean {record.clean:.1%}  robust {record.robust:.1%}"
            f"  nonzeros {record.nonzeros:,}"
        )


def main() -> None:
    """Train and compress the model, write its file, read it back and evaluate it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("vit.atmc"))
    parser.add_argument("--epochs", type=int, default=0, help="in every phase; by default 30, 15, 10 and 3")
    options = parser.parse_args()
    torch.manual_seed(0)
    data, model = atmc.load_data("digits"), VisionTransformer(10)
    threat = atmc.Linf(0.1)
    result = atmc.compress(
        model,
        data.train,
        data.val,
        threat=threat,
        budget=atmc.Budget(ratio=0.1, bits=4),
        epochs=options.epochs or {"dense": 30, "l0": 15, "admm": 10, "tune": 3},
        objective="pgd_at",
        batch_size=64,
        eps_ramp=5,
        on_event=show,
    )
    size = result.save(options.out)
    decoded = atmc.load(options.out, factory=vision_transformer)
    report = atmc.evaluate(decoded, data.test, threat=threat, attack=["pgd", "pgd-strong"])
    dense = sum(4 * value.numel() for value in model.state_dict().values())
    print(f"{options.out}: {size:,} bytes; dense float32: {dense:,} bytes")
    print("clean     ", report.clean.to_json())
    for name, accuracy in report.attacks.items():
        print(f"{name:10}", accuracy.to_json())


if __name__ == "__main__":
    main()
