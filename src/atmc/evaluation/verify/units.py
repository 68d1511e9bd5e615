"""The values of a network around one image as affine forms of its pixels and of the maxima that are open there.

The *variables* are the pixels and the *units*: the maxima y = max(x_1, ..., x_k) of ReLUs and max poolings that more
than one candidate x_i may attain on the images of the box. All values of the network are affine in the variables, to
within an error that covers the rounding of float32 and of the calculation here (docs/verification.md, "Linear bounds").

Legend: delta = 2^-34, which is more than the relative rounding of 2^18 float64 additions; v variables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from atmc.evaluation.verify.matrices import ABSENT, Array, Indices, Matrix

DELTA = 2.0**-34
VECTORS = ("offset", "error", "terms", "lower", "upper")  # of Rows
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False, kw_only=True)
class Rows:
    """Values that are affine in the variables: |value - (matrix @ variables + offset)| <= error, row by row.

    Args:
        matrix: (rows, v), sparse.
        offset, error: (rows,).
        terms: (rows,) upper bounds of |matrix| @ |variables| + |offset|.
        lower, upper: (rows,) bounds of the values. Both are -infinity for the padding of a max pooling.
    """

    matrix: Matrix
    offset: Array
    error: Array
    terms: Array
    lower: Array
    upper: Array

    @classmethod
    def constant(cls, values: Array, variables: int) -> Self:
        """Return values that depend on no variable."""
        matrix, zero = sparse.csr_array((len(values), variables)), np.zeros(len(values))
        return cls(matrix=matrix, offset=values, error=zero, terms=np.abs(values), lower=values, upper=values)

    @classmethod
    def of_pixels(cls, lower: Array, upper: Array, variables: int) -> Self:
        """Return the pixels, which are the first variables, with their box."""
        matrix = sparse.eye_array(len(lower), variables, format="csr")
        zero, terms = np.zeros(len(lower)), np.maximum(np.abs(lower), np.abs(upper))
        return cls(matrix=matrix, offset=zero, error=zero, terms=terms, lower=lower, upper=upper)

    @property
    def magnitude(self) -> Array:
        """The largest absolute value of each row."""
        return np.maximum(np.abs(self.lower), np.abs(self.upper))

    def __getitem__(self, rows: Indices | Mask) -> Self:
        return replace(self, matrix=self.matrix[rows], **{name: getattr(self, name)[rows] for name in VECTORS})

    def take(self, rows: Indices) -> Self:
        """Return the rows of these indices; those of ABSENT never win a maximum."""
        absent, result = rows == ABSENT, self[rows]
        bounds = (np.where(absent, -np.inf, values) for values in (result.lower, result.upper))
        return replace(result, lower=next(bounds), upper=next(bounds))

    def apply(self, matrix: Matrix, offset: Array, margin: Array) -> Self:
        """Return an affine map of the values, which float32 computes to within a margin."""
        absolute = abs(matrix)
        terms = (absolute @ self.terms + np.abs(offset)) * (1 + DELTA)
        middle, radius = (self.upper + self.lower) / 2, (self.upper - self.lower) / 2
        center = matrix @ middle + offset
        reach = absolute @ radius + margin + DELTA * (absolute @ self.magnitude + np.abs(offset))
        return replace(
            self,
            matrix=matrix @ self.matrix,
            offset=matrix @ self.offset + offset,
            error=(absolute @ self.error + margin + DELTA * terms) * (1 + DELTA),
            terms=terms,
            lower=center - reach,
            upper=center + reach,
        )

    def plus(self, other: Self, sign: int = 1, margin: Array | float = 0.0) -> Self:
        """Return the sum, or for sign -1 the difference, which float32 computes to within a margin."""
        terms = (self.terms + other.terms) * (1 + DELTA)
        low, high = (other.lower, other.upper) if sign > 0 else (-other.upper, -other.lower)
        slack = margin + DELTA * (self.magnitude + other.magnitude)
        return replace(
            self,
            matrix=self.matrix + sign * other.matrix,
            offset=self.offset + sign * other.offset,
            error=(self.error + other.error + margin + DELTA * terms) * (1 + DELTA),
            terms=terms,
            lower=self.lower + low - slack,
            upper=self.upper + high + slack,
        )

    def negate(self) -> Self:
        """Return the values with the other sign."""
        return replace(self, matrix=-self.matrix, offset=-self.offset, lower=-self.upper, upper=-self.lower)

    def within(self, lower: Array, upper: Array) -> Self:
        """Return the same values with bounds that may be tighter; NaN says nothing."""
        return replace(self, lower=np.fmax(self.lower, lower), upper=np.fmin(self.upper, upper))


def stack(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all parts, one part after the other."""
    return Rows(
        matrix=sparse.vstack([part.matrix for part in parts], format="csr"),
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in VECTORS},
    )
