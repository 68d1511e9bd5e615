"""Where the coder's models start: what its contexts hold before they have seen anything, and its tables.

All in integers, so that every machine has the same; see `bits`.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import cache

import numpy as np

from atmc.pack.arithmetic import POSITION_CLASSES
from atmc.pack.sortable_floats import Integers

Model = tuple[Integers, Integers, Integers, Integers]

ONE = 1 << 32  # information 1
STEPS = 11 << 10  # log odds are clamped to +-11 nats, in steps of 1/1024: no decision costs more than 16 bits


@cache
def squash_table() -> list[int]:
    """p at log odds (i - STEPS) / 1024, i = 0 .. 2 STEPS: 65536 / (1 + exp(-x)) rounded, inside 1 .. 65535."""
    scale = 1 << 96
    term = step = scale
    for n in range(1, 12):  # exp(1/1024) by its series, in integers
        term = term // (1024 * n)
        step += term
    power, upper = scale, []
    for _ in range(STEPS + 1):
        upper.append(min((65536 * power + (power + scale) // 2) // (power + scale), 65535))
        power = power * step // scale
    return [65536 - p for p in reversed(upper[1:])] + upper


@cache
def cost_table() -> list[int]:
    """-log2(p / 65536) in 2^-16 bits for p = 0 (unused) .. 65536, by repeated squaring of integers."""
    p = np.arange(1, 65537, dtype=np.int64)
    whole = np.zeros_like(p)
    for shift in range(17):
        whole += (p >> (shift + 1)) > 0
    mantissa, fraction = p << (30 - whole), np.zeros_like(p)
    for _ in range(16):
        mantissa = (mantissa * mantissa) >> 30
        two = (mantissa >> 31) & 1
        fraction, mantissa = 2 * fraction + two, mantissa >> two
    return [0, *(((16 - whole) << 16) - fraction).tolist()]


def stretch(p: int) -> int:
    """The theta at which p (1 .. 65535) is the probability."""
    return (bisect_left(squash_table(), p) - STEPS) << 22


def position_model(rows: int, columns: int, group: int, scale: int) -> Model:
    """The contexts of `code_positions` at the start; a larger scale holds the contexts nearer to their prior.

    A place starts from the hazard of one nonzero anywhere in what is left of its group.
    """
    groups = -(-columns // group)
    unit = ONE << scale >> 2
    sections = [  # how many contexts, theta at the start, info at the start
        (1, [stretch(1200)], ONE >> 6),
        (rows, None, unit),
        (groups, None, unit),
        (9, None, 2 * unit),
        (POSITION_CLASSES, None, unit >> 1),
        (3 * group, [t for i in range(group) for t in _hazards(group - i)], unit // 3),
        (3, None, ONE >> 3),
        (rows, None, 2 * unit),
        (columns, None, 2 * unit),
        (8, None, 2 * unit),
    ]
    theta = [np.zeros(count, np.int64) if start is None else np.array(start, np.int64) for count, start, _ in sections]
    info = [np.full(count, weight, np.int64) for count, _, weight in sections]
    return _model(np.concatenate(theta), np.concatenate(info))


def _hazards(left: int) -> tuple[int, int, int]:
    """Log odds of an entry with so many places left, when none, one, or more came before it in the group."""
    return stretch(min(65536 // left, 64000)), stretch(6500), stretch(13000)


def tree_model(modelled: int, scale: int) -> Model:
    """The contexts of `code_symbols` and (modelled = 6) `code_ascending` at the start."""
    return _model(np.zeros(1 << modelled, np.int64), np.full(1 << modelled, ONE << scale >> 2, np.int64))


def placed_model(rows: int, columns: int, kernel: int, modelled: int, scale: int) -> Model:
    """The contexts of `code_placed` at the start: those of rows and channels are held to their prior most."""
    nodes, unit = 1 << modelled, ONE << scale >> 2
    sides = 8 * (rows + columns // kernel)
    info = np.concatenate([np.full(nodes, unit), np.full(sides, 4 * unit), np.full(25 * nodes, 2 * unit)])
    return _model(np.zeros(len(info), np.int64), info)


def _model(theta: Integers, info: Integers) -> Model:
    """theta, info, the variance 1 / info in 2^-22, and the info at which to compute it anew."""
    return theta, info, (1 << 54) // info, info + (info >> 5)
