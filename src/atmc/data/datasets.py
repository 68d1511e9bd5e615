"""Data sets: whole splits of labelled images in memory, a fixed validation split, batches in [0, 1].

The splits of a data set are a pure function of the data set: no option and no run's seed moves an image from one to
another. All else that is random (order, augmentation) is keyed by the seed, the epoch and the example.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from atmc.core.rng import permutation
from atmc.data import sources
from atmc.data.images import Images

DIGITS_TEST = 360  # test images of `digits`
VAL_SHARE, VAL_MOST = 10, 5000  # a tenth of train, at most this many images
_FIXED_SEED = 0  # of the splits; never a run's seed


@dataclass(frozen=True, eq=False)
class Data:
    """A data set: three splits of equally large images, of the same classes."""

    name: str
    train: Images
    val: Images
    test: Images
    num_classes: int
    class_names: tuple[str, ...]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of every image."""
        c, h, w = self.train.pixels.shape[1:]
        return c, h, w

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel over the training images in [0, 1], to 4 decimals."""
        return tuple(round(mean, 4) for mean, _ in self._moments)

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel over the training images in [0, 1], to 4 decimals, at least 0.001."""
        return tuple(max(round(std, 4), 1e-3) for _, std in self._moments)

    @cached_property
    def _moments(self) -> list[tuple[float, float]]:
        """(mean, standard deviation) per channel; of uint8 from exact counts of the 256 levels."""
        if self.train.pixels.dtype != torch.uint8:
            channels = (self.train.pixels[:, c].double() for c in range(self.input_shape[0]))
            return [(float(x.mean()), float(x.std(correction=0))) for x in channels]
        level = torch.arange(256, dtype=torch.float64) / 255
        moments = []
        for c in range(self.input_shape[0]):
            counts = torch.bincount(self.train.pixels[:, c].flatten(), minlength=256).cpu()
            share = counts.double() / counts.sum()
            mean = (share * level).sum()
            moments.append((float(mean), float((share * (level - mean) ** 2).sum().sqrt())))
        return moments


def load_data(
    name: str, *, image_column: str | None = None, label_column: str | None = None, limit: int | None = None
) -> Data:
    """Reads a data set, whole.

    Args:
        name: ``digits`` (scikit-learn's, as 28x28x1; 360 test images); or a local folder, either of parquet files in
            the hub's layout (``train-*.parquet``, ``test-*.parquet``) or of images ``split/class/*.png``; or a
            Hugging Face hub id, ``owner/name`` or ``owner/name:configuration``. A local folder goes before the hub.
        image_column: the column of images, needed only where there are several.
        label_column: the column of labels, if not ``label`` or else ``fine_label``.
        limit: keep only so many training images, always the same; val and test stay as they are.

    Test is the source's test split; where it has none but a validation split, **that is the test split**. Val is
    otherwise the source's validation split; where there is none left, a tenth of train (at most 5,000 images),
    stratified and fixed per data set, is taken out of train. Val and test come in the source's order, or mixed, always
    the same, where that goes by class. Gray images stay 1 channel, palette and RGBA images become
    RGB, and one RGB image makes the whole set RGB; images of more than 8 bits per channel are refused.

    Raises:
        ValueError: nothing of this name, or its content is not a set of equally large labelled images.

    >>> digits = load_data("digits")
    >>> digits.input_shape, len(digits.train), len(digits.val), len(digits.test)
    ((1, 28, 28), 1294, 143, 360)
    """
    if limit is not None and limit < 1:
        raise ValueError(f"expected limit >= 1, got {limit}")
    found, class_names = _read(name, image_column, label_column)
    train, val, test = found["train"], found.get("validation"), found.get("test")
    if test is None:
        val, test = None, found["validation"]
    if val is None:
        train, val = _split(train, min(max(len(train) // VAL_SHARE, 1), VAL_MOST), "validation split")
    if limit is not None and limit < len(train):
        train = train.take(permutation(len(train), seed=_FIXED_SEED, purpose="limit")[:limit].sort().values)
    return Data(name, train, mixed_order(val), mixed_order(test), len(class_names), class_names)


def _read(name: str, image_column: str | None, label_column: str | None) -> tuple[dict[str, Images], tuple[str, ...]]:
    """The splits that the source has, and the classes' names."""
    if name == "digits":
        if image_column is not None or label_column is not None:
            raise ValueError("digits has no columns, but image_column or label_column was given")
        everything = Images(*map(torch.from_numpy, sources.digits()))
        train, test = _split(everything, DIGITS_TEST, "test split")
        return {"train": train, "test": test}, tuple("0123456789")
    splits, names = sources.read(name, image_column, label_column)
    found = {
        key: Images(torch.from_numpy(split.pixels), torch.from_numpy(split.labels)) for key, split in splits.items()
    }
    return found, names


def mixed_order(images: Images) -> Images:
    """In a fixed mixed order where the source's is by class: the first n images must stand for all of them."""
    labels = images.labels
    if int((labels[1:] != labels[:-1]).sum()) >= len(labels) / 4:
        return images
    return images.take(permutation(len(labels), seed=_FIXED_SEED, purpose="mixed order"))


def _split(images: Images, count: int, purpose: str) -> tuple[Images, Images]:
    """(the rest, the chosen): count images chosen, each class in proportion (largest remainders); order kept."""
    if not 0 < count < len(images):
        raise ValueError(f"expected at least 2 training images, got {len(images)}")
    labels = images.labels
    share = torch.bincount(labels) * count
    quota = share // len(labels)
    short = count - int(quota.sum())
    quota[torch.argsort(share % len(labels), descending=True, stable=True)[:short]] += 1
    order = permutation(len(labels), seed=_FIXED_SEED, purpose=purpose)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label, wanted in enumerate(quota.tolist()):
        chosen[order[labels[order] == label][:wanted]] = True
    return images.take(~chosen), images.take(chosen)
