"""`atmc bench`: measure latency, memory and accuracy of a model file on the sparse and the installed dense engines.

Every engine runs in a process of its own (`worker`). The engines take turns, with one round of calls each, so that
other work on the machine affects all of them alike.
"""

from __future__ import annotations

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

from atmc.commands.bench.figures import compare_logits, describe_fastest, processor_name, summarize_times
from atmc.commands.bench.inputs import (
    BATCH,
    Inputs,
    file_bytes,
    find_missing_packages,
    load_inputs,
    write_forms,
    write_tiny,
)
from atmc.commands.bench.worker import KINDS, OURS, PLAIN, EngineKind, ModelFiles, serve
from atmc.commands.model_files import open_model_file
from atmc.commands.outputs import check_file, write_json
from atmc.deploy.engine.engine import format_threads
from atmc.deploy.graph.graph import FloatArray, Graph
from atmc.deploy.graph.trace import UnsupportedModel, trace

REFERENCE = "PyTorch"  # the engine whose logits the others are compared with
ROUND_SECONDS, MAX_CALLS = 0.05, 500  # of one engine in one round
VERSIONS = ("atmc", "torch", "onnxruntime", "openvino")


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """The options of `atmc bench`."""

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
        """The numbers of threads: as asked for, or 1 and the number of processors that this process may use."""
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return tuple(dict.fromkeys(self.threads or (1, processors)))


@dataclass(frozen=True)
class BenchStatus:
    """Event: the step that begins, in words."""

    text: str


@dataclass(frozen=True)
class Benched:
    """Event: the measurement is done; figures: as --json writes them."""

    figures: dict[str, Any]


@dataclass
class _Engine:
    """A worker and its figures; pipe: to its process."""

    kind: EngineKind
    pipe: Any
    figures: dict[str, Any] = field(default_factory=dict)
    run_bytes: dict[str, int | None] = field(default_factory=dict)
    times: list[dict[str, Any]] = field(default_factory=list)
    logits: FloatArray | None = None

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the engine's `Worker` and return its result. Raises RuntimeError if the method fails."""
        try:
            self.pipe.send((method, arguments))
            succeeded, result = self.pipe.recv()
        except (EOFError, OSError):
            raise RuntimeError("its process ended") from None
        if not succeeded:
            raise RuntimeError(result)
        return result

    def build_row(self, expected: FloatArray | None, labels: NDArray[np.int64] | None) -> dict[str, Any]:
        """Return all figures of the engine; expected: PyTorch's logits (n, classes)."""
        assert self.logits is not None
        compared = compare_logits(self.logits, expected, labels)
        return {"engine": self.kind.name, **self.figures, "run_bytes": self.run_bytes, **compared, "times": self.times}


def bench(request: BenchRequest) -> Iterator[BenchStatus | Benched]:
    """Measure a model file on every engine; the last event is `Benched`.

    Raises:
        ValueError: the request makes no sense.
        RuntimeError: the sparse engine failed.
    """
    _check_request(request)
    yield BenchStatus("reading the model")
    loaded = open_model_file(request.file, request.model)
    model = loaded.model
    inputs = load_inputs(
        loaded,
        data=request.data,
        n=request.n,
        largest=max(request.batches),
        image_column=request.image_column,
        label_column=request.label_column,
    )
    graph: Graph | UnsupportedModel
    try:
        graph = trace(model, inputs.images.shape[1:]).graph
    except UnsupportedModel as error:
        graph = error
    factory = request.model if request.model and ":" in request.model else None
    with tempfile.TemporaryDirectory() as name, ExitStack() as workers:
        yield BenchStatus("making the dense models")
        folder = Path(name)
        files, left_out = write_forms(
            folder,
            request.file,
            model,
            graph,
            input_shape=inputs.images.shape[1:],
            calibration=inputs.calibration,
            factory=factory,
        )
        tiny_files = write_tiny(folder / "tiny")
        asked_for = [kind for kind in KINDS if request.unsimplified or kind.form != PLAIN]
        left_out |= find_missing_packages()
        left_out = {kind.name: left_out[kind.name] for kind in asked_for if kind.name in left_out}
        kinds = [kind for kind in asked_for if kind.name not in left_out]
        engines = [_Engine(kind, workers.enter_context(start_worker(kind, files, tiny_files))) for kind in kinds]
        yield from _measure(request, engines, left_out, inputs)
        for engine in engines:
            engine.figures["file_bytes"] = file_bytes(engine.kind, files, model)
    macs = None
    if isinstance(graph, Graph):
        macs = {"dense": graph.macs(dense=True), "left": engines[0].figures.pop("macs")}
    expected = next((engine.logits for engine in engines if engine.kind.name == REFERENCE), None)
    rows = [engine.build_row(expected, inputs.labels) for engine in _remaining(engines, left_out)]
    figures = _describe_run(request, len(inputs.images)) | {"macs": macs, "engines": rows, "left_out": left_out}
    figures["verdict"] = describe_fastest(figures)
    if request.json_path:
        write_json(request.json_path, figures)
    yield Benched(figures)


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """Parse numbers separated by commas, "1,8", and drop repeated ones. Raises ValueError, which names the option."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"expected --{option} as numbers separated by commas, got {text!r}") from None


def _check_request(request: BenchRequest) -> None:
    for name, values in (("threads", request.thread_counts), ("batch", request.batches), ("reps", (request.reps,))):
        if not values or min(values) < 1:
            raise ValueError(f"expected {name} >= 1, got {','.join(map(str, values))}")
    if request.n < 1:
        raise ValueError(f"expected n >= 1, got {request.n}")
    if request.json_path:
        check_file(request.json_path, overwrite=request.overwrite)


@contextmanager
def start_worker(kind: EngineKind, files: ModelFiles, tiny_files: ModelFiles) -> Iterator[Any]:
    """Start a process that runs an engine, and yield the pipe to it; the process ends with the context."""
    context = get_context("spawn")
    pipe, worker_pipe = context.Pipe()
    process = context.Process(target=serve, args=(worker_pipe, kind.name, files, tiny_files), daemon=True)
    process.start()
    worker_pipe.close()
    try:
        yield pipe
    finally:
        pipe.close()
        process.terminate()
        process.join()


def _measure(
    request: BenchRequest, engines: Sequence[_Engine], left_out: dict[str, str], inputs: Inputs
) -> Iterator[BenchStatus]:
    """Fill the engines' figures, and add engines that fail to those left out."""
    for threads in request.thread_counts:
        for engine in _remaining(engines, left_out):
            yield BenchStatus(f"loading {engine.kind.name}, {format_threads(threads)}")
            with _leave_out_on_failure(engine, left_out):
                loaded = engine.ask("load", threads)
                engine.figures = engine.figures or loaded
        for size in request.batches:
            yield from _time_rounds(request, _remaining(engines, left_out), left_out, threads, inputs.batch(size))
        if threads == request.thread_counts[0]:
            for engine in _remaining(engines, left_out):
                yield BenchStatus(f"{len(inputs.images)} images through {engine.kind.name}")
                with _leave_out_on_failure(engine, left_out):
                    engine.logits = engine.ask("logits", inputs.images, BATCH)


def _time_rounds(
    request: BenchRequest, engines: Sequence[_Engine], left_out: dict[str, str], threads: int, images: FloatArray
) -> Iterator[BenchStatus]:
    """Time one batch size: in each round every engine has its turn."""
    size, seconds, calls = len(images), {}, {}
    for engine in engines:
        with _leave_out_on_failure(engine, left_out):
            warm_up = engine.ask("warm_up", images)
            calls[engine.kind.name] = int(min(max(ROUND_SECONDS / warm_up["seconds"], 1), MAX_CALLS))
            seconds[engine.kind.name] = list[float]()
            engine.run_bytes.setdefault(str(size), warm_up["run_bytes"])
    for number in range(request.reps):
        yield BenchStatus(f"batch {size}, {format_threads(threads)}: round {number + 1} of {request.reps}")
        for engine in _remaining(engines, left_out):
            with _leave_out_on_failure(engine, left_out):
                seconds[engine.kind.name] += engine.ask("time", images, calls[engine.kind.name])
    for engine in _remaining(engines, left_out):
        engine.times.append({"threads": threads, "batch": size} | summarize_times(seconds[engine.kind.name], size))


def _remaining(engines: Sequence[_Engine], left_out: dict[str, str]) -> list[_Engine]:
    return [engine for engine in engines if engine.kind.name not in left_out]


@contextmanager
def _leave_out_on_failure(engine: _Engine, left_out: dict[str, str]) -> Iterator[None]:
    """Add a dense engine that fails to those left out; raise RuntimeError if the sparse engine fails."""
    try:
        yield
    except RuntimeError as error:
        if engine.kind.name == OURS:
            raise RuntimeError(f"the engine failed: {error}") from None
        left_out[engine.kind.name] = f"failed: {error}"


def _describe_run(request: BenchRequest, images: int) -> dict[str, Any]:
    return {
        "model": str(request.file),
        "data": request.data,
        "images": images,
        "batches": list(request.batches),
        "threads": list(request.thread_counts),
        "rounds": request.reps,
        "machine": {"processor": processor_name(), "processors": os.cpu_count(), "system": platform.platform()},
        "versions": {name: metadata.version(name) for name in VERSIONS if find_spec(name)},
        "date": datetime.now(UTC).date().isoformat(),
    }
