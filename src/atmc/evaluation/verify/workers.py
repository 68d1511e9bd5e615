"""Run the stages of a verification in several processes, one thread each, or in the process of the caller."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType

import torch

from atmc.evaluation.verify.stages import Part, Problem, run_stage
from atmc.models.factory import USER_CODE_ERRORS, first_line


class WorkerEnded(RuntimeError):
    """A process of a verification ended before it had finished."""


class Workers:
    """Processes that run the stages of a problem: a context, with which the processes end, whatever they are doing.

    They start when they are needed. With one process everything runs in the caller's.

    Raises:
        ValueError: there are to be several processes, and the model cannot be pickled.
    """

    def __init__(self, problem: Problem, processes: int) -> None:
        self._problem, self._processes = problem, processes
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._pickled = _pickle(problem) if processes > 1 else b""

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process, connection in self._workers:
            connection.close()
            process.terminate()
        for process, _ in self._workers:
            process.join()

    def run(self, stage: str, batches: Sequence[Sequence[int]]) -> Iterator[tuple[int, Part]]:
        """Run a stage on batches of rows; yield the position of each batch that is finished, and its part.

        Raises:
            WorkerEnded: a process ended.
        """
        if self._processes == 1:
            for position, rows in enumerate(batches):
                yield position, run_stage(self._problem, stage, rows)
            return
        self._start(min(self._processes, len(batches)))
        waiting, busy = list(enumerate(batches))[::-1], dict[Connection, int]()
        idle = [connection for _, connection in self._workers]
        while waiting or busy:
            while waiting and idle:
                position, rows = waiting.pop()
                connection = idle.pop()
                _send(connection, (stage, rows))
                busy[connection] = position
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                idle.append(ready)
                yield busy.pop(ready), _receive(ready)

    def _start(self, count: int) -> None:
        """Start processes until there are `count` of them."""
        context, new = get_context("spawn"), []
        resource_tracker.ensure_running()  # starting it unblocks the signal
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is for the caller's process
        try:
            while len(self._workers) < count:
                connection, other = context.Pipe()
                process = context.Process(target=_serve, args=(other,), daemon=True)
                process.start()
                other.close()
                self._workers.append((process, connection))
                new.append(connection)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for connection in new:
            _send(connection, self._pickled)


def _pickle(problem: Problem) -> bytes:
    try:
        return pickle.dumps(problem)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"the model cannot be sent to other processes ({first_line(error)}): verify it with one process"
        ) from error


def _send(connection: Connection, value: object) -> None:
    try:
        connection.send(value)
    except OSError as error:
        raise _worker_ended() from error


def _receive(connection: Connection) -> Part:
    try:
        part, error = connection.recv()
    except (EOFError, OSError) as ended:
        raise _worker_ended() from ended
    if error is not None:
        raise RuntimeError(f"a process of the verification failed: {error}")
    assert isinstance(part, dict)
    return part


def _worker_ended() -> WorkerEnded:
    return WorkerEnded("a process of the verification ended before it was done: was it killed, or is memory short?")


def _serve(connection: Connection) -> None:
    """Answer (stage, rows) with (part, None), or with (None, error in words), until the caller's process ends."""
    threading.Thread(target=_end_with_caller, daemon=True).start()
    torch.set_num_threads(1)
    problem = None
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):  # the caller has ended
            return
        part, error = None, None
        try:
            if problem is None:
                problem = pickle.loads(message)
                continue
            part = run_stage(problem, *message)
        except USER_CODE_ERRORS as raised:
            error = first_line(raised)
        try:
            connection.send((part, error))
        except OSError:  # likewise
            return


def _end_with_caller() -> None:
    """End this process as soon as the one that started it has ended, even in the middle of a computation."""
    caller = parent_process()
    assert caller is not None
    caller.join()
    os._exit(1)
