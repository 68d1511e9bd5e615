"""One run of the arithmetic coder, in plain Python or compiled: the layer between `weight_coder` and `arithmetic`.

Plain Python takes about 3 microseconds per decision; Numba, from its cache, takes half a second to start. The expected
number of decisions selects one of them. Both give the same bits.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atmc.core.jit import compile_function
from atmc.pack import arithmetic, priors
from atmc.pack.arithmetic import AT, DECODE, HIGH, LENGTH, LOW
from atmc.pack.sortable_floats import Int64s

CUT_ZEROS = arithmetic.PAST_END - 4
COMPILE_ABOVE = 60_000  # decisions above which Numba is worth its start
INLINED = ("settle", "code_bit", "code_number", "decide", "code_symbol")  # a call costs more than the work
FUNCTIONS = (*INLINED, "code_positions", "code_symbols", "code_symbols_with_neighbors", "code_ascending")
_CONSTANTS = ("PAST_END", "DECODE", "MEASURE", "MODE", "LOW", "HIGH", "CODE", "AT", "LENGTH")


class Stream:
    """A measurement, an encoding or a decoding in progress.

    Each `code_` method codes what it is given, or in decoding ignores it but for its size, and returns what was coded.

    Args:
        mode: arithmetic.MEASURE, ENCODE or DECODE.
        data: what to decode.
        room: bytes that an encoding may take.
        decisions: expected number of decisions.
    """

    def __init__(self, mode: int, *, data: bytes = b"", room: int = 0, decisions: int = 0) -> None:
        self._functions = select_functions(decisions)
        code = int.from_bytes(data[:4].ljust(4, b"\0"), "big")
        self._coder = self._functions.array([mode, 0, 0xFFFFFFFF, code, 4 if mode == DECODE else 0, 0])
        self._data = self._functions.bytes(data if mode == DECODE else bytes(room))
        self._tables = self._functions.tables()
        self._active = self._functions.array([0] * 5)

    @property
    def code_length(self) -> float:
        """Ideal code length so far, bits."""
        return float(self._coder[LENGTH]) / 65536

    @property
    def over_read(self) -> bool:
        """Whether a decoder has read further past the end than an encoder's cut zeros allow."""
        return int(self._coder[AT]) > len(self._data) + arithmetic.PAST_END

    def code_number(self, width: int, number: int = 0) -> int:
        """Code an integer of `width` equally likely bits."""
        return int(self._functions.code_number(self._coder, self._data, self._tables[1], width, int(number)))

    def code_positions(
        self,
        flags: NDArray[np.uint8],
        rows: int,
        columns: int,
        group: int,
        stride: int,
        classes: Int64s,
        scale: int,
    ) -> NDArray[np.uint8]:
        """Code which entries of a matrix are nonzero: see `arithmetic.code_positions`."""
        contexts = self._arrays(priors.position_contexts(rows, columns, group, scale))
        coded = self._functions.bytes(flags.tobytes())
        self._functions.code_positions(
            self._coder, self._data, self._tables, coded, rows, columns, group, stride, self._functions.array(classes),
            contexts, self._active, self._functions.array(np.zeros_like(classes)),
        )  # fmt: skip
        return np.frombuffer(coded, np.uint8)

    def new_tree_contexts(self, modelled: int, scale: int) -> Any:
        """Return contexts for `code_symbols` that have seen nothing yet."""
        return self._arrays(priors.tree_contexts(modelled, scale))

    def code_symbols(self, symbols: Int64s, levels: int, depth: int, modelled: int, contexts: Any) -> Int64s:
        """Code integers from 0 to levels - 1, of depth bits: see `arithmetic.code_symbols`."""
        coded = self._functions.array(np.append(symbols, levels))
        self._functions.code_symbols(
            self._coder, self._data, self._tables, coded, depth, modelled, contexts, self._active
        )
        return np.asarray(coded[:-1], np.int64)

    def code_symbols_with_neighbors(
        self,
        symbols: Int64s,
        levels: int,
        depth: int,
        modelled: int,
        scale: int,
        places: Int64s,
        shape: tuple[int, int, int, int, int],
        kinds: Sequence[int] | Int64s,
    ) -> Int64s:
        """Code integers at places of a matrix: see `arithmetic.code_symbols_with_neighbors`."""
        rows, columns, kernel = shape[:3]
        contexts = self._arrays(priors.neighbor_contexts(rows, columns, kernel, modelled, scale))
        array = self._functions.array
        coded = array(np.append(symbols, levels))
        self._functions.code_symbols_with_neighbors(
            self._coder, self._data, self._tables, coded, depth, modelled, contexts, self._active,
            array(places), array(shape), array(kinds), array([0] * columns),
        )  # fmt: skip
        return np.asarray(coded[:-1], np.int64)

    def code_ascending(self, numbers: Int64s) -> Int64s:
        """Code strictly ascending integers from 0: see `arithmetic.code_ascending`."""
        coded = self._functions.array(numbers)
        contexts = self.new_tree_contexts(6, 0)
        self._functions.code_ascending(self._coder, self._data, self._tables, coded, contexts, self._active)
        return np.array(coded, np.int64)

    def finish(self) -> bytes:
        """Return the fewest bytes that a decoder, which reads zeros past their end, decodes to the same bits."""
        low, high, at = (int(self._coder[slot]) for slot in (LOW, HIGH, AT))
        assert at <= len(self._data), "the encoding needs more room"
        for size in range(5):
            unit = 1 << 8 * (4 - size)
            value = -(-low // unit) * unit
            if value <= high:
                break
        data = bytes(self._data[:at]) + value.to_bytes(4, "big")[:size]
        zeros = min(len(data) - len(data.rstrip(b"\0")), CUT_ZEROS)
        return data[: len(data) - zeros]

    def _arrays(self, contexts: priors.Contexts) -> Any:
        return tuple(self._functions.array(part) for part in contexts)


def prepare(decisions: int) -> None:
    """Start Numba before the first of many streams, if all of them together are expected to take enough decisions."""
    if decisions > COMPILE_ABOVE:
        compile_functions()


def select_functions(decisions: int) -> types.SimpleNamespace:
    """Return the compiled functions if they are ready or worth their start, else the plain ones."""
    ready = compile_functions.cache_info().currsize > 0
    return compile_functions() if ready or decisions > COMPILE_ABOVE else plain_functions()


@cache
def plain_functions() -> types.SimpleNamespace:
    """Return the functions of `arithmetic` as they are, on lists."""
    functions = {name: getattr(arithmetic, name) for name in FUNCTIONS}
    return types.SimpleNamespace(
        **functions, array=_to_list, bytes=bytearray, tables=lambda: (priors.logistic_table(), priors.length_table())
    )


@cache
def compile_functions() -> types.SimpleNamespace:
    """Return the functions of `arithmetic` compiled, on arrays; the plain ones if Numba is not installed."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return plain_functions()
    space: dict[str, Any] = {
        "__name__": arithmetic.__name__,
        **{name: getattr(arithmetic, name) for name in _CONSTANTS},
    }
    for name in FUNCTIONS:  # in the order of their calls, so that each finds those that it calls compiled
        function = types.FunctionType(getattr(arithmetic, name).__code__, space, name)
        space[name] = compile_function(function, forceinline=name in INLINED, error_model="numpy")
    tables = (_to_array(priors.logistic_table()), _to_array(priors.length_table()))
    functions = {name: space[name] for name in FUNCTIONS}
    return types.SimpleNamespace(**functions, array=_to_array, bytes=_to_octets, tables=lambda: tables)


def _to_list(values: Sequence[int] | Int64s) -> list[int]:
    return list(np.asarray(values, np.int64).tolist())


def _to_array(values: Sequence[int] | Int64s) -> Int64s:
    return np.array(values, np.int64)


def _to_octets(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8).copy()
