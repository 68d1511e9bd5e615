"""Make somebody else's naturally trained network robust and small: AutoAttack's own example, a CIFAR-10 ResNet-18.

The package pyautoattack ships the checkpoint as examples/model_test.pt (`pip install pyautoattack==0.2.0`). It was
trained without an adversary: its accuracy on JPEG-compressed CIFAR-10 is 85.6 % clean (10,000 test images) and 0 %
under `pgd` (500). The short adversarial training here restores a little of that; a full one takes many more epochs.

    python examples/somebody_elses_checkpoint.py --data ../shared/data/cifar10-jpeg --limit 2000 --out runs/checkpoint

That command gave a file of 489,646 bytes (of 44.7 MB) with 62.5 % clean accuracy, 10.4 % under `pgd` and 6.6 % under
`pgd-strong` (500 images each, seed 0), see results/cifar10/README.md. It took 29 minutes on one busy core.

The checkpoint may have been trained on the validation images, but not on the test split.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path


def find_checkpoint() -> Path:
    """Return the path of the package's file, relative if it is below the current folder, as .venv usually is."""
    for file in distribution("pyautoattack").files or []:
        if file.name == "model_test.pt":
            path = Path(str(file.locate()))
            return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    raise FileNotFoundError("pyautoattack has no examples/model_test.pt; install pyautoattack==0.2.0")


def main() -> None:
    """Print and run the `atmc compress` command for the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="uoft-cs/cifar10")
    parser.add_argument("--limit", type=int, help="number of images to train on")
    parser.add_argument("--out", default="runs/checkpoint")
    options = parser.parse_args()
    command = [sys.executable, "-m", "atmc", "compress", "--config", str(Path(__file__).with_suffix(".toml"))]
    command += ["--checkpoint", str(find_checkpoint()), "--data", options.data, "--out", options.out]
    if options.limit:
        command += ["--limit", str(options.limit)]
    print(" ".join(command), flush=True)
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
