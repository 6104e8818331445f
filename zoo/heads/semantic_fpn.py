"""Semantic FPN (arXiv:1901.02446): a feature pyramid whose levels are brought to one size and summed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.errors import at_least
from zoo.heads.layers import ConvBlock, Decoder, resize


class SemanticFPN(Decoder):
    """Feature maps of all stages, finest first, to logits at the resolution of the finest.

    `reductions` are the strides of the stages in pixels, `fpn_channels` the width of the pyramid, `channels`
    that of the branches. A branch doubles its resolution after each convolution until it reaches the finest.
    Source: Kirillov et al. 2019 (arXiv:1901.02446) Sec. 3.1, Fig. 3.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        reductions: Sequence[int],
        channels: int = 128,
        fpn_channels: int = 256,
        dropout: float = 0.1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        at_least(1, fpn_channels=fpn_channels)
        factory = {"device": device, "dtype": dtype}
        super().__init__(channels, num_classes, dropout, **factory)
        self.lateral_convs = nn.ModuleList(
            nn.Conv2d(each, fpn_channels, 1, **factory) for each in in_channels
        )
        self.fpn_convs = nn.ModuleList(
            nn.Conv2d(fpn_channels, fpn_channels, 3, padding=1, **factory) for _ in in_channels
        )
        self.scale_heads = nn.ModuleList()
        for reduction in reductions:
            doublings = round(math.log2(reduction / reductions[0]))
            branch: list[nn.Module] = [ConvBlock(fpn_channels, channels, 3, **factory)]
            for i in range(doublings):
                branch += [ConvBlock(channels, channels, 3, **factory)] if i else []
                branch += [nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)]
            self.scale_heads.append(nn.Sequential(*branch))
        # Not the published 0.01: it takes hundreds of steps to grow, and until then little reaches the rest.
        self.init_weights(class_std=channels**-0.5)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, features, strict=True)]
        for i in reversed(range(1, len(laterals))):
            laterals[i - 1] = laterals[i - 1] + resize(laterals[i], laterals[i - 1], mode="nearest")
        levels = [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=True)]
        total = self.scale_heads[0](levels[0])
        for head, level in zip(self.scale_heads[1:], levels[1:], strict=True):
            total = total + resize(head(level), total)
        return self.classify(total)
