"""`Engine`: a model file on the CPU, with work in proportion to its nonzeros, or a dense engine if that is faster."""

from __future__ import annotations

import ctypes
import math
import os
import statistics
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import nn

from atmc.core.arguments import PIXEL_SLACK, Bounds, parse_whole
from atmc.core.errors import unknown
from atmc.deploy.engine.sparse import SparseNetwork
from atmc.deploy.graph.graph import FloatArray, Graph, LogitsFunction
from atmc.deploy.graph.simplify import simplify
from atmc.deploy.graph.trace import UnsupportedModel
from atmc.pack import artifact

SPARSE_ENOUGH = 0.25  # a network with at most this part of its multiply-adds left is not compared with a dense engine
LARGE_BATCH = 16  # images: the second batch size at which candidates are compared


ONE_BITS = int(np.float32(1).view(np.uint32))
THREADS = Bounds(low=1, high=1024)
Kind = tuple[Literal["sparse", "dense"], int]  # and the number of threads


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to run the network.

    Args:
        name: such as "sparse (native, avx512), 1 thread".
        kind: what it is opened by.
        run: images (n, c, h, w) -> logits.
    """

    name: str
    kind: Kind
    run: LogitsFunction


class Engine:
    """Logits of a compressed network, by the sparse kernel or by a dense engine, whichever is faster.

    It may be called from several threads, one of which it serves at a time. It can be copied, pickled and used in
    processes that were forked after it was made; there it starts its threads again.

    Args:
        source: a model file, a module, or a simplified graph.
        threads: how many threads may run one batch together, by default all of the machine's; one is used if that is
            faster.
        prefer: ``sparse`` or ``dense`` to use that one; ``auto`` measures both if the network has few zeros.
        factory: builds the model of a file that holds a user's own class, called with num_classes=....
        input_shape: (c, h, w) of the images, if neither file nor module says it.
        check_range: refuse images with values outside [0, 1] by more than 1e-5, and clip the others; if False, only
            values that are not finite are refused.

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
        check_range: bool = True,
    ) -> None:
        if prefer not in ("auto", "sparse", "dense"):
            raise unknown("prefer", prefer, ("auto", "sparse", "dense"), expected="auto, sparse or dense")
        self.threads = parse_whole("threads", os.cpu_count() or 1 if threads is None else threads, THREADS)
        self.graph = _load_graph(source, factory, input_shape)
        self._check_range = check_range
        self._for_small, self._for_large = self._choose(prefer)
        self._prepare_calls()

    def _prepare_calls(self) -> None:
        """Make what belongs to this process."""
        self._lock, self._left_by_fork = threading.Lock(), False
        self._zeros = np.zeros(0, np.float32)
        _ENGINES.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return the graph and what was chosen, as plain data."""
        chosen = (self._for_small.kind, self._for_large.kind)
        return {"threads": self.threads, "graph": self.graph, "check_range": self._check_range, "chosen": chosen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start the kernels again, without measuring them."""
        self.threads, self.graph, self._check_range = state["threads"], state["graph"], state["check_range"]
        self._reopen(*state["chosen"])
        self._prepare_calls()

    def _reopen(self, small: Kind, large: Kind) -> None:
        """Open the candidates of these kinds."""
        self._for_small = self._open(small)
        self._for_large = self._for_small if large == small else self._open(large)

    def __call__(self, images: FloatArray) -> FloatArray:
        """Return the logits (n, classes), float32, of images (n, c, h, w), float32 in [0, 1]; n may be 0.

        Raises:
            ValueError: the images have another shape or type, or a value that is not finite.
        """
        images = self._check(images)
        with self._lock:
            if self._left_by_fork:
                self._reopen(self._for_small.kind, self._for_large.kind)
                self._left_by_fork = False
            return (self._for_small if len(images) < LARGE_BATCH else self._for_large).run(images)

    def describe(self) -> str:
        """Return what runs, "sparse (native, avx512), 1 thread"; both names if it differs by batch size."""
        small, large = self._for_small.name, self._for_large.name
        return small if small == large else f"{small} below {LARGE_BATCH} images, else {large}"

    def _choose(self, prefer: str) -> tuple[Candidate, Candidate]:
        """Return the fastest candidate for small and for large batches; a single one is not timed."""
        kinds: list[Kind] = []
        if prefer != "dense":
            kinds += [("sparse", threads) for threads in sorted({1, self.threads})]
        may_be_faster = self.graph.macs() > SPARSE_ENOUGH * self.graph.macs(dense=True)
        if prefer == "dense" or (prefer == "auto" and may_be_faster):
            kinds.append(("dense", self.threads))
        candidates = [self._open(kind) for kind in kinds]
        if len(candidates) == 1:
            return candidates[0], candidates[0]
        small, large = (
            min(candidates, key=lambda candidate: time_call(candidate.run, images))
            for images in (np.zeros((n, *self.graph.input_shape), np.float32) for n in (1, LARGE_BATCH))
        )
        return small, large

    def _open(self, kind: Kind) -> Candidate:
        """Return the network on a sparse kernel, or on the fastest dense engine."""
        family, threads = kind
        if family == "sparse":
            network = SparseNetwork(self.graph, threads=threads)
            return Candidate(f"sparse ({network.kernel_name}), {format_threads(threads)}", kind, network)
        from atmc.deploy.engine.dense import open_fastest

        name, run = open_fastest(self.graph, threads)
        return Candidate(f"dense ({name}), {format_threads(threads)}", kind, run)

    def _check(self, images: FloatArray) -> FloatArray:
        """Return the images, contiguous. Raises ValueError if they are not what the network takes."""
        if not isinstance(images, np.ndarray) or images.dtype != np.float32:
            kind = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
            raise ValueError(f"expected images as a numpy array of float32 in [0, 1], got {kind}")
        if images.ndim != 4 or images.shape[1:] != self.graph.input_shape:
            expected = ", ".join(map(str, self.graph.input_shape))
            raise ValueError(f"expected images of shape (n, {expected}), got {images.shape}")
        images = np.ascontiguousarray(images)
        if self._check_range:
            return _clip_to_range(images)
        zeros = self._zeros  # one array, also if another thread replaces the attribute
        if zeros.size != images.size:
            self._zeros = zeros = np.zeros(images.size, np.float32)
        if np.vdot(images, zeros) != 0:  # nan times 0 and infinity times 0 are nan, which differs from 0
            raise ValueError("expected finite images, got nan or infinity")
        return images


def _clip_to_range(images: FloatArray) -> FloatArray:
    """Return images whose values are all in [0, 1]; raise ValueError if one is outside by more than `PIXEL_SLACK`."""
    # As integers the bits of floats from 0 to 1 are those up to 1's; of all others, but for -0.0, they are larger.
    if not images.size or images.view(np.uint32).max() <= ONE_BITS:
        return images
    low, high = float(images.min()), float(images.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("expected finite images, got nan or infinity")
    if low < -PIXEL_SLACK or high > 1 + PIXEL_SLACK:
        raise ValueError(
            f"expected images with values in [0, 1], got values from {low:.6g} to {high:.6g}; normalization belongs "
            "in the model (check_range=False lifts this check)"
        )
    return np.clip(images, 0.0, 1.0)


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


_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


def _renew_after_fork() -> None:
    """Let every engine start its threads again when it is called: a child has those of its parent no longer.

    What the parent opened is never closed here: that would wait for its threads, ONNX Runtime's too.
    """
    for engine in list(_ENGINES):
        for candidate in (engine._for_small, engine._for_large):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(candidate.run))
        engine._lock, engine._left_by_fork = threading.Lock(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)
