"""The sparse engine: a compressed network on the CPU, with work in proportion to its nonzeros.

`steps` fuses operations and lays out activations, `program` turns the steps into records for one batch size, and a
kernel runs these: `native`, compiled with the package, or `numba_kernel` if there was no compiler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from atmc.core.errors import unknown
from atmc.deploy.engine import native
from atmc.deploy.engine.program import Program, build_program
from atmc.deploy.engine.steps import lower
from atmc.deploy.graph.graph import FloatArray, Graph

CHUNK_FLOATS = 1 << 20  # floats of activations per chunk: about the size of a core's own cache
MAX_CHUNK = 64  # images per chunk
FOUR_COST = {"native, avx512": 2.0, "native, avx2": 3.0}  # see `steps.lower`; measured on a dense ResNet-18


class Kernel(Protocol):
    """Code that runs programs, on a number of threads."""

    def bind(self, program: Program, arena: FloatArray, images: FloatArray, logits: FloatArray) -> Callable[[], None]:
        """Return a function that writes the logits (n, classes) of images (n, c, h, w) each time it is called."""


class SparseNetwork:
    """A graph that is ready to run on a kernel; two threads must not call it at the same time.

    A batch is run in chunks whose activations fit a core's cache. Several threads share the work of each operation
    or, if there are enough chunks, take whole chunks.

    Args:
        graph: a network that ends in (n, classes).
        threads: number of threads that run it together.
        kernel: ``native`` or ``numba``; by default native if it was built.
        instructions: one of `native.instruction_sets()`, by default the fastest. ``numba`` ignores it.

    Raises:
        ValueError: the graph cannot be run, there is no such kernel, or threads is less than one.
    """

    def __init__(
        self, graph: Graph, *, threads: int = 1, kernel: str | None = None, instructions: str | None = None
    ) -> None:
        shared, self.kernel_name = open_kernel(threads, kernel, instructions)
        self.threads = threads
        self._network = lower(graph, four_cost=FOUR_COST.get(self.kernel_name, math.inf))
        self.classes = self._network.shapes[self._network.steps[-1].output][0]
        floats_per_image = build_program(self._network, 1).arena_floats
        self.chunk = max(1, min(MAX_CHUNK, CHUNK_FLOATS // floats_per_image))
        self._programs: dict[int, Program] = {}
        self._one_image: tuple[FloatArray, FloatArray, Callable[[], None]] | None = None
        self._shared_worker = _Worker(shared)
        single = [open_kernel(1, kernel, instructions)[0] for _ in range(threads)] if threads > 1 else []
        self._chunk_workers = [_Worker(one) for one in single]
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def program(self, batch: int) -> Program:
        """Return the program for a number of images at once; the last few are kept."""
        if batch not in self._programs:
            if len(self._programs) >= 4:  # a caller may give a new batch size each time
                del self._programs[next(iter(self._programs))]
            self._programs[batch] = build_program(self._network, batch)
        return self._programs[batch]

    def __call__(self, images: FloatArray) -> FloatArray:
        """Return the logits (n, classes) of images (n, c, h, w), contiguous float32; n may be 0."""
        if len(images) == 1:
            return self._run_one(images)
        logits = np.empty((len(images), self.classes), np.float32)
        slices = [slice(start, start + self.chunk) for start in range(0, len(images), self.chunk)]
        chunks = [(self.program(len(images[part])), images[part], logits[part]) for part in slices]
        if self._pool is None or len(chunks) < 2 * self.threads:
            self._shared_worker.run(chunks)
        else:
            shares = [chunks[index :: self.threads] for index in range(self.threads)]
            list(self._pool.map(_Worker.run, self._chunk_workers, shares))
        return logits

    def _run_one(self, image: FloatArray) -> FloatArray:
        """Run one image through arrays that are bound once, since binding takes as long as a small network."""
        if self._one_image is None:
            bound, logits = np.empty_like(image), np.empty((1, self.classes), np.float32)
            self._one_image = bound, logits, self._shared_worker.bind(self.program(1), bound, logits)
        bound, logits, call = self._one_image
        np.copyto(bound, image)
        call()
        return logits.copy()


class _Worker:
    """A kernel with the arena in which it runs programs; the arena grows to that of the largest program."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.arena = kernel, allocate_aligned(0)

    def bind(self, program: Program, images: FloatArray, logits: FloatArray) -> Callable[[], None]:
        """Return a function that runs a program on these arrays, see `Kernel.bind`."""
        if len(self.arena) < program.arena_floats:
            self.arena = allocate_aligned(program.arena_floats)
        return self.kernel.bind(program, self.arena, images, logits)

    def run(self, chunks: Sequence[tuple[Program, FloatArray, FloatArray]]) -> None:
        """Run chunks of a batch, each as (program, images, logits)."""
        for chunk in chunks:
            self.bind(*chunk)()


def open_kernel(threads: int = 1, kernel: str | None = None, instructions: str | None = None) -> tuple[Kernel, str]:
    """Return a kernel and its name, such as "native, avx512"; arguments and errors as of `SparseNetwork`."""
    sets = native.instruction_sets()
    if threads < 1:
        raise ValueError(f"expected at least one thread, got {threads}")
    kernel = kernel or ("native" if sets else "numba")
    if kernel == "native":
        if not sets:
            raise ValueError("the native kernel was not built: there was no C++ compiler when atmc was installed")
        if instructions is not None and instructions not in sets:
            raise unknown("instruction set", instructions, sets)
        return native.NativeKernel(threads, instructions or sets[0]), f"native, {instructions or sets[0]}"
    if kernel == "numba":
        from atmc.deploy.engine.numba_kernel import NumbaKernel

        return NumbaKernel(), "numba"
    raise unknown("kernel", kernel, ("native", "numba"), expected="native or numba")


def allocate_aligned(floats: int) -> FloatArray:
    """Allocate zeros, float32, that begin at a multiple of 64 bytes."""
    memory = np.zeros(floats + 16, np.float32)
    skip = (-memory.ctypes.data % 64) // 4
    return memory[skip : skip + floats]
