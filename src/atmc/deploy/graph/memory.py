"""Places in one block of memory (an arena) for buffers that are needed at different times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Buffer:
    """Memory of `size` elements that is in use from step `first` to step `last`, both included."""

    size: int
    first: int
    last: int


def last_reads(reads: Iterable[Iterable[int]]) -> dict[int, int]:
    """Map every value that is read to the last step that reads it; reads: the values that each step reads, in order."""
    return {value: step for step, values in enumerate(reads) for value in values}


def place_buffers(buffers: Sequence[Buffer], *, alignment: int = 1) -> tuple[list[int], int]:
    """Place buffers in an arena so that no two that are in use at the same step overlap.

    The largest buffer is placed first, those of one size in the order given, each at the lowest offset that is free.

    Args:
        buffers: what to place.
        alignment: every offset, and the size of the arena, is a multiple of it.

    Returns:
        the offset of each buffer and the size of the arena, in elements.

    >>> place_buffers([Buffer(4, 0, 1), Buffer(6, 1, 2), Buffer(3, 2, 3)])
    ([6, 0, 6], 10)
    """
    placed: dict[int, tuple[int, int]] = {}
    for index in sorted(range(len(buffers)), key=lambda index: -buffers[index].size):
        buffer = buffers[index]
        occupied = sorted(
            placed[other]
            for other in placed
            if buffers[other].first <= buffer.last and buffer.first <= buffers[other].last
        )
        offset = 0
        for begin, end in occupied:
            if offset + buffer.size <= begin:
                break
            offset = max(offset, end)
        placed[index] = offset, offset + -(-buffer.size // alignment) * alignment
    offsets = [placed[index][0] for index in range(len(buffers))]
    return offsets, max((end for _, end in placed.values()), default=0)
