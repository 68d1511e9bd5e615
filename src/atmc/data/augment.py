"""Change training images at random, keyed by (seed, epoch, example): the same in any batch and in any process.

`batches` applies the changes, to all images of a batch together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from atmc.core.errors import unknown
from atmc.core.rng import Noise

PADDING = 4  # pixels of zero around an image before it is cropped, as is usual on CIFAR-10 (He et al. 2016, sec. 4.2)


def crop(x: Tensor, noise: Noise) -> Tensor:
    """Pad each image of x (n, c, h, w) with 4 pixels of zero on each side, and crop it at random to h by w."""
    height, width = x.shape[2:]
    corner = noise.integers(2 * PADDING + 1, (2,))
    rows = corner[:, :1] + torch.arange(height, device=x.device)
    columns = corner[:, 1:] + torch.arange(width, device=x.device)
    padded = F.pad(x, (PADDING, PADDING, PADDING, PADDING))
    image = torch.arange(len(x), device=x.device)[:, None, None, None]
    channel = torch.arange(x.shape[1], device=x.device)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def flip(x: Tensor, noise: Noise) -> Tensor:
    """Mirror each image of x (n, c, h, w) left to right with probability 1/2."""
    mirrored = noise.integers(2, (1, 1, 1)).bool()
    return torch.where(mirrored, x.flip(3), x)


Change = Callable[[Tensor, Noise], Tensor]
AUGMENTATIONS: dict[str, tuple[Change, ...]] = {"none": (), "crop": (crop,), "flip": (flip,), "crop-flip": (crop, flip)}


def find_changes(name: str) -> tuple[Change, ...]:
    """Return the changes of a named augmentation, in their order.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in AUGMENTATIONS:
        raise unknown("augmentation", name, AUGMENTATIONS)
    return AUGMENTATIONS[name]


def augment(x: Tensor, index: Tensor, *, name: str, seed: int, epoch: int) -> Tensor:
    """Return the images x (n, c, h, w), of any dtype, after a named augmentation.

    Args:
        index: (n,) int64, which examples of the data set the images are.

    >>> x = torch.arange(18.0).view(2, 1, 3, 3)
    >>> both = augment(x, torch.tensor([7, 3]), name="crop-flip", seed=0, epoch=1)
    >>> alone = augment(x[1:], torch.tensor([3]), name="crop-flip", seed=0, epoch=1)
    >>> bool((both[1] == alone[0]).all())
    True
    """
    for change in find_changes(name):
        x = change(x, Noise(index, seed=seed, purpose=f"augment: {change.__name__}", epoch=epoch))
    return x
