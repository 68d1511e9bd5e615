"""Export the question whether a model can be fooled near an image as a property in VNN-LIB 1.0, as VNN-COMP uses it.

A property asks for a counterexample: an image X of a box and outputs Y of the network on it, such that the output of
another class is at least that of the label. "unsat" means that there is none, so that the image is certified.
VNN-LIB: Demarchi, Guidotti, Pulina and Tacchella 2023, "Supporting standardization of neural networks verification with
VNN-LIB and CoCoNet"; VNN-COMP: Brix et al. 2023, "First three years of the international verification of neural
networks competition".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

from atmc.deploy.graph.graph import FloatArray

PLACES = 12  # decimals of a bound


def to_vnnlib(image: FloatArray, label: int, eps: float, classes: int, *, comments: Sequence[str] = ()) -> str:
    """Return the property of one image under the l-infinity threat of radius eps.

    X_i, the i-th pixel in the order (c, h, w), lies in [x_i - eps, x_i + eps] within [0, 1]. The ends are calculated
    exactly and rounded outward to 12 decimals.

    Args:
        image: (c, h, w) float32 in [0, 1].
        classes: the number of outputs.
        comments: lines for the head of the file.

    Raises:
        ValueError: the label is no class, or a pixel lies outside [0, 1].

    >>> import numpy as np
    >>> print(to_vnnlib(np.full((1, 1, 1), 0.25, np.float32), 1, 0.3, 2))
    (declare-const X_0 Real)
    (declare-const Y_0 Real)
    (declare-const Y_1 Real)
    (assert (>= X_0 0.000000000000))
    (assert (<= X_0 0.550000000000))
    (assert (or
      (and (>= Y_0 Y_1))
    ))
    <BLANKLINE>
    """
    if not 0 <= label < classes:
        raise ValueError(f"expected a label from 0 to {classes - 1}, got {label}")
    if not ((image >= 0) & (image <= 1)).all():
        raise ValueError("expected pixels in [0, 1]")
    pixels = image.ravel().tolist()
    lines = [f"; {line}" for comment in comments for line in comment.splitlines()]
    lines += [f"(declare-const X_{i} Real)" for i in range(len(pixels))]
    lines += [f"(declare-const Y_{j} Real)" for j in range(classes)]
    for i, pixel in enumerate(pixels):
        low, high = _bound_pixel(pixel, eps)
        lines += [f"(assert (>= X_{i} {low}))", f"(assert (<= X_{i} {high}))"]
    others = [f"  (and (>= Y_{j} Y_{label}))" for j in range(classes) if j != label]
    return "\n".join([*lines, "(assert (or", *others, "))", ""])


def _bound_pixel(pixel: float, eps: float) -> tuple[str, str]:
    """Return the ends of [pixel - eps, pixel + eps] within [0, 1] as decimal numbers, rounded outward."""
    unit = 10**PLACES
    low = math.floor((Fraction(pixel) - Fraction(eps)) * unit)
    high = math.ceil((Fraction(pixel) + Fraction(eps)) * unit)
    return _format(max(low, 0)), _format(min(high, unit))


def _format(units: int) -> str:
    return f"{Decimal(units).scaleb(-PLACES):f}"
