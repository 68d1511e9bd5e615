"""The sparse engine: a compressed network on the CPU, at a cost that its nonzeros decide.

`steps` fuses and lays out, `program` makes numbers of it, and the kernel runs them: `compiled`
with the package, or where there was no compiler `fallback`, in Numba.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from atmc.deploy.engine import native
from atmc.deploy.engine.program import Program, program_of
from atmc.deploy.engine.steps import steps_of
from atmc.deploy.graph.graph import Graph

Floats = NDArray[np.float32]
CHUNK_FLOATS = 1 << 20  # of memory for activations: about what stays in a core's own cache
MOST_IMAGES = 64
FOUR_COST = {"native, avx512": 2.0, "native, avx2": 3.0}  # see `steps.in_fours`; measured on dense ResNet-18


class Team(Protocol):
    """What runs programs."""

    def bind(self, program: Program, arena: Floats, images: Floats, logits: Floats) -> Callable[[], None]:
        """What writes the logits (n, classes) of images (n, c, h, w) whenever it is called."""


class SparseNetwork:
    """A graph, ready to run on a kernel; not to be called from two threads at once.

    A batch is run in chunks whose activations fit a core's cache. Several threads share the work of each operation
    or, where there are chunks enough, take whole chunks.

    Args:
        threads: how many run it together.
        kernel: ``native`` or ``numba``; None for native where it was built.
        instructions: of `compiled.instruction_sets()`; None for the fastest. Ignored by ``numba``.

    Raises:
        ValueError: the graph cannot be run, or there is no such kernel, or less than one thread.
    """

    def __init__(
        self, graph: Graph, *, threads: int = 1, kernel: str | None = None, instructions: str | None = None
    ) -> None:
        team, self.kernel = _team(threads, kernel, instructions)
        self.threads = threads
        self._steps = steps_of(graph, four_cost=FOUR_COST.get(self.kernel, math.inf))
        self.classes = self._steps.shapes[self._steps.steps[-1].output][0]
        one = program_of(self._steps, 1).arena_floats
        self.chunk = max(1, min(MOST_IMAGES, CHUNK_FLOATS // one))
        self._programs: dict[int, Program] = {}
        self._single: tuple[Floats, Floats, Callable[[], None]] | None = None
        self._together = _Worker(team)
        alone = [_team(1, kernel, instructions)[0] for _ in range(threads)] if threads > 1 else []
        self._apart = [_Worker(team) for team in alone]
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    @property
    def arena_bytes(self) -> int:
        """Memory of activations, as far as batches have asked for it."""
        return sum(4 * len(worker.arena) for worker in (self._together, *self._apart))

    def program(self, batch: int) -> Program:
        """The program for so many images at once."""
        if batch not in self._programs:
            if len(self._programs) >= 4:  # a caller whose batches are never the same
                del self._programs[next(iter(self._programs))]
            self._programs[batch] = program_of(self._steps, batch)
        return self._programs[batch]

    def __call__(self, images: Floats) -> Floats:
        """Logits (n, classes) of images (n, c, h, w), contiguous float32 of the graph's shape; n may be 0."""
        if len(images) == 1:
            return self._of_one(images)
        logits = np.empty((len(images), self.classes), np.float32)
        cuts = [slice(at, at + self.chunk) for at in range(0, len(images), self.chunk)]
        parts = [(self.program(len(images[cut])), images[cut], logits[cut]) for cut in cuts]
        if self._pool is None or len(parts) < 2 * self.threads:
            self._together.run(parts)
        else:
            shares = [parts[index :: self.threads] for index in range(self.threads)]
            list(self._pool.map(_Worker.run, self._apart, shares))
        return logits

    def _of_one(self, image: Floats) -> Floats:
        """Through arrays that the kernel knows already."""
        if self._single is None:
            known, logits = np.empty_like(image), np.empty((1, self.classes), np.float32)
            self._single = known, logits, self._together.bind(self.program(1), known, logits)
        known, logits, call = self._single
        np.copyto(known, image)
        call()
        return logits.copy()


class _Worker:
    """A team and the memory that it runs programs in."""

    def __init__(self, team: Team) -> None:
        self.team, self.arena = team, aligned(0)

    def bind(self, program: Program, images: Floats, logits: Floats) -> Callable[[], None]:
        if len(self.arena) < program.arena_floats:
            self.arena = aligned(program.arena_floats)
        return self.team.bind(program, self.arena, images, logits)

    def run(self, parts: Sequence[tuple[Program, Floats, Floats]]) -> None:
        for part in parts:
            self.bind(*part)()


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
        from atmc.deploy.engine.numba_kernel import NumbaTeam

        return NumbaTeam(threads), "numba"
    raise ValueError(f"unknown kernel {kernel!r}: expected native or numba")


def aligned(floats: int) -> Floats:
    """Zeros, float32, that begin at a multiple of 64 bytes."""
    memory = np.zeros(floats + 16, np.float32)
    skip = (-memory.ctypes.data % 64) // 4
    return memory[skip : skip + floats]
