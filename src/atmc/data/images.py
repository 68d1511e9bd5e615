"""Hold labeled images in memory, and read them from what a Python user may pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from atmc.core.arguments import PIXEL_SLACK
from atmc.data import sources
from atmc.data.decoding import image_array


def to_unit_range(pixels: Tensor) -> Tensor:
    """Convert uint8 pixels to float32 in [0, 1], k to the float32 nearest to k/255; leave others as they are.

    The result is the same on every device. The divisor is a tensor since CUDA would multiply by the rounded reciprocal
    of a Python number.
    """
    if pixels.dtype != torch.uint8:
        return pixels
    return pixels.float() / torch.full((), 255.0, device=pixels.device)


@dataclass(frozen=True, eq=False)
class Images:
    """Labeled images in memory, all on one device.

    Args:
        pixels: (n, c, h, w), uint8, or float32 in [0, 1].
        labels: (n,) int64.
    """

    pixels: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.pixels.dim() != 4 or self.labels.shape != self.pixels.shape[:1]:
            shapes = f"{tuple(self.pixels.shape)} and {tuple(self.labels.shape)}"
            raise ValueError(f"expected pixels (n, c, h, w) and labels (n,), got the shapes {shapes}")
        if self.pixels.dtype not in (torch.uint8, torch.float32) or self.labels.dtype != torch.int64:
            dtypes = f"{self.pixels.dtype} and {self.labels.dtype}"
            raise ValueError(f"expected uint8 or float32 pixels and int64 labels, got {dtypes}")

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Images:
        """Return the same images on a device."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def take(self, indices: Tensor | Sequence[int] | slice) -> Images:
        """Return some of the images, in the order of the indices."""
        index = _index(indices)
        return Images(self.pixels[index], self.labels[index])

    def float_pixels(self, indices: Tensor | Sequence[int] | slice) -> Tensor:
        """Return the pixels of some of the images as float32 in [0, 1].

        >>> Images(torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3), torch.tensor([4])).float_pixels([0])
        tensor([[[[0.0000, 0.2000, 1.0000]]]])
        """
        return to_unit_range(self.pixels[_index(indices)])


def _index(indices: Tensor | Sequence[int] | slice) -> Tensor | slice:
    return indices if isinstance(indices, Tensor | slice) else torch.tensor(indices, dtype=torch.int64)


def as_images(source: object) -> Images:
    """Read labeled images from a source that a Python user passes, once and in its order.

    Args:
        source: a DataLoader; a dataset or other iterable of (image, label) pairs, an image being a tensor or array
            (c, h, w) or a Pillow image; an iterable of batches, (n, c, h, w) with n labels; or one pair of tensors or
            arrays, images (n, c, h, w) and labels (n,). Pixels are uint8, or floating point in [0, 1].

    Floating point pixels that are all exactly k/255 in float32 are kept as uint8, others as float32.

    Raises:
        ValueError: other shapes or dtypes, different sizes, pixels outside [0, 1], labels that are not integers >= 0.

    >>> loader = torch.utils.data.DataLoader([(torch.ones(1, 2, 2), 3), (torch.zeros(1, 2, 2), 0)], batch_size=2)
    >>> images = as_images(loader)
    >>> images.pixels.dtype, images.labels
    (torch.uint8, tensor([3, 0]))
    """
    pixels: list[Tensor] = []
    labels: list[Tensor] = []
    for image, label in _pairs(source):
        x, y = _pixels(image), _labels(label)
        if x.dim() != 4 or y.shape != x.shape[:1]:
            shapes = f"images {tuple(x.shape[1:] if len(x) == 1 else x.shape)} and labels {tuple(y.shape)}"
            raise ValueError(f"expected an image (c, h, w) with its label, or (n, c, h, w) with n labels, got {shapes}")
        if pixels and x.shape[1:] != pixels[0].shape[1:]:
            shapes = f"{tuple(pixels[0].shape[1:])} and {tuple(x.shape[1:])}"
            raise ValueError(f"expected images of one shape, got {shapes}")
        pixels.append(x)
        labels.append(y.to(x.device))
    if not sum(map(len, labels)):
        raise ValueError("expected at least one image, got none")
    if len({x.dtype for x in pixels}) > 1:
        pixels = [to_unit_range(x) for x in pixels]
    images = Images(torch.cat(pixels), torch.cat(labels))
    sources.check_labels(images.labels.cpu().numpy(), None, "the images given")
    return images


def _pairs(source: object) -> Iterator[tuple[object, object]]:
    """Yield the (image, label) pairs, single or batched, of any source that `as_images` takes."""
    items: Iterable[object]
    if isinstance(source, Images):
        items = [(source.pixels, source.labels)]
    elif isinstance(source, TensorDataset):
        items = [source.tensors]
    elif isinstance(source, tuple | list) and len(source) == 2 and isinstance(source[0], Tensor | np.ndarray):
        items = [source]
    elif isinstance(source, Mapping | str | Tensor | np.ndarray):
        items = [source]  # refused below
    elif hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, IterableDataset):
        items = (source[position] for position in range(len(source)))  # few map-style datasets end an iteration
    elif isinstance(source, Iterable):
        items = source
    else:
        items = [source]
    for position, item in enumerate(items):
        if not isinstance(item, tuple | list) or len(item) != 2:
            kind = f"{len(item)} values" if isinstance(item, tuple | list) else type(item).__name__
            raise ValueError(
                f"expected (image, label) pairs, or one pair (images, labels), got {kind} at position {position}"
            )
        yield item[0], item[1]


def _pixels(image: object) -> Tensor:
    """Return one image or a batch as (n, c, h, w) uint8 or float32; raise ValueError if it is neither."""
    if isinstance(image, Image):
        array = image_array(image)
        return torch.from_numpy(array[None, None] if array.ndim == 2 else array.transpose(2, 0, 1)[None].copy())
    if isinstance(image, np.ndarray) and image.dtype.kind == "f":
        image = torch.from_numpy(image.astype(np.float32))
    elif isinstance(image, np.ndarray) and image.dtype == np.uint8:
        image = torch.from_numpy(image.copy())
    if not isinstance(image, Tensor) or not (image.is_floating_point() or image.dtype == torch.uint8):
        kind = image.dtype if isinstance(image, Tensor | np.ndarray) else type(image).__name__
        raise ValueError(f"expected images of uint8 or of floating point in [0, 1], got {kind}")
    x = image.detach()[None] if image.dim() == 3 else image.detach()
    if x.dim() == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        raise ValueError(
            f"expected channels before height and width, got the shape {tuple(image.shape)}: permute the axes"
        )
    return x if x.dtype == torch.uint8 else _compact(x.float())


def _compact(x: Tensor) -> Tensor:
    """Return floats as uint8 if every one is exactly k/255, else clipped to [0, 1]; raise ValueError far outside."""
    if not x.isfinite().all():
        raise ValueError("expected pixels in [0, 1], found values that are not finite")
    if x.numel() and not (x.min() >= -PIXEL_SLACK and x.max() <= 1 + PIXEL_SLACK):
        extremes = f"from {float(x.min()):.6g} to {float(x.max()):.6g}"
        raise ValueError(f"expected pixels in [0, 1], found values {extremes}; normalization belongs in the model")
    x = x.clamp(0, 1)
    levels = (x * 255).round().to(torch.uint8)
    return levels if torch.equal(to_unit_range(levels), x) else x


def _labels(label: object) -> Tensor:
    """Return one label or a batch of labels as (n,) int64; raise ValueError unless they are integers."""
    if not isinstance(label, Tensor):
        array = np.asarray(label)
        if array.dtype.kind not in "iu":
            raise ValueError(f"expected integer labels, got {array.dtype} ({label!r:.40})")
        return torch.from_numpy(np.atleast_1d(array).astype(np.int64))
    if label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
        raise ValueError(f"expected integer labels, got {label.dtype}")
    return label.detach().to(torch.int64).reshape(label.shape or (1,))
