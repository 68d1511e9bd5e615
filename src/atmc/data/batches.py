"""Serve the batches of an epoch; order and augmentation are keyed by the seed, the epoch and the example."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from atmc.core.rng import permutation
from atmc.data import augment as augmentation
from atmc.data.images import Images, to_unit_range


@dataclass(frozen=True, eq=False)
class Batch:
    """The examples of one step.

    Args:
        x: (b, c, h, w) float32 in [0, 1].
        y: (b,) int64, the labels.
        index: (b,) int64, the examples' rows in `Images`.
    """

    x: Tensor
    y: Tensor
    index: Tensor


def batch_count(n: int, batch_size: int) -> int:
    """Count the batches of an epoch of n images, as `batches` serves them.

    >>> batch_count(6, 2), batch_count(7, 3), batch_count(8, 3), batch_count(1, 3)
    (3, 2, 3, 1)
    """
    full, left = divmod(n, batch_size)
    return full + (left > (1 if full else 0))


def batches(
    images: Images,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    augment: str = "none",
) -> Iterator[Batch]:
    """Iterate over one epoch's batches, on the images' device; a pure function of its arguments.

    Args:
        images: the examples.
        batch_size: examples per batch; the last batch may have fewer. A single image that would be left for the last
            batch joins the batch before it, for every model: batch norm cannot take one image, and the gradient of one
            image would count as much as that of a whole batch.
        seed: the run's seed; with the epoch it determines the order, with epoch and example the augmentation.
        epoch: counted by the caller.
        augment: ``none``, ``crop`` (zero-padded by 4, random crop), ``flip`` (left to right), or ``crop-flip``.

    Raises:
        ValueError: a batch size below 1, or an unknown augmentation; at the call, not at the first batch.

    >>> import torch
    >>> images = Images(torch.rand(5, 1, 4, 4), torch.arange(5))
    >>> [len(batch.x) for batch in batches(images, 2, seed=0, epoch=0)]
    [2, 3]
    """
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}")
    augmentation.find_changes(augment)  # raises if the name is unknown
    order = permutation(len(images), seed=seed, purpose="order", epoch=epoch)
    order = order.to(images.labels.device)
    count = batch_count(len(order), batch_size)

    def batch(number: int) -> Batch:
        start = number * batch_size
        index = order[start : start + batch_size if number < count - 1 else None]
        pixels = augmentation.augment(images.pixels[index], index, name=augment, seed=seed, epoch=epoch)
        return Batch(to_unit_range(pixels), images.labels[index], index)

    return map(batch, range(count))
