"""`Engine`: a model file on the CPU, at the cost of its nonzeros, and never slower than a dense engine."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from atmc.deploy.engine.sparse import SparseNetwork
from atmc.deploy.graph.graph import Graph
from atmc.deploy.graph.simplify import simplify
from atmc.pack import artifact

Floats = NDArray[np.float32]
Network = Callable[[Floats], Floats]
SURE = 0.25  # a network with at most this share of its multiply-adds left is not compared with a dense engine
LARGE = 16  # images: the second batch size at which the two are compared


@dataclass(frozen=True, eq=False)
class Choice:
    """One way to run the network. name: "sparse (native, avx512), 1 thread"."""

    name: str
    run: Network


class Engine:
    """Logits of a compressed network, by the sparse kernel or, where that is faster, a dense engine.

    Args:
        source: a model file, a module, or a simplified graph.
        threads: how many may run one batch together, all of the machine's by default; one where that is faster.
        prefer: ``sparse`` or ``dense`` for one of them; ``auto`` measures both for networks with few zeros.
        factory: builds the model of a file that holds a user's own class, called with num_classes=....
        input_shape: (c, h, w) of the images, where neither file nor module knows it.

    Raises:
        ArtifactError: not a model file, or a damaged one.
        ValueError: an operator that the engine cannot run, by name.

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
            raise ValueError(f"unknown prefer {prefer!r}: expected auto, sparse or dense")
        self.threads = threads if threads is not None else os.cpu_count() or 1
        if not 1 <= self.threads <= 1024:
            raise ValueError(f"expected threads from 1 to 1024, got {threads}")
        self.graph = _graph_of(source, factory, input_shape)
        self._lock = threading.Lock()
        self._zeros = np.zeros(0, np.float32)
        self._small, self._large = self._chosen(prefer)

    def __call__(self, images: Floats) -> Floats:
        """Logits (n, classes), float32, of images (n, c, h, w), float32 in [0, 1]; n may be 0.

        Raises:
            ValueError: another shape or type, or a value that is not finite.
        """
        images = self._checked(images)
        with self._lock:
            return (self._small if len(images) < LARGE else self._large).run(images)

    def describe(self) -> str:
        """What runs: "sparse (native, avx512), 1 thread"; both where small batches go elsewhere than large ones."""
        small, large = self._small.name, self._large.name
        return small if small == large else f"{small} below {LARGE} images, else {large}"

    def _chosen(self, prefer: str) -> tuple[Choice, Choice]:
        """For small and for large batches: the fastest there, of those that may win."""
        rivals = []
        if prefer != "dense":
            for threads in sorted({1, self.threads}):
                network = SparseNetwork(self.graph, threads=threads)
                rivals.append(Choice(f"sparse ({network.kernel}), {_counted(threads)}", network))
        if prefer == "dense" or (prefer == "auto" and self.graph.macs() > SURE * self.graph.macs(dense=True)):
            from atmc.deploy.engine.dense import best_dense

            name, run = best_dense(self.graph, self.threads)
            rivals.append(Choice(f"dense ({name}), {_counted(self.threads)}", run))
        if len(rivals) == 1:
            return rivals[0], rivals[0]
        few, many = (np.zeros((batch, *self.graph.input_shape), np.float32) for batch in (1, LARGE))
        return min(rivals, key=lambda r: seconds(r.run, few)), min(rivals, key=lambda r: seconds(r.run, many))

    def _checked(self, images: Floats) -> Floats:
        if not isinstance(images, np.ndarray) or images.dtype != np.float32:
            kind = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
            raise ValueError(f"expected images as a numpy array of float32 in [0, 1], got {kind}")
        if images.ndim != 4 or images.shape[1:] != self.graph.input_shape:
            expected = ", ".join(map(str, self.graph.input_shape))
            raise ValueError(f"expected images of shape (n, {expected}), got {images.shape}")
        images = np.ascontiguousarray(images)
        zeros = self._zeros
        if zeros.size != images.size:
            self._zeros = zeros = np.zeros(images.size, np.float32)
        if np.vdot(images, zeros) != 0:  # nan, of nan or of infinity times 0
            raise ValueError("expected finite images, got nan or infinity")
        return images


def seconds(network: Network, images: Floats) -> float:
    """Median of a few calls, after one that does not count."""
    network(images)
    found = []
    for _ in range(5):
        begin = time.perf_counter()
        network(images)
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def _graph_of(
    source: str | os.PathLike[str] | nn.Module | Graph,
    factory: Callable[..., nn.Module] | None,
    input_shape: tuple[int, int, int] | None,
) -> Graph:
    if isinstance(source, Graph):
        return source
    if isinstance(source, nn.Module):
        return simplify(source, input_shape)
    loaded = artifact.open(source, factory=factory)
    return simplify(loaded.model, input_shape or loaded.input_shape, loaded.factors)


def _counted(threads: int) -> str:
    return f"{threads} thread" + "s" * (threads > 1)
