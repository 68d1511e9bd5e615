"""`Engine`: a model file on the CPU, with work in proportion to its nonzeros, or a dense engine if that is faster."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import nn

from atmc.core.errors import unknown
from atmc.deploy.engine.sparse import SparseNetwork
from atmc.deploy.graph.graph import FloatArray, Graph, LogitsFunction
from atmc.deploy.graph.simplify import simplify
from atmc.deploy.graph.trace import UnsupportedModel
from atmc.pack import artifact

SPARSE_ENOUGH = 0.25  # a network with at most this part of its multiply-adds left is not compared with a dense engine
LARGE_BATCH = 16  # images: the second batch size at which candidates are compared


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to run the network; name: such as "sparse (native, avx512), 1 thread"."""

    name: str
    run: LogitsFunction


class Engine:
    """Logits of a compressed network, by the sparse kernel or by a dense engine, whichever is faster.

    Args:
        source: a model file, a module, or a simplified graph.
        threads: how many threads may run one batch together, by default all of the machine's; one is used if that is
            faster.
        prefer: ``sparse`` or ``dense`` to use that one; ``auto`` measures both if the network has few zeros.
        factory: builds the model of a file that holds a user's own class, called with num_classes=....
        input_shape: (c, h, w) of the images, if neither file nor module says it.

    Raises:
        ArtifactError: the file is no model file, or is damaged.
        ValueError: the network has an operator that the engine cannot run, or an argument is wrong.

    >>> from atmc import models
    >>> engine = Engine(models.build("lenet", 10, seed=0), threads=1, prefer="sparse")
    >>> engine(np.zeros((2, 1, 28, 28), np.float32)).shape
    (2, 10)
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | nn.Module | Graph,
        *,
        threads: int | None = None,
        prefer: Literal["auto", "sparse", "dense"] = "auto",
        factory: Callable[..., nn.Module] | None = None,
        input_shape: tuple[int, int, int] | None = None,
    ) -> None:
        if prefer not in ("auto", "sparse", "dense"):
            raise unknown("prefer", prefer, ("auto", "sparse", "dense"), expected="auto, sparse or dense")
        self.threads = threads if threads is not None else os.cpu_count() or 1
        if not 1 <= self.threads <= 1024:
            raise ValueError(f"expected threads from 1 to 1024, got {threads}")
        self.graph = _load_graph(source, factory, input_shape)
        self._lock = threading.Lock()
        self._zeros = np.zeros(0, np.float32)
        self._for_small, self._for_large = self._choose(prefer)

    def __call__(self, images: FloatArray) -> FloatArray:
        """Return the logits (n, classes), float32, of images (n, c, h, w), float32 in [0, 1]; n may be 0.

        Raises:
            ValueError: the images have another shape or type, or a value that is not finite.
        """
        images = self._check(images)
        with self._lock:
            return (self._for_small if len(images) < LARGE_BATCH else self._for_large).run(images)

    def describe(self) -> str:
        """Return what runs, "sparse (native, avx512), 1 thread"; both names if it differs by batch size."""
        small, large = self._for_small.name, self._for_large.name
        return small if small == large else f"{small} below {LARGE_BATCH} images, else {large}"

    def _choose(self, prefer: str) -> tuple[Candidate, Candidate]:
        """Return the fastest candidate for small and for large batches; a single one is not timed."""
        candidates = []
        if prefer != "dense":
            for threads in sorted({1, self.threads}):
                network = SparseNetwork(self.graph, threads=threads)
                candidates.append(Candidate(f"sparse ({network.kernel_name}), {format_threads(threads)}", network))
        may_be_faster = self.graph.macs() > SPARSE_ENOUGH * self.graph.macs(dense=True)
        if prefer == "dense" or (prefer == "auto" and may_be_faster):
            from atmc.deploy.engine.dense import open_fastest

            name, run = open_fastest(self.graph, self.threads)
            candidates.append(Candidate(f"dense ({name}), {format_threads(self.threads)}", run))
        if len(candidates) == 1:
            return candidates[0], candidates[0]
        small, large = (
            min(candidates, key=lambda candidate: time_call(candidate.run, images))
            for images in (np.zeros((n, *self.graph.input_shape), np.float32) for n in (1, LARGE_BATCH))
        )
        return small, large

    def _check(self, images: FloatArray) -> FloatArray:
        """Return the images, contiguous. Raises ValueError if they are not what the network takes."""
        if not isinstance(images, np.ndarray) or images.dtype != np.float32:
            kind = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
            raise ValueError(f"expected images as a numpy array of float32 in [0, 1], got {kind}")
        if images.ndim != 4 or images.shape[1:] != self.graph.input_shape:
            expected = ", ".join(map(str, self.graph.input_shape))
            raise ValueError(f"expected images of shape (n, {expected}), got {images.shape}")
        images = np.ascontiguousarray(images)
        zeros = self._zeros  # one array, also if another thread replaces the attribute
        if zeros.size != images.size:
            self._zeros = zeros = np.zeros(images.size, np.float32)
        if np.vdot(images, zeros) != 0:  # nan times 0 and infinity times 0 are nan, which differs from 0
            raise ValueError("expected finite images, got nan or infinity")
        return images


def time_call(run: LogitsFunction, images: FloatArray) -> float:
    """Return the median time of five calls in seconds, after one that is not counted."""
    run(images)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _load_graph(
    source: str | os.PathLike[str] | nn.Module | Graph,
    factory: Callable[..., nn.Module] | None,
    input_shape: tuple[int, int, int] | None,
) -> Graph:
    if isinstance(source, Graph):
        return source
    try:
        if isinstance(source, nn.Module):
            return simplify(source, input_shape)
        loaded = artifact.open(source, factory=factory)
        return simplify(loaded.model, input_shape or loaded.input_shape, loaded.factors)
    except UnsupportedModel as error:
        raise ValueError(f"the engine cannot run the model: {error}") from None


def format_threads(count: int) -> str:
    """Return a number of threads in words, "2 threads"."""
    return f"{count} thread{'s' * (count > 1)}"
