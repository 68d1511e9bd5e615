"""The state in which the coder's contexts start, and the coder's tables: all part of the file format.

Everything is computed in integers, so that every machine has the same; see `arithmetic` for the units.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import cache

import numpy as np

from atmc.pack.arithmetic import POSITION_CLASSES
from atmc.pack.sortable_floats import Int64s

Contexts = tuple[Int64s, Int64s, Int64s, Int64s]  # theta, info, variance, due

ONE = 1 << 32  # information 1
STEPS = 11 << 10  # log odds are clamped to +-11 nat, in steps of 1/1024: no decision costs more than 16 bits


@cache
def logistic_table() -> list[int]:
    """Return p at the log odds (i - STEPS) / 1024, i = 0 .. 2 STEPS: 65536 / (1 + exp(-x)) rounded, in 1 .. 65535."""
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
def length_table() -> list[int]:
    """Return -log2(p / 65536) in 2^-16 bits for p = 0 (unused) .. 65536, by repeated squaring of integers."""
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
    """Return the theta at which p (1 .. 65535) is the probability."""
    return (bisect_left(logistic_table(), p) - STEPS) << 22


def position_contexts(rows: int, columns: int, group: int, scale: int) -> Contexts:
    """Return the contexts of `code_positions` at the start; a larger scale holds them nearer to their prior.

    The contexts of a place start from the hazard of one nonzero at a random place of what is left of its group.
    """
    groups = -(-columns // group)
    unit = ONE << scale >> 2
    sections = [  # number of contexts, theta at the start (None: 0), info at the start
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
    return _contexts(np.concatenate(theta), np.concatenate(info))


def _hazards(left: int) -> tuple[int, int, int]:
    """Return the log odds of an entry with `left` places left, after none, one, or more nonzeros in the group."""
    return stretch(min(65536 // left, 64000)), stretch(6500), stretch(13000)


def tree_contexts(modelled: int, scale: int) -> Contexts:
    """Return the contexts of `code_symbols`, and of `code_ascending` (modelled = 6), at the start."""
    return _contexts(np.zeros(1 << modelled, np.int64), np.full(1 << modelled, ONE << scale >> 2, np.int64))


def neighbor_contexts(rows: int, columns: int, kernel: int, modelled: int, scale: int) -> Contexts:
    """Return the contexts of `code_symbols_with_neighbors` at the start, nearest to the prior for rows and channels."""
    nodes, unit = 1 << modelled, ONE << scale >> 2
    sides = 8 * (rows + columns // kernel)
    info = np.concatenate([np.full(nodes, unit), np.full(sides, 4 * unit), np.full(25 * nodes, 2 * unit)])
    return _contexts(np.zeros(len(info), np.int64), info)


def _contexts(theta: Int64s, info: Int64s) -> Contexts:
    """Return theta, info, the variance 1 / info in 2^-22, and the info from which on the variance is computed again."""
    return theta, info, (1 << 54) // info, info + (info >> 5)
