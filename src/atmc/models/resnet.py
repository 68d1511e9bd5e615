"""Residual networks in the form used on 32x32 images.

He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016: the ImageNet depths and widths
(Table 1) with a 3x3 stem of stride 1 and no max-pooling. Submodules are named as in the usual public implementations
for CIFAR (conv1, bn1, layer1..4, shortcut, linear), so that their checkpoints can be loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def init_convolutions(model: nn.Module) -> None:
    """Draw every 2d convolution's weight from N(0, 2 / fan_out), in place (He et al., ICCV 2015, Section 2.2).

    fan_out is the number of outputs that an input reaches, kernel area times output channels of its group. (PyTorch's
    own initializer ignores groups: the variance of depthwise weights would be ``groups`` times smaller.)
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, ``channels`` wide, added to the shortcut; (n, inputs, H, W) to (n, channels, H/s, W/s)."""

    expansion = 1

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(inputs, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolution to 4 ``channels``, added to the shortcut."""

    expansion = 4

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * channels
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """3x3 stem, four stages 64, 128, 256 and 512 wide, global average pooling, one linear layer.

    Args:
        block: BasicBlock or Bottleneck.
        blocks: number of blocks in each of the four stages; stages 2 to 4 halve height and width.
        num_classes: number of logits.
        channels: channels of the images.
        normalize: the first layer; None for the identity.

    >>> ResNet(BasicBlock, (1, 1, 1, 1), 10)(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        num_classes: int,
        channels: int = 3,
        *,
        normalize: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.normalize = nn.Identity() if normalize is None else normalize
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(block, blocks[0], 64, 64, 1)
        self.layer2 = _stage(block, blocks[1], 64 * block.expansion, 128, 2)
        self.layer3 = _stage(block, blocks[2], 128 * block.expansion, 256, 2)
        self.layer4 = _stage(block, blocks[3], 256 * block.expansion, 512, 2)
        self.linear = nn.Linear(512 * block.expansion, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, C, H, W) of any height and width to logits (n, num_classes)."""
        x = F.relu(self.bn1(self.conv1(self.normalize(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Build the identity, or a 1x1 convolution with batch norm if the shape changes (He et al., option B)."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _stage(
    block: type[BasicBlock] | type[Bottleneck], blocks: int, inputs: int, channels: int, stride: int
) -> nn.Sequential:
    rest = [block(channels * block.expansion, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(block(inputs, channels, stride), *rest)
