"""Sizes of the C sources of committed model files, and whether they compute what PyTorch computes.

    python benchmarks/c_sizes.py [results/mnist/atmc8-006/model.atmc ...] --data ../shared/data --out results/deploy

Writes c_sizes.json; `atmc table --page results/deploy/c_sizes.md` makes the table of it. If files are named, the other
rows stay as they are. Needs cc; the columns of the Cortex-M4 need arm-none-eabi-gcc, its instructions also newlib
(Debian: gcc-arm-none-eabi, libnewlib-arm-none-eabi) and qemu-system-arm. What a missing tool would give is left out.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from atmc.data import load_data
from atmc.data.images import Images
from atmc.deploy.export.c.model import model_to_c
from atmc.deploy.export.c.source import CSource
from atmc.pack import artifact
from atmc.robust.attacks import pgd
from atmc.robust.threats import Linf

ROOT = Path(__file__).parents[1]
STRICT = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror"]
CORTEX_M4 = ["-mcpu=cortex-m4", "-mthumb", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard"]
STEPS = 20  # of PGD, each eps / 8 long
FEW = 100  # images of CIFAR-10
JOBS: tuple[tuple[str, str, float, int | None, int], ...] = (  # data, files, eps, clean images, attacked images
    ("mnist", "results/mnist/*/model.atmc", 76 / 255, None, 500),
    ("cifar10-jpeg", "results/cifar10/brief-*/model.atmc", 8 / 255, FEW, FEW),
)

STARTUP = """
extern void _start(void);
static void reset(void)
{
    *(volatile unsigned *)0xE000ED88u |= 0xFu << 20; /* the floating-point unit on */
    __asm volatile("dsb; isb");
    _start();
}
__attribute__((section(".vectors"), used)) static void *const vectors[] = {(void *)0x20100000, (void *)reset};
"""

COUNT = """
#include "model.h"
static float image[MODEL_CHANNELS * MODEL_HEIGHT * MODEL_WIDTH];
static volatile int found;
int main(void)
{
    int i;
    for (i = 0; i < TIMES; i++)
        found = model_classify(image);
    return 0;
}
"""


def call(*command: str | Path, folder: Path) -> str:
    """What a command prints; RuntimeError with its errors where it fails."""
    done = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {(done.stderr + done.stdout)[:2000]}")
    return done.stdout


def write(made: CSource, folder: Path) -> None:
    for end, text in ((".h", made.header), (".c", made.source), ("_test.c", made.test_source)):
        (folder / f"{made.name}{end}").write_text(text)


def sections(compiler: Sequence[str], folder: Path) -> dict[str, int]:
    """Bytes of flash (code, constants, initialised data) and of static memory, and of all stack frames together."""
    call(*compiler, *STRICT, "-Os", "-fstack-usage", "-c", "model.c", "-o", "sized.o", folder=folder)
    text, data, bss = map(int, call("size", "sized.o", folder=folder).splitlines()[1].split()[:3])
    frames = [int(line.split("\t")[1]) for line in (folder / "sized.su").read_text().splitlines()]
    return {"flash": text + data, "static": data + bss, "stack_at_most": sum(frames)}


def instructions(folder: Path) -> int:
    """That an emulated Cortex-M4 takes for one image, to two digits; the generated test has to pass there, too."""
    (folder / "startup.c").write_text(STARTUP)
    (folder / "count.c").write_text(COUNT)
    link = ["arm-none-eabi-gcc", *CORTEX_M4, "-Os", "--specs=rdimon.specs", "-Wl,--section-start=.vectors=0"]
    run = ["qemu-system-arm", "-M", "mps2-an386", "-nographic", "-semihosting", "-kernel"]
    call(*link, "startup.c", "model.c", "model_test.c", "-o", "model_test.elf", folder=folder)
    assert call(*run, "model_test.elf", folder=folder).startswith("ok")
    counts = []
    for times in (1, 2):
        call(*link, f"-DTIMES={times}", "startup.c", "model.c", "count.c", "-o", "count.elf", folder=folder)
        trace = ["-singlestep", "-d", "exec,nochain", "-D", "/dev/stdout"]  # a line an instruction
        with subprocess.Popen([*run, "count.elf", *trace], cwd=folder, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            counts.append(sum(line.startswith(b"Trace") for line in process.stdout))
    return int(float(f"{counts[1] - counts[0]:.1e}"))


def runner(folder: Path, classes: int) -> Callable[[Tensor], tuple[NDArray[np.float32], float]]:
    """Logits of images, one by one, by a library made with -O2, and the median of their times in seconds."""
    call("cc", *STRICT, "-O2", "-shared", "-fPIC", "model.c", "-o", "model.so", folder=folder)
    run = ctypes.CDLL(str(folder / "model.so")).model_run
    pointer = ctypes.POINTER(ctypes.c_float)

    def logits(images: Tensor) -> tuple[NDArray[np.float32], float]:
        pixels = np.ascontiguousarray(images.numpy(), np.float32)
        found = np.empty((len(pixels), classes), np.float32)
        seconds = []
        for image, row in zip(pixels, found, strict=True):
            arguments = image.ctypes.data_as(pointer), row.ctypes.data_as(pointer)
            start = time.perf_counter()
            run(*arguments)
            seconds.append(time.perf_counter() - start)
        return found, float(np.median(seconds))

    return logits


def agreement(
    model: nn.Module, logits: Callable[[Tensor], tuple[NDArray[np.float32], float]], images: Tensor
) -> dict[str, Any]:
    with torch.no_grad():
        expected = torch.cat([model(images[at : at + 500]) for at in range(0, len(images), 500)]).numpy()
    found, seconds = logits(images)
    return {
        "images": len(images),
        "same_top1": int((found.argmax(1) == expected.argmax(1)).sum()),
        "max_difference": float(np.abs(found - expected).max()),
        "max_logit": float(np.abs(expected).max()),
        "median_seconds": seconds,
    }


def of_file(path: Path, test: Images, classes: int, eps: float, attacked: int, tools: set[str]) -> dict[str, Any]:
    loaded = artifact.open(path)
    model, factors = loaded.model, loaded.factors
    start = time.perf_counter()
    made = model_to_c(model, factors=factors)
    seconds = time.perf_counter() - start
    images = test.float_pixels(slice(None))
    some = test.take(slice(0, attacked))
    row: dict[str, Any] = {
        "file": str(path.resolve().relative_to(ROOT)),
        "file_bytes": path.stat().st_size,
        "table_bytes": made.table_bytes,
        "tables_over_file": made.table_bytes / path.stat().st_size,
        "arena_bytes": made.arena_bytes,
        "seconds_to_generate": seconds,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(made, folder)
        call("cc", *STRICT, "-O2", "model.c", "model_test.c", "-o", "model_test", folder=folder)
        row["generated_test"] = call("./model_test", folder=folder).strip()
        row["x86_64"] = sections(["cc"], folder)
        if "arm-none-eabi-gcc" in tools:
            row["cortex_m4"] = sections(["arm-none-eabi-gcc", *CORTEX_M4], folder)
        if "qemu-system-arm" in tools and made.table_bytes < 100_000 and made.arena_bytes < 100_000:
            row["cortex_m4"]["instructions"] = instructions(folder)
        logits = runner(folder, classes)
        row["clean"] = agreement(model, logits, images)
        adversarial = pgd(model, some.float_pixels(slice(None)), some.labels, Linf(eps), steps=STEPS, step_size=eps / 8)
        row["adversarial"] = agreement(model, logits, adversarial)
    return row


def machine() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Sizes and agreement of the C sources of committed files.")
    parser.add_argument("files", nargs="*", type=lambda text: Path(text).resolve(), help="all, if there are none")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "deploy")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tools = {tool for tool in ("cc", "arm-none-eabi-gcc", "qemu-system-arm") if shutil.which(tool)}
    compilers = {tool: call(tool, "--version", folder=ROOT).splitlines()[0] for tool in sorted(tools)}
    saved = arguments.out / "c_sizes.json"
    rows = {row["file"]: row for row in json.loads(saved.read_text())["files"]} if arguments.files else {}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for data, pattern, eps, limit, attacked in JOBS:
        paths = [path for path in sorted(ROOT.glob(pattern)) if not arguments.files or path in arguments.files]
        loaded = load_data(str(arguments.data / data)) if paths else None
        for path in paths:
            assert loaded is not None
            row = of_file(path, loaded.test.take(slice(0, limit)), loaded.num_classes, eps, attacked, tools)
            rows[row["file"]] = row
            print(json.dumps(row), flush=True)
            report = {"machine": machine(), "compilers": compilers, "files": list(rows.values())}
            saved.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
