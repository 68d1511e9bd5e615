"""One run of the arithmetic coder, in plain Python or compiled: what `coder` speaks to.

Plain Python takes about 3 microseconds a decision, and Numba, from its cache, half a second to start: the work decides,
once. Both give the same bits.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atmc.pack import arithmetic, priors
from atmc.pack.arithmetic import AT, DECODE, HIGH, LOW, SPENT

CUT_ZEROS = arithmetic.PAST_END - 4
WORTH_COMPILING = 60_000  # decisions from which on Numba's start is worth its time
INLINED = ("settle", "code_bit", "code_number", "decide", "code_symbol")  # a call costs more than the work
FUNCTIONS = (*INLINED, "code_positions", "code_symbols", "code_placed", "code_ascending")
_CONSTANTS = ("PAST_END", "DECODE", "MEASURE", "MODE", "LOW", "HIGH", "CODE", "AT", "SPENT")


class Stream:
    """A measurement, an encoding or a decoding, and where it stands.

    Args:
        mode: arithmetic.MEASURE, ENCODE or DECODE.
        data: what to decode.
        room: bytes that an encoding may take.
        work: about how many decisions there will be.
    """

    def __init__(self, mode: int, *, data: bytes = b"", room: int = 0, work: int = 0) -> None:
        started = _compiled.cache_info().currsize > 0
        self._run = _compiled() if started or work > WORTH_COMPILING else _plain()
        start = [mode, 0, 0xFFFFFFFF, int.from_bytes(data[:4].ljust(4, b"\0"), "big"), 4 if mode == DECODE else 0, 0]
        self._coder = self._run.array(start)
        self._data = self._run.bytes(data if mode == DECODE else bytes(room))
        self._tables = self._run.tables()
        self._contexts = self._run.array([0] * 5)
        self.decoding = mode == DECODE

    @property
    def spent(self) -> float:
        """Ideal code length so far, bits."""
        return float(self._coder[SPENT]) / 65536

    @property
    def over_read(self) -> bool:
        """Whether a decoder went further past the end than an encoder's cut zeros allow."""
        return int(self._coder[AT]) > len(self._data) + arithmetic.PAST_END

    def number(self, width: int, number: int = 0) -> int:
        """An integer of so many bits, all equally likely."""
        return int(self._run.code_number(self._coder, self._data, self._tables[1], width, int(number)))

    def positions(
        self,
        flags: NDArray[np.uint8],
        rows: int,
        columns: int,
        group: int,
        across: int,
        classes: NDArray[np.int64],
        scale: int,
    ) -> NDArray[np.uint8]:
        """Which entries of a matrix are nonzero: see `bits.code_positions`. The flags, those given or decoded."""
        model = self._model(priors.position_model(rows, columns, group, scale))
        held = self._run.bytes(flags.tobytes())
        held_classes = self._run.array(classes)
        self._run.code_positions(
            self._coder, self._data, self._tables, held, rows, columns, group, across, held_classes,
            model, self._contexts, self._run.array(np.zeros_like(classes)),
        )  # fmt: skip
        return np.frombuffer(held, np.uint8)

    def model(self, modelled: int, scale: int) -> Any:
        """Fresh contexts for `symbols`."""
        return self._model(priors.tree_model(modelled, scale))

    def symbols(
        self, symbols: NDArray[np.int64], levels: int, depth: int, modelled: int, model: Any
    ) -> NDArray[np.int64]:
        """Integers from 0 to levels - 1, of depth bits: see `bits.code_symbols`. Those given or decoded."""
        held = self._run.array(np.append(symbols, levels))
        self._run.code_symbols(self._coder, self._data, self._tables, held, depth, modelled, model, self._contexts)
        return np.asarray(held[:-1], np.int64)

    def placed(
        self,
        symbols: NDArray[np.int64],
        levels: int,
        depth: int,
        modelled: int,
        scale: int,
        places: NDArray[np.int64],
        shape: tuple[int, int, int, int, int],
        kinds: Sequence[int] | NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Integers as `symbols` codes them, at places of a matrix: see `bits.code_placed`. Those given or decoded."""
        rows, columns, kernel = shape[:3]
        model = self._model(priors.placed_model(rows, columns, kernel, modelled, scale))
        held = self._run.array(np.append(symbols, levels))
        self._run.code_placed(
            self._coder, self._data, self._tables, held, depth, modelled, model, self._contexts,
            self._run.array(places), self._run.array(shape), self._run.array(kinds), self._run.array([0] * columns),
        )  # fmt: skip
        return np.asarray(held[:-1], np.int64)

    def ascending(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Strictly ascending integers from 0: see `bits.code_ascending`. Those given or decoded."""
        held = self._run.array(numbers)
        self._run.code_ascending(self._coder, self._data, self._tables, held, self.model(6, 0), self._contexts)
        return np.array(held, np.int64)

    def finish(self) -> bytes:
        """The bytes of an encoding: the shortest that a decoder, which reads zeros past their end, takes for it."""
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

    def _model(self, parts: priors.Model) -> Any:
        return tuple(self._run.array(part) for part in parts)


def prepare(work: int) -> None:
    """Start Numba before the first of many streams, where about so many decisions are to come in all of them."""
    if work > WORTH_COMPILING:
        _compiled()


@cache
def _plain() -> types.SimpleNamespace:
    """The functions of `bits` as they are, on lists."""
    functions = {name: getattr(arithmetic, name) for name in FUNCTIONS}
    return types.SimpleNamespace(
        **functions, array=_listed, bytes=bytearray, tables=lambda: (priors.squash_table(), priors.cost_table())
    )


@cache
def _compiled() -> types.SimpleNamespace:
    """The functions of `bits` compiled, on arrays; as they are where there is no Numba."""
    try:
        import numba
    except ImportError:
        return _plain()
    space: dict[str, Any] = {
        "__name__": arithmetic.__name__,
        **{name: getattr(arithmetic, name) for name in _CONSTANTS},
    }
    for name in FUNCTIONS:  # in the order of their calls, each in a namespace where those before it are compiled
        function = types.FunctionType(getattr(arithmetic, name).__code__, space, name)
        compiler = numba.njit(cache=True, forceinline=name in INLINED, error_model="numpy")
        space[name] = compiler(function)
    tables = (_integers(priors.squash_table()), _integers(priors.cost_table()))
    functions = {name: space[name] for name in FUNCTIONS}
    return types.SimpleNamespace(**functions, array=_integers, bytes=_octets, tables=lambda: tables)


def _listed(values: Sequence[int] | NDArray[np.int64]) -> list[int]:
    return list(np.asarray(values, np.int64).tolist())


def _integers(values: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def _octets(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8).copy()
