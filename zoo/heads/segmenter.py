"""A backbone and a decoder: one network from images to the class of every pixel."""

from __future__ import annotations

import re
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from zoo.errors import ConfigError, at_least, did_you_mean
from zoo.heads.semantic_fpn import SemanticFPN
from zoo.heads.upernet import FCN, UPerNet

HEADS = ("upernet", "semantic_fpn")
PLAIN_LEVELS = 4


class Segmenter(nn.Module):
    """Image [B, C, height, width] to logits [B, num_classes, y, x] at the resolution of the finest stage.

    `stages` are the backbone's feature maps to decode (None: all, or four evenly spaced blocks of a body of
    one resolution, which are then brought to four resolutions); `norm` puts a LayerNorm on each of them, as
    published for dense prediction. `channels` is the width of the decoder (None: as published, 512 for
    UPerNet and 128 for Semantic FPN, whose pyramid is twice as wide). `auxiliary` is the number of channels
    of a second head on the last stage but one, which only training uses; 0 leaves it out.
    Any timm model with `forward_intermediates` is a backbone; what it has behind the last stage is dropped.
    Raises: ConfigError for a wrong backbone, head or stage, no class, or a width below 1.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        head: str = "upernet",
        channels: int | None = None,
        stages: Sequence[int] | None = None,
        norm: bool = True,
        dropout: float = 0.1,
        auxiliary: int = 0,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ConfigError(f"unknown head {head!r}; one of {', '.join(HEADS)}{did_you_mean(head, HEADS)}")
        if not isinstance(backbone, nn.Module) or not hasattr(backbone, "prune_intermediate_layers"):
            raise ConfigError(
                f"backbone must be a model of the zoo's or timm's, made without features_only, found "
                f"{type(backbone).__name__}"
            )
        # Before the backbone loses what is not decoded.
        at_least(1, num_classes=num_classes, **({} if channels is None else {"channels": channels}))
        at_least(0, auxiliary=auxiliary)
        every = [dict(each) for each in backbone.feature_info]
        parameter = next(backbone.parameters())
        factory: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
        self.num_classes = num_classes
        self.pretrained_cfg = self.default_cfg = backbone.pretrained_cfg
        self.stages = _choose(every, stages)
        self.backbone = backbone
        backbone.prune_intermediate_layers(self.stages, prune_norm=True, prune_head=True)
        dims = [every[i]["num_chs"] for i in self.stages]
        reductions = [every[i]["reduction"] for i in self.stages]
        self.norms = nn.ModuleList(
            LayerNorm2d(dim, eps=1e-5, **factory) if norm else nn.Identity() for dim in dims
        )
        self.pyramid = None
        if len(dims) > 1 and len(set(reductions)) == 1:
            self.pyramid = PlainPyramid(dims, **factory)
            reductions = [reductions[0] * 2 ** (i - 2) for i in range(len(dims))]
        width = {} if channels is None else {"channels": channels}
        if head == "upernet":
            self.decode_head = UPerNet(dims, num_classes, dropout=dropout, **width, **factory)
        else:
            width |= {} if channels is None else {"fpn_channels": 2 * channels}
            self.decode_head = SemanticFPN(
                dims, num_classes, reductions=reductions, dropout=dropout, **width, **factory
            )
        self.auxiliary_head = None
        if auxiliary:
            dim = dims[max(0, len(dims) - 2)]
            self.auxiliary_head = FCN(dim, num_classes, channels=auxiliary, dropout=dropout, **factory)

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the normed maps of the stages, finest first."""
        maps = self.backbone.forward_intermediates(images, indices=self.stages, intermediates_only=True)
        maps = [norm(x) for norm, x in zip(self.norms, maps, strict=True)]
        return maps if self.pyramid is None else self.pyramid(maps)

    def forward(self, images: Tensor, auxiliary: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits; with `auxiliary` also those of the second head, of its own stage's resolution."""
        maps = self.features(images)
        logits = self.decode_head(maps)
        if not auxiliary or self.auxiliary_head is None:
            return logits
        return logits, self.auxiliary_head(maps[max(0, len(maps) - 2)])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only block inputs of the backbone in training and compute the rest again in backward."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that AdamW should not shrink: the backbone's."""
        own = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name in own}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Say to which layer each parameter belongs; the decoder is behind the last of the backbone."""

        def inside(pattern: Any) -> Any:
            if isinstance(pattern, str):
                anywhere = re.sub(r"(?<!\[)\^", "", pattern)
                return rf"^backbone\.(?:{anywhere})"
            if isinstance(pattern, list | tuple) and pattern and isinstance(pattern[0], str):
                return (inside(pattern[0]), *pattern[1:])
            return [inside(each) for each in pattern] if isinstance(pattern, list) else pattern

        return {name: inside(each) for name, each in self.backbone.group_matcher(coarse=coarse).items()}


class PlainPyramid(nn.Module):
    """Four maps of one resolution become maps of four: twice doubled, doubled, as they are, halved.

    Source: the adapters of plain transformers for UPerNet, Bao et al. 2022 (arXiv:2106.08254) Sec. 3.2.
    """

    def __init__(self, dims: Sequence[int], **factory: Any) -> None:
        super().__init__()

        def double(dim: int) -> nn.Module:
            return nn.ConvTranspose2d(dim, dim, 2, stride=2, **factory)

        steps = [
            lambda dim: nn.Sequential(double(dim), nn.BatchNorm2d(dim, **factory), nn.GELU(), double(dim)),
            double,
            lambda dim: nn.Identity(),
            lambda dim: nn.MaxPool2d(2, ceil_mode=True),
        ]
        self.levels = nn.ModuleList(step(dim) for step, dim in zip(steps, dims, strict=True))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [level(x) for level, x in zip(self.levels, maps, strict=True)]


def _choose(every: Sequence[dict[str, Any]], stages: Sequence[int] | None) -> list[int]:
    count = len(every)
    plain = count > 1 and len({each["reduction"] for each in every}) == 1
    if stages is None:
        if not plain:
            return list(range(count))
        return [round(count * (i + 1) / PLAIN_LEVELS) - 1 for i in range(PLAIN_LEVELS)]
    if not isinstance(stages, Sequence) or not all(isinstance(index, Integral) for index in stages):
        raise ConfigError(f"stages must be whole numbers such as (0, 1), found {stages!r}")
    chosen = [index + count if index < 0 else index for index in stages]
    if not chosen or chosen != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < count:
        raise ConfigError(f"stages={list(stages)} must rise within the backbone's 0..{count - 1}")
    if plain and len(chosen) != PLAIN_LEVELS:
        raise ConfigError(
            f"a backbone of one resolution is decoded from {PLAIN_LEVELS} stages, found {chosen}"
        )
    return chosen
