"""The frame of every backbone of the zoo: a stem, stages, a norm and a classifier, with timm's interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo.errors import ConfigError, at_least
from zoo.layers.checkpoint import checkpoint

POSITION_TABLES = ("rpb", "relative_position_bias_table", "rpe_table")  # of all attention modules
POOLS = ("avg", "max", "avgmax", "fast", "fastavg", "fastmax", "fastavgmax", "")  # as many channels as before


class Backbone(nn.Module):
    """Token maps stay [B, Y, X, C] inside; images come in and feature maps go out as [B, C, height, width].

    A family sets `stage_list`, `norm_name` and `head_name` (the attributes that hold its stages, its last
    norm and its classifier, as its checkpoints call them), builds `self.stem_*` layers behind `stem`, and
    calls `add_head`. A stage is a module from token map to token map, whose result are the features; one that
    ends with the step to the next is a `Stage`, whose features are those of its `blocks`. Steps between
    stages are in `next_resolution`. With `norm_after_pool` the last norm is the classifier's.
    """

    output_fmt = "NHWC"
    stage_list = "stages"
    norm_name = "norm"
    head_name = "head"
    norm_after_pool = False
    undecayed: tuple[str, ...] = ()  # endings of the names of tables that weight decay leaves alone
    attention_fields: tuple[str, ...] = ()  # of a row, that another attention= takes the place of
    unused_fields: tuple[str, ...] = ()  # of a row, that another body of the same family reads
    as_published = True  # False under another attention=

    @property
    def stages_(self) -> nn.ModuleList:
        """The stages, whatever the family's checkpoints call them."""
        return getattr(self, self.stage_list)

    @property
    def last_norm(self) -> nn.Module:
        """The norm behind the last stage, whatever the family's checkpoints call it."""
        return self.get_submodule(self.norm_name)

    def stage_path(self, index: int) -> str:
        """The name of a stage, whatever the family's checkpoints call it."""
        return f"{self.stage_list}.{index}"

    def _features_path(self, index: int) -> str:
        """The name of the module whose result are a stage's features."""
        path = self.stage_path(index)
        return f"{path}.blocks" if isinstance(self.get_submodule(path), Stage) else path

    def keep_stages(self, count: int) -> None:
        """Drop the stages behind the first `count`."""
        setattr(self, self.stage_list, self.stages_[:count])

    def make_pool(self, kind: str) -> nn.Module:
        """What turns the last token map into one vector, by timm's name of it; "" keeps the map."""
        if kind not in POOLS:
            raise ConfigError(f"global_pool must be avg, max, avgmax or '', found {kind!r}")
        return SelectAdaptivePool2d(pool_type=kind, flatten=bool(kind), input_fmt="NHWC")

    def add_head(
        self,
        dims: Sequence[int],
        reductions: Sequence[int],
        *,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        **factory: object,
    ) -> None:
        """Add the pool and the classifier, and write down what timm wants to know of the stages."""
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": channels, "reduction": reduction, "module": self._features_path(i)}
            for i, (channels, reduction) in enumerate(zip(dims, reductions, strict=True))
        ]
        self.grad_checkpointing = False
        self.global_pool = self.make_pool(global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        head = nn.Linear(self.num_features, num_classes, **factory) if num_classes else nn.Identity()
        self.set_submodule(self.head_name, head)

    def stem(self, x: Tensor) -> Tensor:
        """Image [B, C, height, width] to the first token map [B, Y, X, C]."""
        raise NotImplementedError

    def forward_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        """Run a stage, [B, Y, X, C] in and out."""
        return stage(x)

    def next_resolution(self, stage: nn.Module, x: Tensor) -> Tensor:
        """The step from the result of a stage to the next stage's first token map, where neither has it."""
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Image [B, C, height, width] to the last token map [B, Y, X, C], normed unless that comes later."""
        x = self.stem(x)
        for i, stage in enumerate(self.stages_):
            x = self.forward_stage(stage, x)
            if i + 1 < len(self.stages_):
                x = self.next_resolution(stage, x)
        return self.norm_map(x)

    def norm_map(self, x: Tensor) -> Tensor:
        """The last norm, where it belongs to the last token map [B, Y, X, C]."""
        return x if self.norm_after_pool else self.last_norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Token map [B, Y, X, C] to logits [B, num_classes], or to pooled features with `pre_logits`."""
        x = self.global_pool(x)
        x = self.head_drop(self.last_norm(x) if self.norm_after_pool else x)
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, C, height, width] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return stage outputs as [B, C, Y, X] (before down-sampling), and the last token map with them.

        `indices` picks stages: the last n, or a list; `norm` applies the final norm to the last one;
        `stop_early` computes no further than needed.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, found {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages_), indices)
        features = []
        x = self.stem(x)
        final = len(self.stages_) - 1
        for i, stage in enumerate(self.stages_):
            if isinstance(stage, Stage):
                x, feature = stage(x, with_features=True)
            else:
                x = feature = self.forward_stage(stage, x)
            if i in take:
                kept = self.norm_map(feature) if norm and i == final else feature
                features.append(kept.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else kept)
            if i == final or (stop_early and i == last):
                x = feature
                break
            x = self.next_resolution(stage, x)
        if intermediates_only:
            return features
        return (self.norm_map(x) if i == final else x), features

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen stages do not need: later stages, and the norm and classifier where asked."""
        take, last = feature_take_indices(len(self.stages_), indices)
        shorter = last + 1 < len(self.stages_)
        self.keep_stages(last + 1)
        if shorter:
            if isinstance(self.stages_[-1], Stage):
                self.stages_[-1].downsample = None
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or shorter:
            self.set_submodule(self.norm_name, nn.Identity())
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        """Return the layer that makes logits."""
        return self.get_submodule(self.head_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for `num_classes` (0: none), and the pooling where given.

        Raises: ConfigError for another number of classes.
        """
        at_least(0, num_classes=num_classes)
        parameter = next(self.parameters())
        trainable = any(p.requires_grad for p in self.parameters())
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = self.make_pool(global_pool)
        head = nn.Identity()
        if num_classes:
            head = nn.Linear(
                self.num_features, num_classes, device=parameter.device, dtype=parameter.dtype
            ).requires_grad_(trainable)
        self.set_submodule(self.head_name, head.train(self.training))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only block inputs in training and compute the rest again in backward."""
        for module in self.modules():
            if hasattr(module, "grad_checkpointing"):
                module.grad_checkpointing = enable

    @staticmethod
    def filter_checkpoint(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Make the entries of a published file the model's by renaming and dropping; nothing by default."""
        return state

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that AdamW should not shrink beside the usual ones: position tables.

        Families differ in which they decay; of another attention, which nobody has published, none is.
        """
        tables = self.undecayed if self.as_published else POSITION_TABLES
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in tables}

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Say to which layer each parameter belongs, for layer-wise learning rates."""
        stages = self.stage_list
        layers = [
            # The step that ends a stage goes with its last block.
            (rf"^{stages}\.(\d+)\.downsample", (99999,)),
            (rf"^{stages}\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": rf"^{stages}\.(\d+)" if coarse else layers}


class Blocks(nn.Sequential):
    """Blocks one after the other, [B, Y, X, C] in and out."""

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = run(block, x, saving=self.grad_checkpointing)
        return x


class Stage(nn.Module):
    """Blocks at one resolution and, except in the last stage, the step to the next one."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = Blocks(*blocks)
        self.downsample = downsample

    def forward(self, x: Tensor, with_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """[B, Y, X, C] to that of the next stage, `with_features` beside that of this one's blocks."""
        features = self.blocks(x)
        x = features if self.downsample is None else self.downsample(features)
        return (x, features) if with_features else x


def run(block: Callable[..., Tensor], *inputs: object, saving: bool) -> Tensor:
    """Run one block, keeping only its inputs for backward where that was asked for."""
    return checkpoint(block, *inputs) if saving and torch.is_grad_enabled() else block(*inputs)


def refuse_pyramid(dims: Sequence[int], num_heads: Sequence[int]) -> None:
    """Raise ConfigError where widths do not double from stage to stage or heads do not divide them."""
    doubled = tuple(dims[0] * 2**i for i in range(len(dims)))
    if tuple(dims) != doubled:
        raise ConfigError(f"dims={dims} must double from stage to stage, such as {doubled}")
    for dim, heads in zip(dims, num_heads, strict=True):
        if dim % heads:
            raise ConfigError(f"num_heads={num_heads}: {heads} does not divide the dim {dim}")


def init_as_published(module: nn.Module) -> None:
    """Initialise linear layers: normal weights of 0.02 and zero biases; the rest stays as in torch."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth that grows linearly over all blocks, from 0 to `rate`, stage by stage."""
    values = torch.linspace(0, rate, sum(depths), device="cpu").tolist()
    return [[values.pop(0) for _ in range(depth)] for depth in depths]
