"""Load data sets: whole splits of labeled images in memory, with a fixed validation split.

The splits of a data set are a pure function of the data set: no option and no run's seed moves an image from one to
another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from atmc.core.rng import permutation
from atmc.data import sources
from atmc.data.images import Images

DIGITS_TEST = 360  # test images of `digits`
VAL_DIVISOR, VAL_MAX = 10, 5000  # the validation split is a tenth of train, at most 5000 images
_FIXED_SEED = 0  # of the splits; never a run's seed


@dataclass(frozen=True, eq=False)
class Data:
    """A data set: three splits of images of one size, with the same classes.

    Args:
        unused: splits or files of the source that are in none of the three.
    """

    name: str
    train: Images
    val: Images
    test: Images
    num_classes: int
    class_names: tuple[str, ...]
    unused: tuple[str, ...] = ()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape (c, h, w) of every image."""
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
        """Mean and standard deviation of each channel; for uint8 pixels from exact counts of the 256 levels."""
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
    """Read a whole data set into memory.

    Args:
        name: ``digits`` (scikit-learn's, as 28x28x1; 360 test images); or a local folder, either of parquet files in
            the hub's layout (``train-*.parquet``, ``test-*.parquet``) or of images ``split/class/*.png``; or a
            Hugging Face hub id, ``owner/name`` or ``owner/name:configuration``. A local folder takes precedence.
        image_column: the column of images, needed only if there are several.
        label_column: the column of labels, by default ``label`` or else ``fine_label``.
        limit: the number of training images to keep, always the same ones; val and test stay as they are.

    Test is the source's test split; if it has only a validation split, **that is the test split**. Val is the source's
    validation split if it is not used as test; otherwise a tenth of train (at most 5,000 images), stratified and fixed
    per data set, is taken out of train. Val and test keep the source's order; if that is sorted by class, they come in
    a mixed order, always the same. Gray images keep one channel, palette and RGBA images become RGB, and one RGB image
    makes the whole set RGB; images of more than 8 bits per channel are refused.

    Raises:
        ValueError: the name is unknown, or its content is not a set of labeled images of one size.

    >>> digits = load_data("digits")
    >>> digits.input_shape, len(digits.train), len(digits.val), len(digits.test)
    ((1, 28, 28), 1294, 143, 360)
    """
    if limit is not None and limit < 1:
        raise ValueError(f"expected limit >= 1, got {limit}")
    splits, class_names, unused = _read(name, image_column, label_column)
    train, val, test = splits["train"], splits.get("validation"), splits.get("test")
    if test is None:
        val, test = None, splits["validation"]
    if val is None:
        train, val = _split_stratified(train, min(max(len(train) // VAL_DIVISOR, 1), VAL_MAX), "validation split")
    if limit is not None and limit < len(train):
        train = train.take(permutation(len(train), seed=_FIXED_SEED, purpose="limit")[:limit].sort().values)
    return Data(
        name=name,
        train=train,
        val=mix_classes(val),
        test=mix_classes(test),
        num_classes=len(class_names),
        class_names=class_names,
        unused=unused,
    )


def _read(
    name: str, image_column: str | None, label_column: str | None
) -> tuple[dict[str, Images], tuple[str, ...], tuple[str, ...]]:
    """Read the splits that the source has; return them, the classes' names, and what is not used."""
    if name == "digits":
        if image_column is not None or label_column is not None:
            raise ValueError("digits has no columns, but image_column or label_column was given")
        images = Images(*map(torch.from_numpy, sources.digits()))
        train, test = _split_stratified(images, DIGITS_TEST, "test split")
        return {"train": train, "test": test}, tuple("0123456789"), ()
    splits, names, unused = sources.read(name, image_column, label_column)
    return (
        {key: Images(torch.from_numpy(split.pixels), torch.from_numpy(split.labels)) for key, split in splits.items()},
        names,
        unused,
    )


def mix_classes(images: Images) -> Images:
    """Put images that are sorted by class into a fixed mixed order, so that the first n are a fair sample."""
    labels = images.labels
    if int((labels[1:] != labels[:-1]).sum()) >= len(labels) / 4:
        return images
    return images.take(permutation(len(labels), seed=_FIXED_SEED, purpose="mixed order"))


def _split_stratified(images: Images, count: int, purpose: str) -> tuple[Images, Images]:
    """Take a number of images out, each class in proportion (largest remainders); return the rest, then these."""
    if not 0 < count < len(images):
        raise ValueError(f"expected at least 2 training images, got {len(images)}")
    labels = images.labels
    numerators = torch.bincount(labels) * count  # each class's exact quota is numerator / len(labels)
    quota = numerators // len(labels)
    missing = count - int(quota.sum())
    quota[torch.argsort(numerators % len(labels), descending=True, stable=True)[:missing]] += 1
    order = permutation(len(labels), seed=_FIXED_SEED, purpose=purpose)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label, number in enumerate(quota.tolist()):
        chosen[order[labels[order] == label][:number]] = True
    return images.take(~chosen), images.take(chosen)
