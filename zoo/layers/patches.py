"""Images and maps into patches: what families with Swin's stem and steps share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-5


class PatchTokenizer(nn.Module):
    """Non-overlapping patches, the image padded at the bottom and right to whole ones, then a norm.

    [B, C in, Y, X] to [B, Y / patch_size, X / patch_size, C out]. `norm` False leaves the norm out.
    """

    def __init__(
        self, in_chans: int, dim: int, patch_size: int = 4, *, norm: bool = True, **factory: object
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **factory)
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS, **factory) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.patch_size, 0, -height % self.patch_size))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Four neighbours side by side (rows first), a norm, then a linear layer to twice the channels."""

    def __init__(self, dim: int, **factory: object) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=LAYER_NORM_EPS, **factory)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, Y, row parity, X, column parity, C]
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))
