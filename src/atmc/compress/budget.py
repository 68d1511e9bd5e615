"""State how small a model must be, and measure how small it is by the paper's nominal size.

`rate_control` keeps budgets in bytes.

Legend: N the number of conv and linear weights of the plain dense model (no biases, no batch norm); k the number of
nonzeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from atmc.core.arguments import AT_LEAST_ONE, Bounds, parse_real, parse_whole

UNITS = {"B": 1, "kB": 1000, "KiB": 1024, "MB": 1000**2, "MiB": 1024**2}


@dataclass(frozen=True)
class Budget:
    """How small the compressed model must be: exactly one of ratio, nonzeros and max_bytes is given.

    Args:
        ratio: the nonzeros of all factors divided by N, in (0, 1], as in the paper; k = int(ratio * N).
        nonzeros: k itself.
        max_bytes: the largest size of the written file, a number or a text such as "24kB".
        bits: at most 2^bits distinct nonzero values per tensor, 1 to 8; None keeps 32-bit values, or, with max_bytes,
            leaves the bits of each tensor to rate control.

    Numbers may be of any type, such as numpy's; they are held as Python's.

    >>> Budget(ratio=0.01, bits=4).resolve(430_500)
    4305
    """

    ratio: float | None = None
    nonzeros: int | None = None
    max_bytes: int | None = None
    bits: int | None = None

    def __post_init__(self) -> None:
        if [self.ratio, self.nonzeros, self.max_bytes].count(None) != 2:
            raise ValueError("expected exactly one of ratio, nonzeros and max_bytes")
        parsed: dict[str, float | None] = {}
        if self.ratio is not None:
            parsed["ratio"] = parse_real("a ratio", self.ratio, Bounds(low=0, high=1, open_low=True))
        if self.nonzeros is not None:
            parsed["nonzeros"] = parse_whole("nonzeros", self.nonzeros, AT_LEAST_ONE)
        if self.max_bytes is not None:
            size = parse_size(self.max_bytes) if isinstance(self.max_bytes, str) else self.max_bytes
            parsed["max_bytes"] = parse_whole("max_bytes", size, AT_LEAST_ONE)
        if self.bits is not None:
            parsed["bits"] = parse_whole("bits", self.bits, Bounds(low=1, high=8))
        for name, value in parsed.items():
            object.__setattr__(self, name, value)

    def resolve(self, dense_weights: int, *, floor: int = 1) -> int:
        """Return k for a model with N = dense_weights; with max_bytes it is a first guess from floor to N.

        Args:
            floor: the smallest k that the model's layers can work with.

        Raises:
            ValueError: k is above N or below floor.
        """
        if self.max_bytes is not None:
            return max(min(4 * self.max_bytes // 8, dense_weights), min(floor, dense_weights))
        k = self.nonzeros if self.nonzeros is not None else int((self.ratio or 0) * dense_weights)
        if k > dense_weights:
            raise ValueError(f"a budget of {k:,} nonzeros is larger than the model: {dense_weights:,} weights")
        if k < floor:
            raise ValueError(
                f"a budget of {k:,} nonzeros is below the floor of this model and method, {floor:,}"
                f" (ratio {floor / dense_weights:.2g})"
            )
        return k


def parse_size(text: str | int) -> int:
    """Return the bytes that a text means: 900B, 24kB (1000), 24KiB (1024), 1.5MB, 1MiB, or a number of bytes.

    >>> parse_size("24kB"), parse_size("1.5 KiB")
    (24000, 1536)

    Raises:
        ValueError: the text is no size of at least one byte.
    """
    number, unit = str(text).strip(), "B"
    for name in sorted(UNITS, key=len, reverse=True):
        if number.endswith(name):
            number, unit = number.removesuffix(name).strip(), name
            break
    try:
        size = float(number) * UNITS[unit]
    except ValueError:
        size = math.nan
    if not (math.isfinite(size) and size >= 1):
        raise ValueError(f"expected a size such as 24kB, 24KiB, 1.5MB or a number of bytes, got {str(text)!r}")
    return int(size)


Bits = int | Mapping[str, int] | None  # bits of a code: one number for all tensors, or by name; None without codebook


def bits_of(bits: Bits, name: str) -> int | None:
    """Return the bits of one tensor."""
    return bits[name] if isinstance(bits, Mapping) else bits


def mean_bits(tensors: Mapping[str, Tensor], bits: Bits) -> float | int | None:
    """Return the bits per nonzero: the mean over the nonzeros if tensors differ, None without codebook."""
    if not isinstance(bits, Mapping):
        return bits
    counts = {name: int(tensor.count_nonzero()) for name, tensor in tensors.items()}
    return round(sum(bits[name] * count for name, count in counts.items()) / max(sum(counts.values()), 1), 3)


def distinct_nonzero(tensor: Tensor) -> int:
    """Count the distinct nonzero values."""
    values = tensor.detach()
    return len(torch.unique(values[values != 0]))


def nominal_bits(tensors: Mapping[str, Tensor], bits: Bits) -> int:
    """Return the paper's nominal size in bits, which leaves out positions, biases and batch norm.

    A tensor takes 32 bits per nonzero if it has no codebook or at most 2^bits nonzeros; else 32 bits per distinct
    nonzero value, and per nonzero the bits that tell so many apart, ceil(log2(distinct)), which may be below `bits`
    (Gui et al. 2019, section 4, and the reference implementation). A tensor with more than 2^bits distinct values,
    before its quantization, counts as having no codebook.
    """
    total = 0
    for name, tensor in tensors.items():
        width = bits_of(bits, name)
        count = int(tensor.count_nonzero())
        levels = 0 if width is None or count <= 2**width else distinct_nonzero(tensor)
        coded = width is not None and 0 < levels <= 2**width
        total += (levels - 1).bit_length() * count + 32 * levels if coded else 32 * count
    return total


def check_budget(budget: object) -> None:
    """Raise ValueError unless this is a `Budget`."""
    if not isinstance(budget, Budget):
        raise ValueError(f"expected a budget such as Budget(ratio=0.01, bits=4), got {budget!r:.80}")
