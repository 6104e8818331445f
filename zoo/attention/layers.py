"""What attention modules share with the models around them: layers of [B, Y, X, C] under published names."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError, at_least


class Pointwise(nn.Conv2d):
    """A 1 x 1 convolution, computed as the matrix product that it is; [.., C] in and out."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True, **factory: object) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """[.., C in] to [.., C out]."""
        return F.linear(x, self.weight.flatten(1), self.bias)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of [.., C], with its weights one level down as `norm`."""

    def __init__(self, dim: int, eps: float = 1e-5, **factory: object) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """[.., C] to [.., C]."""
        return self.norm(x)


class Convolution(nn.Conv2d):
    """A convolution of [B, Y, X, C]."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, Y, X, C in] to [B, Y', X', C out]."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def lepe(dim: int, side_dwconv: int, **factory: object) -> Convolution:
    """The depthwise convolution that adds local position to attention, `side_dwconv` tokens wide.

    Raises: ConfigError for a width that has no middle.
    """
    at_least(1, side_dwconv=side_dwconv)
    if side_dwconv % 2 == 0:
        raise ConfigError(f"side_dwconv must be odd, found {side_dwconv}")
    return Convolution(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim, **factory)
