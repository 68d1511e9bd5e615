"""The operations of a graph on flattened values: sparse matrices for those that are affine, indices for windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch.nn import functional as F

from atmc.deploy.graph.graph import Affine, AvgPool, Conv, GlobalAvgPool, Linear, MaxPool, Pair, Shape

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
Matrix = Any  # scipy.sparse.csr_array of float64; scipy has no types
ABSENT = -1  # index of a pixel of the padding


def build_affine(
    op: Conv | Linear | Affine | AvgPool | GlobalAvgPool, before: Shape, after: Shape
) -> tuple[Matrix, Array]:
    """Return the matrix (outputs, inputs) and the offset (outputs,) of an affine operation on flattened values.

    Means have weights that are rounded to float64; all other weights are those of the operation.

    Args:
        before, after: shapes of its input and its output.
    """
    match op:
        case Linear():
            return sparse.csr_array(op.weight.astype(np.float64)), op.bias.astype(np.float64)
        case Affine():
            repeats = int(np.prod(before[1:]))
            scale, shift = (np.repeat(values.astype(np.float64), repeats) for values in (op.scale, op.shift))
            return sparse.diags_array(scale, format="csr"), shift
        case Conv():
            return _convolution(op, before, after), np.repeat(op.bias.astype(np.float64), after[1] * after[2])
        case AvgPool():
            return _mean(op, before, after), np.zeros(int(np.prod(after)))
        case GlobalAvgPool():
            area = before[1] * before[2]
            matrix = sparse.kron(sparse.eye_array(before[0]), np.full((1, area), 1 / area), format="csr")
            return sparse.csr_array(matrix), np.zeros(before[0])


def list_windows(op: MaxPool, before: Shape, after: Shape) -> Indices:
    """Return (taps, outputs) the indices of the inputs of each window of a max pooling; ABSENT for the padding."""
    taps = _windows(before, after, op.kernel, op.stride, op.padding, op.dilation)
    channel = np.arange(before[0])[None, :, None] * (before[1] * before[2])
    return np.where(taps[:, None] == ABSENT, ABSENT, taps[:, None] + channel).reshape(len(taps), -1)


def _windows(before: Shape, after: Shape, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Indices:
    """Return (taps, positions) the pixels, from 0 to h w - 1, that each window reads; ABSENT for the padding."""
    sides = [
        np.arange(taps)[:, None] * gap + np.arange(count)[None] * step - pad
        for taps, count, step, pad, gap in zip(kernel, after[1:], stride, padding, dilation, strict=True)
    ]
    (down, across), (height, width) = sides, before[1:]
    rows, columns = down[:, None, :, None], across[None, :, None, :]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return np.where(inside, rows * width + columns, ABSENT).reshape(kernel[0] * kernel[1], -1)


def _convolution(op: Conv, before: Shape, after: Shape) -> Matrix:
    kernel: Pair = op.weight.shape[2:]
    taps = _windows(before, after, kernel, op.stride, op.padding, op.dilation)
    area, positions = before[1] * before[2], taps.shape[1]
    weight = op.weight.astype(np.float64).reshape(*op.weight.shape[:2], -1)
    output, channel, tap = weight.nonzero()
    group = output // (op.weight.shape[0] // op.groups)
    row = output[:, None] * positions + np.arange(positions)
    column = (group * op.weight.shape[1] + channel)[:, None] * area + taps[tap]
    inside = taps[tap] != ABSENT
    values = np.broadcast_to(weight[output, channel, tap][:, None], inside.shape)
    shape = int(np.prod(after)), int(np.prod(before))
    return sparse.coo_array((values[inside], (row[inside], column[inside])), shape=shape).tocsr()


def _mean(op: AvgPool, before: Shape, after: Shape) -> Matrix:
    taps = _windows(before, after, op.kernel, op.stride, op.padding, (1, 1))
    inside = taps != ABSENT
    ones = torch.ones(1, 1, *before[1:], dtype=torch.float64)
    mean = F.avg_pool2d(ones, op.kernel, op.stride, op.padding, op.ceil_mode, op.count_padding)
    weight = mean.numpy().reshape(-1) / inside.sum(0).clip(1)  # one over the divisor that PyTorch takes
    shape = taps.shape[1], before[1] * before[2]
    position = np.broadcast_to(np.arange(taps.shape[1]), taps.shape)[inside]
    matrix = sparse.coo_array((weight[position], (position, taps[inside])), shape=shape)
    return sparse.csr_array(sparse.kron(sparse.eye_array(before[0]), matrix, format="csr"))
