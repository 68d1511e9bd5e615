"""Draw random numbers keyed by (seed, purpose, epoch, example): they depend neither on the batch nor on the process.

A counter-based generator in the spirit of Salmon et al. (SC 2011), "Parallel random numbers: as easy as 1, 2, 3":
the j-th number of a stream is a bijective mix (the finalizer of SplitMix64, Steele et al. 2014) of the stream's key
and j. Uniform numbers are elementwise 64-bit integer arithmetic, hence the same on every device and platform; normal
and exponential ones apply the platform's logarithm and cosine to them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB

MAX_SEED = 2**63 - 1


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that is negative or does not fit in 63 bits."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"expected a seed from 0 to 2^63 - 1, got {seed}")


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right as if it were unsigned."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """Apply SplitMix64's finalizer, elementwise on int64 (wrapping multiplication)."""
    z = (z ^ _shift_right(z, 30)) * _MIX1
    z = (z ^ _shift_right(z, 27)) * _MIX2
    return z ^ _shift_right(z, 31)


def _purpose_key(purpose: str) -> int:
    """Hash a word to 63 bits (FNV-1a), so that two uses of one seed are unrelated."""
    value = 0xCBF29CE484222325
    for byte in purpose.encode():
        value = ((value ^ byte) * 0x100000001B3) % 2**64
    return value >> 1


class Noise:
    """Independent streams of random numbers, one per example of a batch.

    Args:
        examples: (n,) int64, the examples' indices in their data set.
        seed: the run's seed.
        purpose: what the numbers are for, e.g. ``"attack"``; different words give unrelated numbers.
        epoch: the epoch (or restart); different values give unrelated numbers.

    >>> a = Noise(torch.tensor([5, 7]), seed=0, purpose="attack", epoch=1).uniform((3,))
    >>> b = Noise(torch.tensor([7]), seed=0, purpose="attack", epoch=1).uniform((3,))
    >>> bool((a[1] == b[0]).all())
    True
    """

    def __init__(self, examples: Tensor, *, seed: int, purpose: str, epoch: int = 0) -> None:
        key = torch.full_like(examples, _purpose_key(purpose))
        for part in (seed, epoch):
            key = _mix(key * 3 + _GOLDEN + part)
        self._keys = _mix(key + examples * _GOLDEN)
        self._drawn = 0

    def __len__(self) -> int:
        return len(self._keys)

    def take(self, positions: Tensor) -> Noise:
        """Return the streams of some of the examples, at the same point; positions (k,) int64 in the batch."""
        subset = copy.copy(self)
        subset._keys = self._keys[positions]
        return subset

    def bits(self, shape: Sequence[int]) -> Tensor:
        """Draw (n, *shape) int64, uniform over all 64-bit integers; each call continues the streams."""
        count = math.prod(shape)
        counter = torch.arange(self._drawn, self._drawn + count, device=self._keys.device)
        self._drawn += count
        return _mix(self._keys[:, None] + counter * _GOLDEN).view(len(self._keys), *shape)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Draw (n, *shape) float32, uniform over the multiples of 2^-24 in [0, 1)."""
        count = math.prod(shape)
        bits = self.bits(((count + 1) // 2,))  # each holds two numbers: its highest and its lowest 24 bits
        numbers = torch.cat((_shift_right(bits, 40), bits & (2**24 - 1)), dim=1)[:, :count]
        return (numbers.float() * 2.0**-24).view(len(self), *shape)

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        """Draw (n, *shape) int64, uniform in 0 .. high-1, with a bias below 2^-32.

        Raises:
            ValueError: high is not from 1 to 2^31 - 1.
        """
        if not 1 <= high < 2**31:
            raise ValueError(f"expected 1 <= high < 2**31, got {high}")
        return _shift_right(_shift_right(self.bits(shape), 32) * high, 32)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Draw (n, *shape) float32, standard normal (Box and Muller 1958)."""
        radius = (-2.0 * torch.log1p(-self.uniform(shape))).sqrt()
        return radius * torch.cos(2.0 * math.pi * self.uniform(shape))

    def exponential(self, shape: Sequence[int]) -> Tensor:
        """Draw (n, *shape) float32, exponential with mean 1."""
        return -torch.log1p(-self.uniform(shape))


def permutation(n: int, *, seed: int, purpose: str, epoch: int = 0) -> Tensor:
    """Return a random order of 0 .. n-1, (n,) int64, a pure function of the arguments."""
    keys = Noise(torch.arange(n), seed=seed, purpose=purpose, epoch=epoch).bits(())
    return torch.argsort(keys, stable=True)


def derived_seed(*parts: int) -> int:
    """Mix several numbers into one 63-bit seed, for generators that take only one."""
    key = torch.zeros((), dtype=torch.int64)
    for part in parts:
        key = _mix(key * 3 + _GOLDEN + part)
    return int(_shift_right(key, 1))
