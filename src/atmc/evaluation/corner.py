"""Corner search: an attack for linf that needs logits only, for networks whose gradients say little.

Most adversarial images of a piecewise linear network lie at a corner of the box that a threat allows: every pixel is at
one of its two ends. The search walks over corners by flipping squares of pixels from one end to the other, from large
squares to single pixels, and keeps what raises the margin.

Sources: local search over sign patterns, from coarse blocks to fine ones, Moon et al. 2019; squares, Andriushchenko et
al. 2020. Here flips that raise the margin alone are also tried together, and the search starts again from a local
maximum of which a few rectangles are set at random (iterated local search, Lourenco et al. 2003).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from atmc.core.rng import Noise
from atmc.robust.attacks import margin
from atmc.robust.threats import Linf

QUERIES = 20_000  # per image
CHUNK = 512  # images that the model gets at once
KICKS = 8  # local maxima from one random start


@dataclass
class _Box:
    """The corners around one image, and the number of queries that are left.

    Args:
        logits: images (n, c, h, w) -> logits (n, classes).
        low, high: (c, h, w), the ends of each pixel; a corner is (c, h, w) bool, true for the high end.
        label: (1,) int64.
    """

    logits: Callable[[Tensor], Tensor]
    low: Tensor
    high: Tensor
    label: Tensor
    left: int

    def images(self, corners: Tensor) -> Tensor:
        """Return the images of corners (n, c, h, w)."""
        return torch.where(corners, self.high, self.low)

    def margins(self, corners: Tensor) -> Tensor:
        """Return the (n,) margins at corners (n, c, h, w), and count the queries."""
        self.left -= len(corners)
        return margin(self.logits(self.images(corners)), self.label.expand(len(corners)))


def search_corners(
    logits: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, threat: Linf, *, noise: Noise, queries: int = QUERIES
) -> Tensor:
    """Return, for each image x (n, c, h, w), the corner of its box with the largest margin that the search came to.

    Each image is searched for itself, until it is wrong or the queries are spent.

    Args:
        logits: images (k, c, h, w) -> logits (k, classes).
        y: (n,) labels.
        noise: random numbers, one stream per image.
        queries: how many images the model may see per image x, at least 1.

    >>> x = torch.full((1, 1, 2, 2), 0.5)
    >>> noise = Noise(torch.tensor([0]), seed=0, purpose="example")
    >>> adv = search_corners(lambda x: x.flatten(1)[:, :2], x, torch.tensor([0]), Linf(0.25), noise=noise)
    >>> adv.flatten().tolist()[:2]
    [0.25, 0.75]
    """
    low, high = threat.project(x - 1, x), threat.project(x + 1, x)
    corners = [
        _search(_Box(logits, low[row], high[row], y[row : row + 1], queries), noise.take(torch.tensor([row])))
        for row in range(len(x))
    ]
    return torch.where(torch.stack(corners), high, low) if corners else x


def _search(box: _Box, noise: Noise) -> Tensor:
    """Return the best corner of a box: local maxima, each from a random start or from the one before with a kick."""
    shape = tuple(box.low.shape)
    best, best_value = torch.zeros(shape, dtype=torch.bool), -torch.inf
    current, current_value, climbs = best, -torch.inf, 0
    while best_value <= 0 and box.left > 0:
        if climbs % (KICKS + 1) == 0:
            tiles = _tile(shape, max(1, min(shape[1:]) // 7), noise)
            start, current_value = _draw(noise, 2, int(tiles.max()) + 1).bool()[tiles], -torch.inf
        else:
            start = _kick(current, noise)
        corner, value = _climb(box, start.to(box.low.device), noise)
        if value >= current_value:
            current, current_value = corner, value
        if not value <= best_value:  # greater, or no number, which is no class either
            best, best_value = corner, value
        climbs += 1
    return best


def _climb(box: _Box, corner: Tensor, noise: Noise) -> tuple[Tensor, float]:
    """Flip squares, from a third of the image down to single pixels, as long as that raises the margin.

    A round takes the squares of one size of a grid at a random offset. It tries each flip alone, then the best 2, 4, 8,
    ... of those that raise the margin together, and takes the best of all.
    """
    shape = tuple(corner.shape)
    value = float(box.margins(corner[None]))
    size = max(1, min(shape[1:]) // 3)
    while size >= 1 and value <= 0:
        tiles = _tile(shape, size, noise).to(corner.device)
        count = int(tiles.max()) + 1
        if count > box.left:
            break
        parts = torch.split(torch.arange(count, device=corner.device), CHUNK)
        alone = torch.cat([box.margins(corner ^ (tiles == part[:, None, None, None])) for part in parts])
        rank = alone.argsort(descending=True).argsort()[tiles]  # of each pixel's square, 0 for the best
        gains = int((alone > value).sum())
        if not gains:
            size //= 2
            continue
        numbers = [2**power for power in range(1, gains.bit_length()) if 2**power < gains] + [gains] * (gains > 1)
        together = [box.margins((corner ^ (rank < number))[None]) for number in numbers[: box.left]]
        values = torch.cat((alone.amax()[None], *together))
        corner = corner ^ (rank < [1, *numbers][int(values.argmax())])
        value = float(values.amax())
    return corner, value


def _tile(shape: tuple[int, ...], size: int, noise: Noise) -> Tensor:
    """Return (c, h, w) int64, the number of each pixel's square in a grid at a random offset, per channel."""
    channels, height, width = shape
    offset = _draw(noise, size, 2)
    rows, columns = (torch.arange(height) + offset[0]) // size, (torch.arange(width) + offset[1]) // size
    per_row, per_channel = int(columns[-1]) + 1, (int(rows[-1]) + 1) * (int(columns[-1]) + 1)
    return torch.arange(channels)[:, None, None] * per_channel + rows[:, None] * per_row + columns


def _kick(corner: Tensor, noise: Noise) -> Tensor:
    """Set one to three rectangles of up to a third of the image's sides, in all channels, to a random end each."""
    corner, (height, width) = corner.clone(), corner.shape[1:]
    for _ in range(1 + int(_draw(noise, 3, 1))):
        top, left = int(_draw(noise, height, 1)), int(_draw(noise, width, 1))
        high, wide = 1 + int(_draw(noise, max(1, height // 3), 1)), 1 + int(_draw(noise, max(1, width // 3), 1))
        corner[:, top : top + high, left : left + wide] = bool(_draw(noise, 2, 1))
    return corner


def _draw(noise: Noise, below: int, count: int) -> Tensor:
    """Return (count,) random numbers from 0 to below - 1, on the CPU."""
    return noise.integers(below, (count,))[0].cpu()
