"""LeNet in the form of Caffe's example: two 5x5 convolutions, two fully connected layers, no batch norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_MAX_FEATURES = 2**20  # inputs of fc1: 2 GiB of weights; no file may ask for more


class LeNet(nn.Module):
    """conv 20 (5x5), ReLU, max-pool 2, conv 50 (5x5), ReLU, max-pool 2, fc 500, ReLU, fc num_classes; all with biases.

    Source: LeCun et al. 1998, with the widths of Caffe's ``lenet.prototxt`` and a ReLU after each convolution, which
    Caffe's network, and with it that of Gui et al. 2019, does not have: that one is ``relu=False``.
    430,500 conv and linear weights for 1x28x28 images and 10 classes. PyTorch's default initialization.

    Args:
        num_classes: number of logits.
        input_shape: (C, H, W); fc1's size depends on it. Pooling drops an odd last row or column.
        normalize: the first layer; None for the identity.
        relu: put a ReLU after each convolution.

    Raises:
        ValueError: H or W is below 16, so that nothing is left after the second pooling, or the image is so large that
            fc1 would have more than 2**20 inputs.

    >>> LeNet(10)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int,
        input_shape: tuple[int, int, int] = (1, 28, 28),
        *,
        normalize: nn.Module | None = None,
        relu: bool = True,
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        if min(height, width) < 16:
            raise ValueError(f"expected images of at least 16x16 pixels for lenet, got {height}x{width}")
        features = 50 * _side(height) * _side(width)
        if features > _MAX_FEATURES:
            raise ValueError(f"expected smaller images for lenet, got {height}x{width}")
        self.relu = relu
        self.normalize = nn.Identity() if normalize is None else normalize
        self.conv1 = nn.Conv2d(channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(features, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, C, H, W) to logits (n, num_classes)."""
        x = F.max_pool2d(self.conv1(self.normalize(x)), 2)
        x = F.relu(x) if self.relu else x  # ReLU and maximum commute: a quarter of the work
        x = F.max_pool2d(self.conv2(x), 2)
        x = F.relu(x) if self.relu else x
        logits: Tensor = self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))
        return logits


def _side(pixels: int) -> int:
    """Return the height or width after both convolutions (4 less each) and both poolings (half, rounded down)."""
    return ((pixels - 4) // 2 - 4) // 2
