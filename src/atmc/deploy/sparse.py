"""The sparse engine: a compressed network on the CPU, at a cost that its nonzeros decide.

`steps` fuses and lays out, `program` makes numbers of it, and the kernel runs them: `native`, compiled with the
package, or where there was no compiler `fallback`, in Numba.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from atmc.deploy import native
from atmc.deploy.graph import Graph
from atmc.deploy.program import Program, program_of
from atmc.deploy.steps import steps_of

Floats = NDArray[np.float32]
CHUNK_FLOATS = 1 << 20  # of memory for activations: about what stays in a core's own cache
MOST_IMAGES = 64
FOUR_COST = {"native, avx512": 2.0, "native, avx2": 3.0}  # see `steps.in_fours`; measured on dense ResNet-18


class Team(Protocol):
    """What runs programs."""

    def run(self, program: Program, arena: Floats, images: Floats, logits: Floats) -> None:
        """Write the logits (n, classes) of images (n, c, h, w)."""


class SparseNetwork:
    """A graph, ready to run on a kernel; not to be called from two threads at once.

    Args:
        threads: how many run it together.
        kernel: ``native`` or ``numba``; None for native where it was built.
        instructions: of `native.instruction_sets()`; None for the fastest. Ignored by ``numba``.

    Raises:
        ValueError: the graph cannot be run, or there is no such kernel, or less than one thread.
    """

    def __init__(
        self, graph: Graph, *, threads: int = 1, kernel: str | None = None, instructions: str | None = None
    ) -> None:
        self._team, self.kernel = _team(threads, kernel, instructions)
        self._steps = steps_of(graph, four_cost=FOUR_COST.get(self.kernel, math.inf))
        self._ready: dict[int, tuple[Program, Floats]] = {}
        self.classes = self._steps.shapes[self._steps.steps[-1].output][0]
        one = program_of(self._steps, 1).arena_floats
        self.chunk = max(1, min(MOST_IMAGES, CHUNK_FLOATS // one))

    @property
    def arena_bytes(self) -> int:
        """Memory of all activations, of the batch sizes that have been run."""
        return sum(4 * len(arena) for _, arena in self._ready.values())

    def ready(self, batch: int) -> tuple[Program, Floats]:
        """The program and the memory for so many images at once."""
        if batch not in self._ready:
            if len(self._ready) >= 4:  # a caller whose batches are never the same
                del self._ready[next(iter(self._ready))]
            program = program_of(self._steps, batch)
            self._ready[batch] = program, aligned(program.arena_floats)
        return self._ready[batch]

    def __call__(self, images: Floats) -> Floats:
        """Logits (n, classes) of images (n, c, h, w), contiguous float32 of the graph's shape; n may be 0."""
        logits = np.empty((len(images), self.classes), np.float32)
        for at in range(0, len(images), self.chunk):
            part = images[at : at + self.chunk]
            self._team.run(*self.ready(len(part)), part, logits[at : at + self.chunk])
        return logits


def _team(threads: int, kernel: str | None, instructions: str | None) -> tuple[Team, str]:
    sets = native.instruction_sets()
    if threads < 1:
        raise ValueError(f"expected at least one thread, got {threads}")
    kernel = kernel or ("native" if sets else "numba")
    if kernel == "native":
        if not sets:
            raise ValueError("the native kernel was not built: there was no C++ compiler when atmc was installed")
        if instructions is not None and instructions not in sets:
            raise ValueError(f"no instructions {instructions!r} on this machine: expected one of {', '.join(sets)}")
        return native.NativeTeam(threads, instructions or sets[0]), f"native, {instructions or sets[0]}"
    if kernel == "numba":
        from atmc.deploy.fallback import NumbaTeam

        return NumbaTeam(threads), "numba"
    raise ValueError(f"unknown kernel {kernel!r}: expected native or numba")


def aligned(floats: int) -> Floats:
    """Zeros, float32, that begin at a multiple of 64 bytes."""
    memory = np.zeros(floats + 16, np.float32)
    skip = (-memory.ctypes.data % 64) // 4
    return memory[skip : skip + floats]
