"""Check on a CUDA device that a run gives the same bytes twice, and after a kill and a resume.

    python benchmarks/cuda_resume.py [DEVICE]    (default: cuda; with cpu the script can be tried without a GPU)

It runs the digits configuration with a few epochs three times in a temporary folder, and prints which files are equal.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

EPOCHS = "dense=2,l0=2,admm=2,tune=1"
KILL_AFTER = 4  # epochs in the log


def start(*arguments: object) -> subprocess.Popen[bytes]:
    """Start an atmc command without output."""
    command = [sys.executable, "-m", "atmc", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def main() -> None:
    """Run the three trainings and compare their files."""
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    options = ["compress", "--config", "configs/digits.toml", "--device", device, "--epochs", EPOCHS]
    options += ["--objective", "pgd_at", "--no-checks", "--eval-n", "100", "--precision", "fp32"]
    with tempfile.TemporaryDirectory() as folder:
        first, second, killed = (Path(folder) / name for name in ("first", "second", "killed"))
        for out in (first, second):
            began = time.monotonic()
            assert start(*options, "--out", out).wait() == 0
            print(f"{out.name}: {time.monotonic() - began:.1f} s")
        process, log = start(*options, "--out", killed), killed / "log.jsonl"
        while not log.exists() or len(log.read_text().splitlines()) < KILL_AFTER:
            time.sleep(0.1)
            assert process.poll() is None, "the run ended before it could be killed"
        process.kill()
        process.wait()
        assert start("compress", "--out", killed, "--resume").wait() == 0
        files = [(out / "model.atmc").read_bytes() for out in (first, second, killed)]
        print(f"two runs: {'same bytes' if files[0] == files[1] else 'DIFFERENT'}")
        print(f"killed after {KILL_AFTER} epochs and resumed: {'same bytes' if files[0] == files[2] else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
