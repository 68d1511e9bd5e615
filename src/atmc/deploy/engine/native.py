"""The kernel in C++, if the package was built with a compiler."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from atmc.deploy.engine.program import OP, Program
from atmc.deploy.graph.graph import FloatArray

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64


@cache
def open_library() -> ctypes.CDLL | None:
    """Return the compiled library, or None if it was not built or is of another version."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernel{suffix}")
        if path.exists():
            library = ctypes.CDLL(str(path))
            library.atmc_op_size.restype = _INTEGER
            if library.atmc_op_size() != OP.itemsize:
                return None
            library.atmc_instructions.argtypes, library.atmc_instructions.restype = [_INTEGER], ctypes.c_char_p
            library.atmc_start_threads.argtypes, library.atmc_start_threads.restype = [_INTEGER], _POINTER
            library.atmc_stop_threads.argtypes, library.atmc_stop_threads.restype = [_POINTER], None
            library.atmc_run.argtypes = [_POINTER, ctypes.c_char_p, _POINTER, _INTEGER, *[_POINTER] * 7]
            library.atmc_run.restype = _INTEGER
            return library
    return None


def instruction_sets() -> list[str]:
    """Return the names of the instruction sets that run on this machine, the fastest first; none without a library."""
    library = open_library()
    names: list[str] = []
    while library is not None and (name := library.atmc_instructions(len(names))) is not None:
        names.append(name.decode())
    return names


class NativeKernel:
    """Runs programs in C++ on a number of threads, with one instruction set of this machine.

    Raises:
        MemoryError: the threads cannot be started.
    """

    def __init__(self, threads: int, instructions: str) -> None:
        library = open_library()
        assert library is not None
        self._library, self._instructions = library, instructions.encode()
        self._group = library.atmc_start_threads(threads)
        self._process = os.getpid()
        if not self._group:
            raise MemoryError(f"cannot start {threads} threads")

    def bind(self, program: Program, arena: FloatArray, images: FloatArray, logits: FloatArray) -> Callable[[], None]:
        """Return a function that writes the logits (n, classes) of images (n, c, h, w) each time it is called.

        All arrays are contiguous float32 and of the program's sizes. Their addresses are taken once, since numpy takes
        a microsecond for each.
        """
        arrays = program.ops, arena, program.nonzeros, program.starts, program.floats, program.masks, images, logits
        ops, *tables = (array.ctypes.data for array in arrays)
        run, arguments = self._library.atmc_run, (self._group, self._instructions, ops, len(program.ops), *tables)

        def call(_: object = (self, arrays)) -> None:  # keeps the kernel and the arrays alive as long as itself
            failed = run(*arguments)
            assert not failed, "the kernel does not know its instruction set"

        return call

    def __del__(self, process: Callable[[], int] = os.getpid) -> None:  # when Python ends, `os` may be gone
        if getattr(self, "_group", None) and self._process == process():  # a forked process has none of the threads
            self._library.atmc_stop_threads(self._group)
