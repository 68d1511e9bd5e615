"""Measure the checkpoint as it was before compression, on the images and with the attacks of the compressed run.

Writes natural.json beside this file. Run it from the repository's root, with a copy of pyautoattack's
examples/model_test.pt at runs/pyautoattack/model_test.pt:

    python results/cifar10/natural.py --n 500 --threads 1
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import atmc
from atmc.commands.checkpoints import load_weights
from atmc.data import load_data

HERE = Path(__file__).parent


def main() -> None:
    """Measure clean accuracy on the whole test split, pgd and pgd-strong on its first n images, in float32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/pyautoattack/model_test.pt")
    parser.add_argument("--data", default="../shared/data/cifar10-jpeg")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = atmc.models.build("resnet18", 10)  # the checkpoint takes images without normalization
    load_weights(model, options.checkpoint)
    began = time.monotonic()
    report = atmc.evaluate(
        model, load_data(options.data).test, threat="linf:8/255", attack=["pgd", "pgd-strong"], n=options.n
    )
    figures = {"checkpoint": options.checkpoint, "data": options.data, "threat": "linf:8/255", **report.to_json()}
    figures |= {"seconds": round(time.monotonic() - began, 1), "torch": torch.__version__}
    (HERE / "natural.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
