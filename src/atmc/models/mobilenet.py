"""MobileNetV2 in the form used on 32x32 images.

Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: inverted residuals and linear bottlenecks", CVPR 2018, Table 2 at
width 1.0, with stride 1 in the stem and the first two stages, so that 32x32 images end as 4x4 maps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atmc.models.resnet import init_convolutions

# Expansion t, output channels c, number of blocks n, stride s of the first block: Table 2, but with s = 1 at c = 24.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, and ReLU6 if ``active``."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, active: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x))
        return F.relu6(out) if self.active else out


class InvertedResidual(nn.Module):
    """1x1 expansion (none for t = 1), 3x3 depthwise, linear 1x1 projection; added to the input if shapes are equal."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * inputs
        self.expand = nn.Identity() if expansion == 1 else ConvNorm(inputs, hidden, 1)
        self.depthwise = ConvNorm(hidden, hidden, 3, stride=stride, groups=hidden)
        self.project = ConvNorm(hidden, outputs, 1, active=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """3x3 stem of 32, 17 inverted residual blocks, 1x1 convolution to 1280, global average pooling, one linear layer.

    Args:
        num_classes: number of logits.
        channels: channels of the images.
        normalize: the first layer; None for the identity.

    >>> MobileNetV2(10).eval()(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, num_classes: int, channels: int = 3, *, normalize: nn.Module | None = None) -> None:
        super().__init__()
        self.normalize = nn.Identity() if normalize is None else normalize
        self.stem = ConvNorm(channels, 32, 3)
        blocks: list[nn.Module] = []
        inputs = 32
        for expansion, outputs, count, first_stride in _STAGES:
            for index in range(count):
                blocks.append(InvertedResidual(inputs, outputs, first_stride if index == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvNorm(inputs, 1280, 1)
        self.fc = nn.Linear(1280, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, C, H, W) of any height and width to logits (n, num_classes)."""
        x = self.head(self.blocks(self.stem(self.normalize(x))))
        logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits
