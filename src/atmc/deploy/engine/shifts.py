"""Describe the nonzeros of a layer as shifts of its input's streams; `steps` explains streams and phases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from atmc.deploy.graph.graph import Conv, FloatArray, Linear, Pair

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Polyphase:
    """Splits a value into phases: every stride-th row and column, from each offset (row, column) on.

    Phase i of channel c becomes channel c * len(offsets) + i.
    """

    stride: Pair
    offsets: tuple[Pair, ...]


@dataclass(frozen=True, eq=False)
class Diagonal:
    """x * scale + bias of (features,): a linear layer whose zeros are not stored."""

    scale: FloatArray
    bias: FloatArray


@dataclass(frozen=True, eq=False)
class Taps:
    """The nonzero weights of a layer, sorted by output.

    Args:
        starts: (outputs + 1,), where the taps of each output begin, and the number of all taps.
        weights: (taps,).
        channels: (taps,), the input channel that each tap reads.
        down, across: (taps,), by how many rows and columns it reads beside the position that is computed.
    """

    starts: Ints
    weights: FloatArray
    channels: Ints
    down: Ints
    across: Ints


def phase_of_taps(op: Conv) -> Ints:
    """Return (kh, kw, 2): the phase (row, column) that each tap of a strided kernel reads."""
    positions = np.stack(np.meshgrid(*_kernel_offsets(op), indexing="ij"), axis=-1)
    return cast(Ints, positions % np.array(op.stride))


def _kernel_offsets(op: Conv) -> list[Ints]:
    """Return (kh,) and (kw,): the offsets of the kernel's rows and columns in the input."""
    sides = zip(op.weight.shape[2:], op.dilation, op.padding, strict=True)
    return [np.arange(k) * d - p for k, d, p in sides]


def find_taps(op: Conv | Linear | Diagonal, polyphase: Polyphase | None) -> Taps:
    """Return the taps of a layer; polyphase: how its input was split into phases, for a strided convolution."""
    if isinstance(op, Diagonal):
        columns, zero = np.arange(len(op.scale)), np.zeros(len(op.scale), np.int64)
        return Taps(np.arange(len(op.scale) + 1), op.scale, columns, zero, zero)
    if isinstance(op, Linear):
        rows, columns = np.nonzero(op.weight)
        zero = np.zeros(len(rows), np.int64)
        return Taps(_starts(rows, len(op.weight)), op.weight[rows, columns], columns, zero, zero)
    outputs, channels, ky, kx = np.nonzero(op.weight)
    weights = op.weight[outputs, channels, ky, kx]
    per_group = len(op.weight) // op.groups
    channels = channels + outputs // per_group * op.weight.shape[1]
    down, across = (offsets[k] for offsets, k in zip(_kernel_offsets(op), (ky, kx), strict=True))
    if polyphase is not None:
        sy, sx = polyphase.stride
        numbers = np.zeros(polyphase.stride, np.int64)
        for number, offset in enumerate(polyphase.offsets):
            numbers[offset] = number
        channels = channels * len(polyphase.offsets) + numbers[down % sy, across % sx]
        down, across = down // sy, across // sx
    return Taps(_starts(outputs, len(op.weight)), weights, channels, down, across)


def group_in_fours(taps: Taps, cost: float) -> Taps | None:
    """Group outputs four at a time: each tap then has the weights of all four, zeros included.

    Args:
        cost: of a tap of four outputs, in taps of one output.

    Returns:
        taps whose `starts` has one entry per four outputs (zeros fill up the last four), and four consecutive weights
        per shift; None if that is not faster.
    """
    outputs = len(taps.starts) - 1
    if cost >= 4:
        return None
    rows = np.repeat(np.arange(outputs), np.diff(taps.starts))
    reads = taps.channels, taps.down, taps.across
    least = [int(values.min(initial=0)) for values in reads]
    shifts = [values - low for values, low in zip(reads, least, strict=True)]
    sides = [-(-outputs // 4), *(int(values.max(initial=0)) + 1 for values in shifts)]
    keys, key_of_tap = np.unique(np.ravel_multi_index([rows // 4, *shifts], sides), return_inverse=True)
    if len(keys) * cost >= len(rows):
        return None
    fours, *shifts = np.unravel_index(keys, sides)
    weights = np.zeros((len(keys), 4), np.float32)
    weights[key_of_tap.reshape(-1), rows % 4] = taps.weights
    channels, down, across = (np.repeat(values + low, 4) for values, low in zip(shifts, least, strict=True))
    return Taps(4 * _starts(fours, -(-outputs // 4)), weights.reshape(-1), channels, down, across)


def _starts(rows: Ints, outputs: int) -> Ints:
    return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=outputs))])


def shift_range(shifts: Ints) -> Pair:
    """Return the least and the greatest of some shifts and 0."""
    return (min(0, int(shifts.min())), max(0, int(shifts.max()))) if len(shifts) else (0, 0)
