"""The compiled kernel, where the package was built with a compiler."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from atmc.deploy.engine.program import OP, Program

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64


@cache
def kernel() -> ctypes.CDLL | None:
    """The library, None where it was not built or is of another version."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernel{suffix}")
        if path.exists():
            library = ctypes.CDLL(str(path))
            library.atmc_op_size.restype = _INTEGER
            if library.atmc_op_size() != OP.itemsize:
                return None
            library.atmc_instructions.argtypes, library.atmc_instructions.restype = [_INTEGER], ctypes.c_char_p
            library.atmc_team.argtypes, library.atmc_team.restype = [_INTEGER], _POINTER
            library.atmc_dismiss.argtypes, library.atmc_dismiss.restype = [_POINTER], None
            library.atmc_run.argtypes = [_POINTER, ctypes.c_char_p, _POINTER, _INTEGER, *[_POINTER] * 7]
            library.atmc_run.restype = _INTEGER
            return library
    return None


def instruction_sets() -> list[str]:
    """The kernel's instruction sets that run on this machine, the fastest first; empty without a kernel."""
    library = kernel()
    found: list[str] = []
    while library is not None and (name := library.atmc_instructions(len(found))) is not None:
        found.append(name.decode())
    return found


class NativeTeam:
    """Threads that run programs together."""

    def __init__(self, threads: int, instructions: str) -> None:
        library = kernel()
        assert library is not None
        self._library, self._instructions = library, instructions.encode()
        self._team = library.atmc_team(threads)
        if not self._team:
            raise MemoryError(f"cannot start {threads} threads")

    def bind(
        self, program: Program, arena: NDArray[Any], images: NDArray[Any], logits: NDArray[Any]
    ) -> Callable[[], None]:
        """What writes the logits (n, classes) of images (n, c, h, w) whenever it is called.

        All arrays are contiguous float32 and of the program's sizes. It takes their addresses once: numpy needs a
        microsecond for each.
        """
        arrays = program.ops, arena, program.nonzeros, program.starts, program.floats, program.masks, images, logits
        ops, *tables = (array.ctypes.data for array in arrays)
        run, arguments = self._library.atmc_run, (self._team, self._instructions, ops, len(program.ops), *tables)

        def call(_: object = (self, arrays)) -> None:  # which must live as long as it does
            failed = run(*arguments)
            assert not failed, "the kernel lacks an instruction set that it had"

        return call

    def __del__(self) -> None:
        if getattr(self, "_team", None):
            self._library.atmc_dismiss(self._team)
