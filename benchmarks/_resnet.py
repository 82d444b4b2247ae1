"""A residual network of bottlenecks (He et al., Deep residual learning, 2016), of any depth and width.

Its norm is GroupNorm: BatchNorm in training mode would make every micro-batch size another gradient, which lockstep.py
measures. Its activation is SiLU: with ReLU one value that rounding moves across zero is 3e-5 of this gradient.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 8


def convolution(inputs: int, outputs: int, side: int, stride: int = 1) -> nn.Sequential:
    convolved = nn.Conv2d(inputs, outputs, side, stride, padding=side // 2, bias=False)
    return nn.Sequential(convolved, nn.GroupNorm(GROUPS, outputs))


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.narrow, self.middle = convolution(inputs, width, 1), convolution(width, width, 3, stride)
        self.wide = convolution(width, 4 * width, 1)
        is_same = inputs == 4 * width and stride == 1
        self.skip = nn.Identity() if is_same else convolution(inputs, 4 * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.skip(x) + self.wide(F.silu(self.middle(F.silu(self.narrow(x))))))


def resnet(depths: tuple[int, ...], width: int, classes: int, stem: nn.Module) -> nn.Sequential:
    """Stages of so many bottlenecks; each after the first halves the picture and doubles the width."""
    blocks: list[nn.Module] = []
    channels = width
    for stage, depth in enumerate(depths):
        for place in range(depth):
            blocks.append(Bottleneck(channels, width << stage, 2 if stage and not place else 1))
            channels = 4 * (width << stage)
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def small() -> nn.Sequential:
    """For pictures of 32 x 32: 16 convolutions."""
    return resnet((1, 2, 1), 16, 10, convolution(3, 16, 3))


def resnet_50() -> nn.Sequential:
    """ResNet-50's shape, for pictures of 224 x 224: 25.6 million parameters."""
    return resnet((3, 4, 6, 3), 64, 1000, nn.Sequential(convolution(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)))
