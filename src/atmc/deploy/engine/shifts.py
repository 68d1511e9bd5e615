"""The nonzeros of a layer as shifts of its input's streams (see `steps`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from atmc.deploy.graph.graph import Conv, Linear, Pair

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Phases:
    """Every stride-th row and column, begun at each offset (row, column), as channels: channel * len(offsets) + i."""

    stride: Pair
    offsets: tuple[Pair, ...]


@dataclass(frozen=True, eq=False)
class Diagonal:
    """x * scale + bias on (features,): a linear layer whose zeros nobody writes down."""

    scale: NDArray[np.float32]
    bias: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Entries:
    """The nonzeros of a layer, by output: row starts (outputs + 1,), weights, input channels, shifts in y and x."""

    starts: Ints
    weights: NDArray[np.float32]
    channels: Ints
    down: Ints
    across: Ints


def phase_of_taps(op: Conv) -> Ints:
    """(kh, kw, 2): which phase each tap of the kernel reads."""
    taps = np.stack(np.meshgrid(*_taps(op), indexing="ij"), axis=-1)
    return cast(Ints, taps % np.array(op.stride))


def _taps(op: Conv) -> list[Ints]:
    """Offsets (kh,) and (kw,) of the kernel's rows and columns in the input."""
    sides = zip(op.weight.shape[2:], op.dilation, op.padding, strict=True)
    return [np.arange(k) * d - p for k, d, p in sides]


def entries_of(op: Conv | Linear | Diagonal, phases: Phases | None) -> Entries:
    """The nonzeros of a layer as shifts of its input's streams."""
    if isinstance(op, Diagonal):
        columns, zero = np.arange(len(op.scale)), np.zeros(len(op.scale), np.int64)
        return Entries(np.arange(len(op.scale) + 1), op.scale, columns, zero, zero)
    if isinstance(op, Linear):
        rows, columns = np.nonzero(op.weight)
        zero = np.zeros(len(rows), np.int64)
        return Entries(_starts(rows, len(op.weight)), op.weight[rows, columns], columns, zero, zero)
    outputs, channels, ky, kx = np.nonzero(op.weight)
    weights = op.weight[outputs, channels, ky, kx]
    per_group = len(op.weight) // op.groups
    channels = channels + outputs // per_group * op.weight.shape[1]
    down, across = (taps[k] for taps, k in zip(_taps(op), (ky, kx), strict=True))
    if phases is not None:
        sy, sx = phases.stride
        number = {offset: i for i, offset in enumerate(phases.offsets)}
        table = np.zeros(phases.stride, np.int64)
        for offset, i in number.items():
            table[offset] = i
        channels = channels * len(number) + table[down % sy, across % sx]
        down, across = down // sy, across // sx
    return Entries(_starts(outputs, len(op.weight)), weights, channels, down, across)


def in_fours(entries: Entries, cost: float) -> Entries | None:
    """Outputs taken four at a time: for every tap that one of them has, the weights of all four; None if slower.

    cost: of a tap of four outputs together, in taps of one output. There is a row of starts for each four; zeros fill
    up the last.
    """
    outputs = len(entries.starts) - 1
    if cost >= 4:
        return None
    rows = np.repeat(np.arange(outputs), np.diff(entries.starts))
    shifts = [each - each.min(initial=0) for each in (entries.channels, entries.down, entries.across)]
    sides = [-(-outputs // 4), *(int(each.max(initial=0)) + 1 for each in shifts)]
    keys, which = np.unique(np.ravel_multi_index([rows // 4, *shifts], sides), return_inverse=True)
    if len(keys) * cost >= len(rows):
        return None
    fours, *found = np.unravel_index(keys, sides)
    olds = entries.channels, entries.down, entries.across
    found = [each + old.min(initial=0) for each, old in zip(found, olds, strict=True)]
    weights = np.zeros((len(keys), 4), np.float32)
    weights[which.reshape(-1), rows % 4] = entries.weights
    starts = 4 * _starts(fours, -(-outputs // 4))
    return Entries(starts, weights.reshape(-1), *(np.repeat(each, 4) for each in found))


def _starts(rows: Ints, outputs: int) -> Ints:
    return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=outputs))])


def range_of(shifts: Ints) -> Pair:
    """The least and the greatest shift, 0 among them."""
    return (min(0, int(shifts.min())), max(0, int(shifts.max()))) if len(shifts) else (0, 0)
