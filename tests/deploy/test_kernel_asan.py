"""The kernel under AddressSanitizer and UndefinedBehaviorSanitizer, in memory of exactly the size that it asks for."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from compilers import find_compiler
from networks import EXTREMES, distance, images_of, logits_of, random_graph

from atmc.deploy.engine import native
from atmc.deploy.engine.program import NONZERO, OP, Program, build_program
from atmc.deploy.engine.steps import lower
from atmc.deploy.graph.graph import Graph

TESTS = Path(__file__).parents[1]
OPTIONS = ["-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread"]


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("driver") / "driver"
    sources = [f"-I{Path(native.__file__).parent / 'native'}", str(TESTS / "kernel_driver.cpp")]
    built = subprocess.run([find_compiler("C++"), *OPTIONS, *sources, "-o", str(path)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return path


def write(program: Program, images: np.ndarray, path: Path) -> None:
    assert (program.ops.dtype, program.nonzeros.dtype) == (OP, NONZERO)
    tables = program.ops, program.nonzeros, program.starts, program.floats, program.masks, images
    lengths = [*(table.size for table in tables), program.arena_floats, program.batch * program.classes]
    path.write_bytes(np.array(lengths, np.int64).tobytes() + b"".join(table.tobytes() for table in tables))


def networks() -> list[Graph]:
    return [*EXTREMES.values(), *(random_graph(seed) for seed in range(30))]


def run(driver: Path, folder: Path, four_cost: float) -> None:
    """Run every network on every instruction set; any message of the sanitizers is an error."""
    expected, files = [], []
    for index, graph in enumerate(networks()):
        for n in (1, 3):
            images = images_of(graph, n)
            files.append(folder / f"{index}-{n}")
            write(build_program(lower(graph, four_cost=four_cost), n), images, files[-1])
            expected.append(logits_of(graph, images))
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    command = [str(driver), str(folder / "logits"), *map(str, files)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert ended.returncode == 0, ended.stderr[:5000]
    written = np.fromfile(folder / "logits", np.float32)
    runs = len(written) // sum(logits.size for logits in expected)
    assert runs >= 2
    for logits in expected:
        results, written = np.split(written, [runs * logits.size])
        for result in results.reshape(runs, *logits.shape):
            assert distance(result, logits) < 1e-5
    assert not len(written)


@pytest.mark.parametrize("four_cost", [4.0, 0.0])
def test_no_access_is_out_of_bounds(driver, tmp_path, four_cost):
    run(driver, tmp_path, four_cost)
