"""Measure the C sources of committed model files: sizes, times, and how their logits differ from PyTorch's.

    python benchmarks/c_sizes.py [FILE.atmc ...] --data ../shared/data --out results/deploy

Writes c_sizes.json; `atmc table --page results/deploy/c_sizes.md` makes the table of it. If files are named, the other
rows stay as they are. The script needs cc; the figures of the Cortex-M4 need arm-none-eabi-gcc, the instructions also
newlib (Debian: gcc-arm-none-eabi, libnewlib-arm-none-eabi) and qemu-system-arm; without a tool its figures are absent.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
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

from atmc.commands.bench.figures import processor_name
from atmc.data import Images, load_data
from atmc.deploy.export.c.model import model_to_c
from atmc.deploy.export.c.source import CSource
from atmc.pack import artifact
from atmc.robust.attacks import pgd
from atmc.robust.threats import Linf

TimedRun = Callable[[Tensor], tuple[NDArray[np.float32], float]]  # images -> logits, median seconds per image
ROOT = Path(__file__).parents[1]
STRICT = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror"]
CORTEX_M4 = ["-mcpu=cortex-m4", "-mthumb", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard"]
PGD_STEPS = 20  # each of size eps / 8
CIFAR_IMAGES = 100
JOBS: tuple[tuple[str, str, float, int | None, int], ...] = (  # data, files, eps, clean images, attacked images
    ("mnist", "results/mnist-adversarial/*/model.atmc", 76 / 255, None, 500),
    ("cifar10-jpeg", "results/cifar10/brief-*/model.atmc", 8 / 255, CIFAR_IMAGES, CIFAR_IMAGES),
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
static volatile int label;
int main(void)
{
    int i;
    for (i = 0; i < TIMES; i++)
        label = model_classify(image);
    return 0;
}
"""


def call(*command: str | Path, folder: Path) -> str:
    """Run a command and return what it prints. Raises RuntimeError with the command's messages if it fails."""
    done = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {(done.stderr + done.stdout)[:2000]}")
    return done.stdout


def write_source(source: CSource, folder: Path) -> None:
    """Write the three files of a C source into a folder."""
    for end, text in ((".h", source.header), (".c", source.source), ("_test.c", source.test_source)):
        (folder / f"{source.name}{end}").write_text(text)


def measure_sections(compiler: Sequence[str], folder: Path) -> dict[str, int]:
    """Return bytes of flash (code, constants, initialized data), of static memory, and of all stack frames together."""
    call(*compiler, *STRICT, "-Os", "-fstack-usage", "-c", "model.c", "-o", "sized.o", folder=folder)
    text, data, bss = map(int, call("size", "sized.o", folder=folder).splitlines()[1].split()[:3])
    frames = [int(line.split("\t")[1]) for line in (folder / "sized.su").read_text().splitlines()]
    return {"flash": text + data, "static": data + bss, "stack_at_most": sum(frames)}


def count_instructions(folder: Path) -> int:
    """Return the instructions per image on an emulated Cortex-M4 (two digits); the generated test must pass there."""
    (folder / "startup.c").write_text(STARTUP)
    (folder / "count.c").write_text(COUNT)
    link = ["arm-none-eabi-gcc", *CORTEX_M4, "-Os", "--specs=rdimon.specs", "-Wl,--section-start=.vectors=0"]
    run = ["qemu-system-arm", "-M", "mps2-an386", "-nographic", "-semihosting", "-kernel"]
    call(*link, "startup.c", "model.c", "model_test.c", "-o", "model_test.elf", folder=folder)
    assert call(*run, "model_test.elf", folder=folder).startswith("ok")
    counts = []
    for times in (1, 2):
        call(*link, f"-DTIMES={times}", "startup.c", "model.c", "count.c", "-o", "count.elf", folder=folder)
        trace = ["-singlestep", "-d", "exec,nochain", "-D", "/dev/stdout"]  # one line per instruction
        with subprocess.Popen([*run, "count.elf", *trace], cwd=folder, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            counts.append(sum(line.startswith(b"Trace") for line in process.stdout))
    return int(float(f"{counts[1] - counts[0]:.1e}"))


def compile_library(folder: Path, classes: int) -> TimedRun:
    """Compile the source with -O2 and return a function that runs it, image by image."""
    call("cc", *STRICT, "-O2", "-shared", "-fPIC", "model.c", "-o", "model.so", folder=folder)
    run = ctypes.CDLL(str(folder / "model.so")).model_run
    pointer = ctypes.POINTER(ctypes.c_float)

    def run_timed(images: Tensor) -> tuple[NDArray[np.float32], float]:
        pixels = np.ascontiguousarray(images.numpy(), np.float32)
        rows = np.empty((len(pixels), classes), np.float32)
        seconds = []
        for image, row in zip(pixels, rows, strict=True):
            arguments = image.ctypes.data_as(pointer), row.ctypes.data_as(pointer)
            start = time.perf_counter()
            run(*arguments)
            seconds.append(time.perf_counter() - start)
        return rows, float(np.median(seconds))

    return run_timed


def compare(model: nn.Module, run_timed: TimedRun, images: Tensor) -> dict[str, Any]:
    """Return how the logits of a C source differ from the model's, and its median time per image."""
    with torch.no_grad():
        expected = torch.cat([model(images[at : at + 500]) for at in range(0, len(images), 500)]).numpy()
    logits, seconds = run_timed(images)
    return {
        "images": len(images),
        "same_top1": int((logits.argmax(1) == expected.argmax(1)).sum()),
        "max_difference": float(np.abs(logits - expected).max()),
        "max_logit": float(np.abs(expected).max()),
        "median_seconds": seconds,
    }


def measure(path: Path, test: Images, classes: int, eps: float, attacked: int, tools: set[str]) -> dict[str, Any]:
    """Return the row of a model file; attacked: how many of the test images are attacked with budget eps."""
    loaded = artifact.open(path)
    model, factors = loaded.model, loaded.factors
    start = time.perf_counter()
    source = model_to_c(model, factors=factors)
    seconds = time.perf_counter() - start
    images = test.float_pixels(slice(None))
    first = test.take(slice(0, attacked))
    row: dict[str, Any] = {
        "file": str(path.resolve().relative_to(ROOT)),
        "file_bytes": path.stat().st_size,
        "table_bytes": source.table_bytes,
        "tables_over_file": source.table_bytes / path.stat().st_size,
        "arena_bytes": source.arena_bytes,
        "seconds_to_generate": seconds,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_source(source, folder)
        call("cc", *STRICT, "-O2", "model.c", "model_test.c", "-o", "model_test", folder=folder)
        row["generated_test"] = call("./model_test", folder=folder).strip()
        row["x86_64"] = measure_sections(["cc"], folder)
        if "arm-none-eabi-gcc" in tools:
            row["cortex_m4"] = measure_sections(["arm-none-eabi-gcc", *CORTEX_M4], folder)
        if "qemu-system-arm" in tools and source.table_bytes < 100_000 and source.arena_bytes < 100_000:
            row["cortex_m4"]["instructions"] = count_instructions(folder)
        run_timed = compile_library(folder, classes)
        row["clean"] = compare(model, run_timed, images)
        adversarial = pgd(
            model, first.float_pixels(slice(None)), first.labels, Linf(eps), steps=PGD_STEPS, step_size=eps / 8
        )
        row["adversarial"] = compare(model, run_timed, adversarial)
    return row


def describe_machine() -> str:
    """Return the number of cores and the name of the processor."""
    return f"{os.cpu_count()} cores of {processor_name()}"


def main() -> None:
    """Measure the files that were named, or all."""
    parser = argparse.ArgumentParser(description="Sizes and agreement of the C sources of committed files.")
    parser.add_argument("files", nargs="*", type=lambda text: Path(text).resolve(), help="model files; by default all")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "deploy")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tools = {tool for tool in ("cc", "arm-none-eabi-gcc", "qemu-system-arm") if shutil.which(tool)}
    compilers = {tool: call(tool, "--version", folder=ROOT).splitlines()[0] for tool in sorted(tools)}
    saved = arguments.out / "c_sizes.json"
    kept = json.loads(saved.read_text())["files"] if arguments.files and saved.exists() else []
    rows = {row["file"]: row for row in kept}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for data, pattern, eps, limit, attacked in JOBS:
        paths = [path for path in sorted(ROOT.glob(pattern)) if not arguments.files or path in arguments.files]
        loaded = load_data(str(arguments.data / data)) if paths else None
        for path in paths:
            assert loaded is not None
            row = measure(path, loaded.test.take(slice(0, limit)), loaded.num_classes, eps, attacked, tools)
            rows[row["file"]] = row
            print(json.dumps(row), flush=True)
            report = {"machine": describe_machine(), "compilers": compilers, "files": list(rows.values())}
            saved.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
