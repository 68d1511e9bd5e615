"""`atmc bench`: a model file -> latency, memory and accuracy of our engine and of the dense ones installed here.

Every engine runs in a process of its own (`bench_worker`). They take turns, a round of calls each, so that what else
the machine does hits all alike.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atmc.commands.bench.figures import comparison, processor, summary, thread_count, verdict
from atmc.commands.bench.inputs import BATCH, Inputs, file_bytes, load_inputs, missing, write_forms, write_tiny
from atmc.commands.bench.worker import KINDS, OURS, PLAIN, Files, Kind, work
from atmc.commands.model_files import open_model
from atmc.core.files import write_beside
from atmc.deploy.graph.graph import FloatArray
from atmc.deploy.graph.trace import trace

REFERENCE = "PyTorch"
ROUND_SECONDS, MOST_CALLS = 0.05, 500
VERSIONS = ("atmc", "torch", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Request:
    """What `atmc bench` was asked for; the fields are its options."""

    file: Path
    data: str | None = None
    threads: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1, 8, 64)
    reps: int = 11
    n: int = 1000
    model: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    json_path: Path | None = None
    overwrite: bool = False
    unsimplified: bool = False

    @property
    def thread_counts(self) -> tuple[int, ...]:
        """What was asked for, or one thread and as many as there are processors for this process."""
        every = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return tuple(dict.fromkeys(self.threads or (1, every)))


@dataclass(frozen=True)
class Progress:
    """What is being done now."""

    text: str


@dataclass(frozen=True)
class Benched:
    """The measurement is done: its figures, as in --json."""

    figures: dict[str, Any]


@dataclass
class _Engine:
    """A worker, and what was measured of it."""

    kind: Kind
    pipe: Any
    figures: dict[str, Any] = field(default_factory=dict)
    run_bytes: dict[str, int | None] = field(default_factory=dict)
    times: list[dict[str, Any]] = field(default_factory=list)
    logits: FloatArray | None = None

    def ask(self, method: str, *arguments: Any) -> Any:
        """What a method of its `Worker` returns. RuntimeError: why it has nothing to return."""
        try:
            self.pipe.send((method, arguments))
            done, found = self.pipe.recv()
        except (EOFError, OSError):
            raise RuntimeError("its process ended") from None
        if not done:
            raise RuntimeError(found)
        return found

    def row(self, expected: FloatArray | None, labels: NDArray[np.int64] | None) -> dict[str, Any]:
        """All its figures; expected: PyTorch's logits (n, classes)."""
        assert self.logits is not None
        compared = comparison(self.logits, expected, labels)
        return {"engine": self.kind.name, **self.figures, "run_bytes": self.run_bytes, **compared, "times": self.times}


def bench(request: Request) -> Iterator[Progress | Benched]:
    """Carry a request out; yields what happens, and at last `Benched`.

    Raises:
        ValueError: something asked for makes no sense, or the model cannot be run. RuntimeError: our engine failed.
    """
    _check(request)
    yield Progress("reading the model")
    loaded = open_model(request.file, request.model)
    model = loaded.model
    inputs = load_inputs(
        loaded,
        data=request.data,
        n=request.n,
        largest=max(request.batches),
        image_column=request.image_column,
        label_column=request.label_column,
    )
    raw = trace(model, inputs.images.shape[1:])
    factory = request.model if request.model and ":" in request.model else None
    with tempfile.TemporaryDirectory() as folder, ExitStack() as workers:
        yield Progress("making the dense models")
        place = Path(folder)
        files, left_out = write_forms(
            place, request.file, model, raw.graph, calibration=inputs.calibration, factory=factory
        )
        smallest = write_tiny(place / "tiny")
        wanted = [kind for kind in KINDS if request.unsimplified or kind.form != PLAIN]
        left_out |= missing()
        left_out = {kind.name: left_out[kind.name] for kind in wanted if kind.name in left_out}
        kinds = [kind for kind in wanted if kind.name not in left_out]
        engines = [_Engine(kind, workers.enter_context(_worker(kind, files, smallest))) for kind in kinds]
        yield from _measure(request, engines, left_out, inputs)
        for engine in engines:
            engine.figures["file_bytes"] = file_bytes(engine.kind, files, model)
    macs = {"dense": raw.graph.macs(dense=True), "left": engines[0].figures.pop("macs")}
    expected = next((engine.logits for engine in engines if engine.kind.name == REFERENCE), None)
    rows = [engine.row(expected, inputs.labels) for engine in _left(engines, left_out)]
    figures = _about(request, len(inputs.images)) | {"macs": macs, "engines": rows, "left_out": left_out}
    figures["verdict"] = verdict(figures)
    if request.json_path:
        write_beside(request.json_path, (json.dumps(figures, indent=1) + "\n").encode())
    yield Benched(figures)


def numbers(text: str, option: str) -> tuple[int, ...]:
    """'1,8' -> (1, 8). ValueError for anything else."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"expected --{option} as numbers separated by commas, got {text!r}") from None


def _check(request: Request) -> None:
    for what, values in (("threads", request.thread_counts), ("batch", request.batches), ("reps", (request.reps,))):
        if not values or min(values) < 1:
            raise ValueError(f"expected {what} >= 1, got {','.join(map(str, values))}")
    if request.n < 1:
        raise ValueError(f"expected n >= 1, got {request.n}")
    path = request.json_path
    if path and not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to write {path.name} into")
    if path and path.exists() and not request.overwrite:
        raise ValueError(f"{path} exists: add --overwrite to replace it")


@contextmanager
def _worker(kind: Kind, files: Files, smallest: Files) -> Iterator[Any]:
    """The pipe to a new process that runs an engine."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there, kind.name, files, smallest), daemon=True)
    process.start()
    there.close()
    try:
        yield here
    finally:
        here.close()
        process.terminate()
        process.join()


def _measure(
    request: Request, engines: Sequence[_Engine], left_out: dict[str, str], inputs: Inputs
) -> Iterator[Progress]:
    """Fill the engines' figures; those that fail are added to those left out."""
    for threads in request.thread_counts:
        for engine in _left(engines, left_out):
            yield Progress(f"loading {engine.kind.name}, {thread_count(threads)}")
            with _failing(engine, left_out):
                found = engine.ask("load", threads)
                engine.figures = engine.figures or found
        for size in request.batches:
            yield from _rounds(request, _left(engines, left_out), left_out, threads, inputs.batch(size))
        if threads == request.thread_counts[0]:
            for engine in _left(engines, left_out):
                yield Progress(f"{len(inputs.images)} images through {engine.kind.name}")
                with _failing(engine, left_out):
                    engine.logits = engine.ask("logits", inputs.images, BATCH)


def _rounds(
    request: Request, engines: Sequence[_Engine], left_out: dict[str, str], threads: int, images: FloatArray
) -> Iterator[Progress]:
    """Time a batch: every engine in turn, as often as asked for."""
    size, seconds, calls = len(images), {}, {}
    for engine in engines:
        with _failing(engine, left_out):
            found = engine.ask("warm", images)
            calls[engine.kind.name] = int(min(max(ROUND_SECONDS / found["seconds"], 1), MOST_CALLS))
            seconds[engine.kind.name] = list[float]()
            engine.run_bytes.setdefault(str(size), found["run_bytes"])
    for number in range(request.reps):
        yield Progress(f"batch {size}, {thread_count(threads)}: round {number + 1} of {request.reps}")
        for engine in _left(engines, left_out):
            with _failing(engine, left_out):
                seconds[engine.kind.name] += engine.ask("time", images, calls[engine.kind.name])
    for engine in _left(engines, left_out):
        engine.times.append({"threads": threads, "batch": size} | summary(seconds[engine.kind.name], size))


def _left(engines: Sequence[_Engine], left_out: dict[str, str]) -> list[_Engine]:
    return [engine for engine in engines if engine.kind.name not in left_out]


@contextmanager
def _failing(engine: _Engine, left_out: dict[str, str]) -> Iterator[None]:
    """A dense engine that fails is left out of the rest; RuntimeError where it is ours."""
    try:
        yield
    except RuntimeError as error:
        if engine.kind.name == OURS:
            raise RuntimeError(f"the engine failed: {error}") from None
        left_out[engine.kind.name] = f"failed: {error}"


def _about(request: Request, images: int) -> dict[str, Any]:
    return {
        "model": str(request.file),
        "data": request.data,
        "images": images,
        "batches": list(request.batches),
        "threads": list(request.thread_counts),
        "rounds": request.reps,
        "machine": {"processor": processor(), "processors": os.cpu_count(), "system": platform.platform()},
        "versions": {name: metadata.version(name) for name in VERSIONS if find_spec(name)},
        "date": datetime.now(UTC).date().isoformat(),
    }
