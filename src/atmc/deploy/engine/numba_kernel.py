"""The kernel in Numba, for machines on which the one in C++ could not be built.

native/kernel.cpp explains the operations; the two kernels agree up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import numpy as np
from numba import boolean, float32, int32, int64, types
from numpy.typing import NDArray

from atmc.core.jit import Compiled, compile_function
from atmc.deploy.engine.program import KINDS, NONZERO, OP, Program
from atmc.deploy.graph.graph import FloatArray

Integers = NDArray[np.int32]
Nonzeros = NDArray[Any]

BLOCK = 1024  # positions at once, so that a block of sums and its inputs stay in the nearest cache
NAMES = (  # in an order of its own: the cache of Numba does not notice changes of `program.KINDS`
    *("pack", "convolve", "convolve_fours", "dot", "phases"),
    *("elementwise", "max_pool", "mean_pool", "flatten", "unpack"),
)
PACK, CONVOLVE, CONVOLVE_FOURS, DOT, PHASES, ELEMENTWISE, MAX_POOL, MEAN_POOL, FLATTEN, UNPACK = range(len(NAMES))

_OP = numba.from_dtype(OP)
_ARENA = types.Array(float32, 1, "C")
_FLOATS, _INTEGERS = (types.Array(kind, 1, "C", readonly=True) for kind in (float32, int32))
_NONZEROS = types.Array(numba.from_dtype(NONZERO), 1, "C", readonly=True)


class NumbaKernel:
    """Runs programs on one thread."""

    def __init__(self) -> None:
        self._last: tuple[Program, Integers] | None = None  # the program bound last, and the kinds of its operations

    def bind(self, program: Program, arena: FloatArray, images: FloatArray, logits: FloatArray) -> Callable[[], None]:
        """Return a function that writes the logits (n, classes) of images (n, c, h, w) each time it is called.

        All arrays are contiguous float32 and of the program's sizes.
        """

        if self._last is None or self._last[0] is not program:
            kinds = np.array([NAMES.index(KINDS[kind]) for kind in program.ops["kind"]], np.int32)
            self._last = program, kinds
        tables = program.ops, program.nonzeros, program.starts, program.floats, program.masks
        return partial(_run, self._last[1], *tables, arena, images.reshape(-1), logits.reshape(-1))


def _compile(*arguments: types.Type, result: types.Type = types.void) -> Callable[[Compiled], Compiled]:
    """Compile a function now, or read it from the cache; sums may be reordered, and products in them not rounded."""
    return partial(
        _compile_for, result(*arguments), {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc"}}
    )


def _compile_for(signature: Any, options: dict[str, Any], function: Compiled) -> Compiled:
    return compile_function(function, signature, **options)


@_compile(_OP, _FLOATS, _ARENA, _FLOATS)
def _pack(op: Any, floats: FloatArray, arena: FloatArray, images: FloatArray) -> None:
    width, area = op["width"], op["height"] * op["width"]
    for channel in range(op["channels"]):
        scale, shift = floats[op["bias"] + 2 * channel], floats[op["bias"] + 2 * channel + 1]
        out = op["out"] + channel * op["out_stride"]
        arena[out : out + op["out_stride"]] = 0
        for n in range(op["batch"]):
            for y in range(op["height"]):
                at = (n * op["channels"] + channel) * area + y * width
                to = out + n * op["out_image"] + y * op["out_row"]
                pixels, row = images[at : at + width], arena[to : to + width]
                for x in range(width):
                    row[x] = pixels[x] * scale + shift


@_compile(_OP, _INTEGERS, _ARENA)
def _clamp(op: Any, mask: Integers, out: FloatArray) -> None:
    """Clamp a stream between low and high, and set its padding to zero."""
    low, high, zero = np.float32(op["low"]), np.float32(op["high"]), np.float32(0)
    for p in range(len(out)):
        out[p] = min(max(out[p], low), high) if mask[p] != 0 else zero


@_compile(_OP, _NONZEROS, _INTEGERS, _FLOATS, _INTEGERS, _ARENA, int64)
def _convolve(
    op: Any, nonzeros: Nonzeros, starts: Integers, floats: FloatArray, masks: Integers, arena: FloatArray, together: int
) -> None:
    """Convolve; `together` channels, 1 or 4, share their taps: of 4, each has every 4th nonzero."""
    weights, offsets = nonzeros["weight"], nonzeros["offset"]
    length = op["vectors"] * 16
    for begin in range(0, length, BLOCK):
        n, first = min(BLOCK, length - begin), op["in"] + begin
        mask = masks[op["mask"] + begin : op["mask"] + begin + n]
        for channel in range(op["channels"]):
            place = channel * op["out_stride"] + begin
            out = arena[op["out"] + place : op["out"] + place + n]
            out[:] = floats[op["bias"] + channel]
            row = op["rows"] + channel // together
            k, end = starts[row] + channel % together, starts[row + 1]
            while k + 3 * together < end:
                k1, k2, k3 = k + together, k + 2 * together, k + 3 * together
                a0, a1, a2, a3 = first + offsets[k], first + offsets[k1], first + offsets[k2], first + offsets[k3]
                x0, x1, x2, x3 = arena[a0 : a0 + n], arena[a1 : a1 + n], arena[a2 : a2 + n], arena[a3 : a3 + n]
                w0, w1, w2, w3 = weights[k], weights[k1], weights[k2], weights[k3]
                for p in range(n):
                    out[p] += w0 * x0[p] + w1 * x1[p] + w2 * x2[p] + w3 * x3[p]
                k += 4 * together
            while k < end:
                w0, a0 = weights[k], first + offsets[k]
                x0 = arena[a0 : a0 + n]
                for p in range(n):
                    out[p] += w0 * x0[p]
                k += together
            if op["other"] >= 0:
                out += arena[op["other"] + place : op["other"] + place + n]
            _clamp(op, mask, out)


@_compile(_OP, _NONZEROS, _INTEGERS, _FLOATS, _ARENA)
def _dot(op: Any, nonzeros: Nonzeros, starts: Integers, floats: FloatArray, arena: FloatArray) -> None:
    weights, offsets = nonzeros["weight"], nonzeros["offset"]
    low, high = np.float32(op["low"]), np.float32(op["high"])
    for channel in range(op["channels"]):
        total = floats[op["bias"] + channel]
        for k in range(starts[op["rows"] + channel], starts[op["rows"] + channel + 1]):
            total += weights[k] * arena[op["in"] + offsets[k]]
        if op["other"] >= 0:
            total += arena[op["other"] + channel]
        arena[op["out"] + channel] = min(max(total, low), high)


@_compile(_OP, _ARENA)
def _phases(op: Any, arena: FloatArray) -> None:
    count = (op["width"] - op["pad_x"] + op["stride_x"] - 1) // op["stride_x"]
    for channel in range(op["channels"]):
        out = op["out"] + (channel * op["kernel_y"] + op["mask"]) * op["out_stride"]
        arena[out : out + op["out_stride"]] = 0
        for n in range(op["batch"]):
            for to_y, y in enumerate(range(op["pad_y"], op["height"], op["stride_y"])):
                at = op["in"] + channel * op["in_stride"] + n * op["image"] + y * op["row"] + op["pad_x"]
                to = out + n * op["out_image"] + to_y * op["out_row"]
                row, pixels = arena[to : to + count], arena[at : at + op["stride_x"] * count]
                for x in range(count):
                    row[x] = pixels[op["stride_x"] * x]


@_compile(_OP, _FLOATS, _INTEGERS, _ARENA)
def _elementwise(op: Any, floats: FloatArray, masks: Integers, arena: FloatArray) -> None:
    n = op["vectors"] * 16
    mask = masks[op["mask"] : op["mask"] + n]
    for channel in range(op["channels"]):
        scale, shift = floats[op["bias"] + 2 * channel], floats[op["bias"] + 2 * channel + 1]
        at, place = op["in"] + channel * op["in_stride"], channel * op["out_stride"]
        out, source = arena[op["out"] + place : op["out"] + place + n], arena[at : at + n]
        for p in range(n):
            out[p] = source[p] * scale + shift
        if op["other"] >= 0:
            out += arena[op["other"] + place : op["other"] + place + n]
        _clamp(op, mask, out)


@_compile(_OP, _ARENA, int64, int64, int64, boolean, result=float32)
def _window(op: Any, arena: FloatArray, image: int, top: int, left: int, largest: bool) -> Any:
    """Return the maximum or mean of the pixels of a window, whose first pixel is (top, left), inside the image."""
    best, total, count = np.float32(-np.inf), np.float32(0), 0
    for ky in range(op["kernel_y"]):
        y = top + ky * op["dilation_y"]
        if 0 <= y < op["height"]:
            for kx in range(op["kernel_x"]):
                x = left + kx * op["dilation_x"]
                if 0 <= x < op["width"]:
                    value = arena[image + y * op["row"] + x]
                    best = max(best, value)
                    total += value
                    count += 1
    if op["count_padding"]:
        down = min(top + op["kernel_y"], op["height"] + op["pad_y"]) - top
        count = down * (min(left + op["kernel_x"], op["width"] + op["pad_x"]) - left)
    return best if largest else total / np.float32(count)


@_compile(_OP, _ARENA, boolean)
def _pool(op: Any, arena: FloatArray, largest: bool) -> None:
    low, high = np.float32(op["low"]), np.float32(op["high"])
    for channel in range(op["channels"]):
        out = op["out"] + channel * op["out_stride"]
        arena[out : out + op["out_stride"]] = 0
        for n in range(op["batch"]):
            image = op["in"] + channel * op["in_stride"] + n * op["image"]
            for y in range(op["out_height"]):
                to, top = out + n * op["out_image"] + y * op["out_row"], y * op["stride_y"] - op["pad_y"]
                for x in range(op["out_width"]):
                    value = _window(op, arena, image, top, x * op["stride_x"] - op["pad_x"], largest)
                    arena[to + x] = min(max(value, low), high)


@_compile(_OP, _ARENA)
def _flatten(op: Any, arena: FloatArray) -> None:
    out = op["out"]
    for channel in range(op["channels"]):
        for y in range(op["height"]):
            for x in range(op["width"]):
                at = op["in"] + channel * op["in_stride"] + y * op["row"] + x
                for n in range(op["batch"]):
                    arena[out + n] = arena[at + n * op["image"]]
                arena[out + op["batch"] : out + op["out_stride"]] = 0
                out += op["out_stride"]


@_compile(_INTEGERS, types.Array(_OP, 1, "C"), _NONZEROS, _INTEGERS, _FLOATS, _INTEGERS, _ARENA, _FLOATS, _ARENA)
def _run(
    kinds: Integers,
    ops: NDArray[np.void],
    nonzeros: Nonzeros,
    starts: Integers,
    floats: FloatArray,
    masks: Integers,
    arena: FloatArray,
    images: FloatArray,
    logits: FloatArray,
) -> None:
    for i in range(len(ops)):
        op, kind = ops[i], kinds[i]
        arena[op["out"] - op["lead"] : op["out"]] = 0
        if kind in (CONVOLVE, CONVOLVE_FOURS, ELEMENTWISE):
            for channel in range(op["channels"]):
                out = op["out"] + channel * op["out_stride"]
                arena[out + op["vectors"] * 16 : out + op["out_stride"]] = 0
        if kind == PACK:
            _pack(op, floats, arena, images)
        elif kind in (CONVOLVE, CONVOLVE_FOURS):
            _convolve(op, nonzeros, starts, floats, masks, arena, 4 if kind == CONVOLVE_FOURS else 1)
        elif kind == DOT:
            _dot(op, nonzeros, starts, floats, arena)
        elif kind == PHASES:
            _phases(op, arena)
        elif kind == ELEMENTWISE:
            _elementwise(op, floats, masks, arena)
        elif kind in (MAX_POOL, MEAN_POOL):
            _pool(op, arena, kind == MAX_POOL)
        elif kind == FLATTEN:
            _flatten(op, arena)
        elif kind == UNPACK:
            for n in range(op["batch"]):
                for feature in range(op["channels"]):
                    logits[n * op["channels"] + feature] = arena[op["in"] + feature * op["in_stride"] + n]
