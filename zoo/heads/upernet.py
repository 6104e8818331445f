"""UPerNet (arXiv:1807.10221): pyramid pooling on the last stage, a feature pyramid, and all levels fused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.heads.layers import ConvBlock, Decoder, resize


class UPerNet(Decoder):
    """Feature maps of all stages, finest first, to logits at the resolution of the finest.

    Parameters are named as in the published checkpoints (`decode_head` there). The coarsest pooled map is one
    token, so a training batch needs at least two images for its batch norm.
    Source: Xiao et al. 2018 (arXiv:1807.10221) Fig. 4; pyramid pooling: Zhao et al. 2017 (arXiv:1612.01105).
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(channels, num_classes, dropout, **factory)
        *finer, coarsest = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvBlock(coarsest, channels, 1, **factory))
            for scale in pool_scales
        )
        self.bottleneck = ConvBlock(coarsest + len(pool_scales) * channels, channels, 3, **factory)
        self.lateral_convs = nn.ModuleList(ConvBlock(each, channels, 1, **factory) for each in finer)
        self.fpn_convs = nn.ModuleList(ConvBlock(channels, channels, 3, **factory) for _ in finer)
        self.fpn_bottleneck = ConvBlock(len(in_channels) * channels, channels, 3, **factory)
        self.init_weights()

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        *finer, coarsest = features
        pooled = [resize(pool(coarsest), coarsest) for pool in self.psp_modules]
        top = self.bottleneck(torch.cat([coarsest, *pooled], dim=1))
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, finer, strict=True)]
        above = top
        for i in reversed(range(len(laterals))):
            above = laterals[i] = laterals[i] + resize(above, laterals[i])
        levels = [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=True)] + [top]
        fused = torch.cat([resize(level, levels[0]) for level in levels], dim=1)
        return self.classify(self.fpn_bottleneck(fused))


class FCN(Decoder):
    """One convolution and a classifier on one stage: the auxiliary head of published UPerNets."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 256,
        dropout: float = 0.1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(channels, num_classes, dropout, **factory)
        self.convs = nn.Sequential(ConvBlock(in_channels, channels, 3, **factory))
        self.init_weights()

    def forward(self, feature: Tensor) -> Tensor:
        return self.classify(self.convs(feature))
