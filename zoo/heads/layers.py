"""What the decoders share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import at_least


class ConvBlock(nn.Module):
    """A convolution that keeps the size, batch norm, ReLU; named as in the published checkpoints."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int, **factory: object) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=padding, bias=False, **factory)
        self.bn = nn.BatchNorm2d(channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Decoder(nn.Module):
    """The end of every decoder: dropout of whole channels and a linear map to classes.

    Raises: ConfigError for no class or channel.
    """

    def __init__(self, channels: int, num_classes: int, dropout: float, **factory: object) -> None:
        super().__init__()
        at_least(1, num_classes=num_classes, channels=channels)
        self.num_classes = num_classes
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1, **factory)

    def classify(self, x: Tensor) -> Tensor:
        """[B, channels, y, x] to logits [B, num_classes, y, x]."""
        return self.conv_seg(self.dropout(x))

    def init_weights(self, class_std: float = 0.01) -> None:
        """Initialise as published: normal by the fan-out before ReLU, `class_std` for the classes."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.conv_seg.weight, std=class_std)


def resize(x: Tensor, size: tuple[int, int] | Tensor, mode: str = "bilinear") -> Tensor:
    """Resize maps [B, C, y, x] to `size`, or to the size of other maps; corners are not aligned."""
    size = tuple(size.shape[-2:]) if isinstance(size, Tensor) else tuple(size)
    if tuple(x.shape[-2:]) == size:
        return x
    return F.interpolate(x, size=size, mode=mode, align_corners=False if mode == "bilinear" else None)
