"""Decode image files into pixels of 8 bits, gray or RGB.

8-bit gray stays one channel, everything else of 8 bits (palette, RGBA, CMYK, ...) becomes RGB, without alpha. Images of
more than 8 bits per channel are refused, and so are files that hold several images. If a data set has gray and RGB
images, the gray ones are repeated over three channels. An orientation noted by a camera is applied; color profiles are
not.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
_GRAY = {"1", "L", "LA", "La"}  # Pillow's modes of 8 bits and less
_COLOR = {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)  # what Pillow raises


def image_array(image: Image.Image) -> NDArray[np.uint8]:
    """Return an image's pixels, (h, w) if it is gray, else (h, w, 3).

    Raises:
        ValueError: it has more than 8 bits per channel, or it is one of several images in a file.
    """
    if image.mode not in _GRAY | _COLOR:
        raise ValueError(f"expected at most 8 bits per channel, got Pillow's mode {image.mode}")
    if _is_cut(image):
        raise ValueError(f"expected at most 8 bits per channel, got more in the mode {image.mode}")
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise ValueError(f"expected one image, got a file of {frames}")
    mode = "L" if image.mode in _GRAY else "RGB"
    upright = ImageOps.exif_transpose(image)
    return np.array(upright if upright.mode == mode else upright.convert(mode))


def _is_cut(image: Image.Image) -> bool:
    """Return whether a file that was not decoded yet has more bits than Pillow's mode, which keeps the highest 8."""
    for decoder, _, _, arguments in getattr(image, "tile", ()):
        values: tuple[Any, ...] = arguments if isinstance(arguments, tuple) else (arguments,)
        deep = any(isinstance(value, str) and ";16" in value for value in values)
        bright = decoder.startswith("ppm") and any(isinstance(value, int) and value > 255 for value in values)
        if deep or bright:
            return True
    return False


def decode_images(sources: Iterable[bytes | Path], places: Iterable[str]) -> NDArray[np.uint8]:
    """Decode files (or their bytes) into pixels (n, c, h, w); places are their names in errors.

    Raises:
        ValueError: a file is no image, is one that `image_array` refuses, or the sizes differ.
    """
    arrays: list[NDArray[np.uint8]] = []
    for source, place in zip(sources, places, strict=True):
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                arrays.append(image_array(image))
        except _UNREADABLE as error:
            raise ValueError(f"cannot read the image in {place}: {error}") from error
        if arrays[-1].shape[:2] != arrays[0].shape[:2]:
            sizes = f"{format_size(arrays[0])} and, in {place}, {format_size(arrays[-1])}"
            raise ValueError(f"expected images of one size, got {sizes}")
    channels = max(3 if array.ndim == 3 else 1 for array in arrays)
    pixels = np.empty((len(arrays), channels, *arrays[0].shape[:2]), dtype=np.uint8)
    for row, array in enumerate(arrays):
        pixels[row] = array if array.ndim == 2 else array.transpose(2, 0, 1)
    return pixels


def format_size(image: NDArray[np.uint8]) -> str:
    """Return the size of an image (h, w, ...) in words, "28x28"."""
    return f"{image.shape[0]}x{image.shape[1]}"
