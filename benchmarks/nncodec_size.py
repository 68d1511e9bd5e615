"""Measure the bytes that NNCodec needs for the arrays of an .npz file, in an environment of its own (`file_size`).

    python -m venv runs/nncodec
    runs/nncodec/bin/pip install torch==2.13.0 numpy==1.26.4 nncodec==2.1.3
    runs/nncodec/bin/python benchmarks/nncodec_size.py WEIGHTS.npz 0.01

Prints one JSON object: of the settings tried here, the one with the fewest bytes whose relative error (the norm of the
difference over the norm of all arrays together) is at most the second argument. It tries dependent quantization on and
off, and each qp (qp_density 3, steps of 9 %) from the coarsest that meets the error to FINER finer ones, since a finer
grid may happen to fit the codebook's values better; for more than LARGE values, of which a trial takes long, only the
coarsest. The arrays' names in the stream are single characters.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
import time
from typing import Any

import numpy as np
import torch

try:  # nncodec imports torchvision, of which nothing is used
    import torchvision  # type: ignore[import-not-found]  # noqa: F401
except RuntimeError:  # a build that does not fit this torch lacks operators that it describes on import
    library: Any = torch.library
    OPERATORS = library.Library("torchvision", "DEF")
    OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from nncodec import nnc  # type: ignore[import-not-found]

DENSITY, FINER, START, LARGE = 3, 4, -47, 5_000_000


def encode(arrays: dict[str, np.ndarray], qp: int, dependent: bool) -> tuple[int, float]:
    """Return the bytes of the stream, and its relative error."""
    with contextlib.redirect_stdout(io.StringIO()):
        stream = nnc.compress(
            {name: array.copy() for name, array in arrays.items()},
            bitstream_path=os.devnull,
            qp=qp,
            qp_density=DENSITY,
            nonweight_qp=qp,
            use_dq=dependent,
            row_skipping=True,
            return_bitstream=True,
        )
        decoded: dict[str, Any] = nnc.decompress(stream)
    error = sum(float(np.square(array.astype(np.float64) - decoded[name]).sum()) for name, array in arrays.items())
    norm = sum(float(np.square(array.astype(np.float64)).sum()) for array in arrays.values())
    return len(stream), (error / norm) ** 0.5


def fewest_bytes(arrays: dict[str, np.ndarray], limit: float) -> dict[str, Any]:
    """Return the setting of the fewest bytes at a relative error of at most the limit."""
    tried: list[dict[str, Any]] = []
    finer = FINER if sum(array.size for array in arrays.values()) <= LARGE else 0
    for dependent in (True, False):
        results: dict[int, tuple[int, float]] = {}  # qp -> (bytes, error)
        qp = START
        while qp not in results:  # the error is about proportional to the step, 2^(qp / 8)
            results[qp] = encode(arrays, qp, dependent)
            qp += math.floor(8 * math.log2(limit / results[qp][1]))
        low = max((qp for qp, (_, error) in results.items() if error <= limit), default=qp)
        while low + 1 not in results:  # a coarser one may do as well
            results[low + 1] = encode(arrays, low + 1, dependent)
            low += results[low + 1][1] <= limit
        for qp in range(low - finer, low + 1):
            size, error = results.get(qp) or encode(arrays, qp, dependent)
            if error <= limit:
                tried.append({"bytes": size, "error": error, "qp": qp, "dependent_quantization": dependent})
    return {**min(tried, key=lambda row: row["bytes"]), "qp_density": DENSITY}


def main() -> None:
    """Read the arrays, and print the best setting."""
    with np.load(sys.argv[1]) as stored:
        names = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
        arrays = {names[i] if i < len(names) else str(i): stored[key] for i, key in enumerate(stored.files)}
    start = time.perf_counter()
    result = fewest_bytes(arrays, float(sys.argv[2]))
    print(json.dumps({**result, "seconds": round(time.perf_counter() - start, 1)}))


if __name__ == "__main__":
    main()
