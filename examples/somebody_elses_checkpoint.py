"""Make somebody else's naturally trained network robust and small: AutoAttack's own example, a CIFAR-10 ResNet-18.

The package pyautoattack ships the checkpoint as examples/model_test.pt (`pip install pyautoattack==0.2.0`). It was
trained without an adversary: 85.6 % clean on JPEG'd CIFAR-10 (10,000 test images), 0 % under `pgd` (500). A short
adversarial fine-tuning while it is being compressed repairs a little of that; a real one takes many more epochs.

    python examples/somebody_elses_checkpoint.py --data ../shared/data/cifar10-jpeg --limit 2000 --out runs/checkpoint

That command gave a file of 489,646 bytes (of 44.7 MB), 62.5 % clean, 10.4 % under `pgd` and 6.6 % under `pgd-strong`
(500 images each, seed 0): results/cifar10/README.md. On one busy core of two it took 29 minutes.

The checkpoint may have been trained on the validation images; the test split it has not seen.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path


def checkpoint() -> Path:
    """Where the package keeps the file; relative where that is below the current folder, as .venv usually is."""
    for file in distribution("pyautoattack").files or []:
        if file.name == "model_test.pt":
            path = Path(str(file.locate()))
            return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    raise FileNotFoundError("pyautoattack has no examples/model_test.pt; install pyautoattack==0.2.0")


def main() -> None:
    """Run `atmc compress` on it, and print the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="uoft-cs/cifar10")
    parser.add_argument("--limit", type=int, help="train on so many images only")
    parser.add_argument("--out", default="runs/checkpoint")
    options = parser.parse_args()
    command = [sys.executable, "-m", "atmc", "compress", "--config", str(Path(__file__).with_suffix(".toml"))]
    command += ["--checkpoint", str(checkpoint()), "--data", options.data, "--out", options.out]
    if options.limit:
        command += ["--limit", str(options.limit)]
    print(" ".join(command), flush=True)
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
