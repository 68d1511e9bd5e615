"""Wide residual networks: Zagoruyko and Komodakis, "Wide residual networks", BMVC 2016 (pre-activation blocks B(3,3)).

Submodules are named as in the usual public PyTorch implementations (block1..3.layer.i, convShortcut, bn1, fc), so that
their checkpoints can be loaded.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atmc.models.resnet import init_convolutions

_MAX_DEPTH, _MAX_WIDTH = 124, 20  # WRN-124-20 has 0.8 billion weights: no file may ask for more


def parse_name(name: str) -> tuple[int, int] | None:
    """Return the depth and the width factor of a name ``wrn-D-W``, None for any other name.

    >>> parse_name("wrn-16-8"), parse_name("resnet18")
    ((16, 8), None)
    """
    match = re.fullmatch(r"wrn-([1-9][0-9]{0,4})-([1-9][0-9]{0,4})", name)
    return None if match is None else (int(match[1]), int(match[2]))


class PreactivationBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU; (n, inputs, H, W) to (n, outputs, H/stride, W/stride).

    If the shape changes, the shortcut is a 1x1 convolution of the activated input, otherwise the input itself.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = stride == 1 and inputs == outputs
        self.convShortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        out: Tensor = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(active)))))
        return out + shortcut


class Group(nn.Module):
    """A number of blocks in sequence, the first of which changes width and resolution."""

    def __init__(self, blocks: int, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        rest = [PreactivationBlock(outputs, outputs, 1, dropout) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(PreactivationBlock(inputs, outputs, stride, dropout), *rest)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """WRN-depth-width: 3x3 stem of 16, three groups 16, 32 and 64 times ``width`` wide, global average pooling, linear.

    Args:
        depth: 4 + 6 n for n blocks per group, at most 124.
        width: the widening factor, 1 to 20.
        num_classes: number of logits.
        channels: channels of the images.
        dropout: probability of dropping an activation between the two convolutions of a block, in training mode only.
        normalize: the first layer; None for the identity.

    Raises:
        ValueError: a depth, width or dropout is out of the range above.

    >>> WideResNet(10, 1, 10)(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int,
        width: int,
        num_classes: int,
        channels: int = 3,
        *,
        dropout: float = 0.0,
        normalize: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_size(depth, width)
        if not 0 <= dropout < 1:
            raise ValueError(f"expected 0 <= dropout < 1, got {dropout}")
        blocks = (depth - 4) // 6
        self.normalize = nn.Identity() if normalize is None else normalize
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.block1 = Group(blocks, 16, 16 * width, 1, dropout)
        self.block2 = Group(blocks, 16 * width, 32 * width, 2, dropout)
        self.block3 = Group(blocks, 32 * width, 64 * width, 2, dropout)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, C, H, W) of any height and width to logits (n, num_classes)."""
        x = self.block3(self.block2(self.block1(self.conv1(self.normalize(x)))))
        x = F.adaptive_avg_pool2d(F.relu(self.bn1(x)), 1)
        logits: Tensor = self.fc(torch.flatten(x, 1))
        return logits


def check_size(depth: int, width: int) -> None:
    """Raise ValueError unless there is a WRN-depth-width, small enough to be built from an untrusted file."""
    if not 10 <= depth <= _MAX_DEPTH or (depth - 4) % 6 != 0:
        raise ValueError(f"expected a depth of 10, 16, 22, ... or {_MAX_DEPTH} in wrn-depth-width, got {depth}")
    if not 1 <= width <= _MAX_WIDTH:
        raise ValueError(f"expected a width of 1 to {_MAX_WIDTH} in wrn-depth-width, got {width}")
