"""How small a model must be, and how small it is: the paper's nominal count.

Legend: N the number of conv and linear weights of the plain dense model (no biases, no batch norm).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """What the compressed model may hold.

    Args:
        ratio: nonzeros over all factors as a share of N, in (0, 1]; k = int(ratio * N). The paper's knob.
        nonzeros: k itself. Exactly one of the two.
        bits: at most 2^bits distinct nonzero values a tensor, 1 to 8; None keeps 32-bit values.

    >>> Budget(ratio=0.01, bits=4).resolve(430_500)
    4305
    """

    ratio: float | None = None
    nonzeros: int | None = None
    bits: int | None = None

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.nonzeros is None):
            raise ValueError("expected exactly one of ratio and nonzeros")
        if self.ratio is not None and not (math.isfinite(self.ratio) and 0 < self.ratio <= 1):
            raise ValueError(f"expected a ratio above 0 and at most 1, got {self.ratio}")
        if self.nonzeros is not None and self.nonzeros < 1:
            raise ValueError(f"expected nonzeros >= 1, got {self.nonzeros}")
        if self.bits is not None and not 1 <= self.bits <= 8:
            raise ValueError(f"expected 1 to 8 bits, or none for 32-bit values, got {self.bits}")

    def resolve(self, dense_weights: int, *, floor: int = 1) -> int:
        """k for a model with so many conv and linear weights.

        Raises:
            ValueError: k is above the model's weights or below floor (what its layers need at least).
        """
        k = self.nonzeros if self.nonzeros is not None else int((self.ratio or 0) * dense_weights)
        if k > dense_weights:
            raise ValueError(f"a budget of {k:,} nonzeros is larger than the model: {dense_weights:,} weights")
        if k < floor:
            raise ValueError(
                f"a budget of {k:,} nonzeros is below the floor of this model and method, {floor:,}"
                f" (ratio {floor / dense_weights:.2g})"
            )
        return k


def distinct_nonzero(tensor: Tensor) -> int:
    """Number of distinct nonzero values."""
    flat = tensor.detach()
    return len(torch.unique(flat[flat != 0]))


def nominal_bits(tensors: Mapping[str, Tensor], bits: int | None) -> int:
    """The paper's size, in bits: positions, biases and batch norm are not counted.

    Per tensor 32 a nonzero where there is no codebook or at most 2^bits nonzeros; else `bits` a nonzero and 32 a
    distinct nonzero value (Gui et al. 2019, section 4; the authors' program). A tensor with more distinct values than
    that, before its quantization, counts as having no codebook.
    """
    total = 0
    for tensor in tensors.values():
        count = int(tensor.count_nonzero())
        levels = 0 if bits is None or count <= 2**bits else distinct_nonzero(tensor)
        coded = bits is not None and 0 < levels <= 2**bits
        total += (bits or 0) * count + 32 * levels if coded else 32 * count
    return total
