"""Radial attention in a pretrained video generator: the further apart two frames, the narrower the band.

Source: Li et al. 2025, Radial Attention (arXiv:2506.19852); the masks are in zoo/layers/radial.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from zoo import ops
from zoo.diffusion.adapters import Adapter
from zoo.diffusion.handle import Handle, apply
from zoo.diffusion.processor import Config, Processor, check_backend
from zoo.layers.radial import radial_block_mask
from zoo.layers.tokens import TokenLayout


@dataclass(frozen=True)
class RadialPlan:
    """The lists of one geometry and the query-key pairs that they hold, per head."""

    blocks: ops.BlockList
    pairs: int


@dataclass(frozen=True, kw_only=True)
class RadialConfig(Config):
    """The arguments of `radial_block_mask` that no geometry decides; `sink` None: as the model's family."""

    decay_factor: float = 1.0
    block_size: int = 128
    decimation_threshold: float = 128
    sink: bool | None = None
    keep_diagonal: bool = True
    rule: str = "released"
    backend: str = "auto"

    def rules(self) -> dict[str, Any]:
        """Return the arguments of `radial_block_mask`, the sink apart."""
        names = ("decay_factor", "block_size", "decimation_threshold", "keep_diagonal", "rule")
        return {name: getattr(self, name) for name in names}

    def check(self, axes: int) -> None:
        """Raise ConfigError for settings that make no mask."""
        radial_block_mask(1, 1, sink=self.sink, **self.rules())
        check_backend(self.backend, "block_sparse_attention")

    def plan(
        self, adapter: Adapter, layout: TokenLayout, text: int, device: torch.device, phase: Any
    ) -> RadialPlan | None:
        """Return which blocks see which in the sequence [video, text]; None where all see all."""
        frames, tokens = layout.grid[0], prod(layout.grid[1:])
        model_type = "wan" if adapter.model is WanTransformer3DModel else "hunyuan"
        mask = radial_block_mask(
            frames, tokens, text_tokens=layout.text, model_type=model_type, sink=self.sink, **self.rules()
        )
        # Padding is no key, so there are fewer blocks of keys.
        mask = mask[:, : -(-(layout.image + text) // self.block_size)]
        if bool(mask.all()):
            return None
        rows, columns = (
            torch.full((count,), self.block_size, dtype=torch.int64).clamp_(
                max=total - self.block_size * torch.arange(count)
            )
            for count, total in zip(mask.shape, (layout.tokens, layout.image + text), strict=True)
        )
        pairs = int((rows[:, None] * columns)[mask].sum())
        return RadialPlan(ops.BlockList.from_mask(mask, block_size=self.block_size).to(device), pairs)

    def pairs(self, layout: TokenLayout, text: int, plan: RadialPlan | None) -> int:
        """Query-key pairs of one head, counted in the lists."""
        return layout.tokens * (layout.image + text) if plan is None else plan.pairs

    def chosen_backend(self, query: Tensor, key: Tensor, layout: TokenLayout, plan: RadialPlan) -> str:
        """Name of the backend for a joint sequence [B, N, H, D] of this type and device."""
        arguments = (query, key, key, plan.blocks)
        return ops.explain("block_sparse_attention", *arguments, backend=self.backend).backend


class RadialProcessor(Processor):
    """Frames see each other in a band that narrows with their distance; text sees and is seen by all."""

    config: RadialConfig

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, plan: RadialPlan | None
    ) -> Tensor:
        if plan is None:
            return self.dense(query, key, value)
        turned = not layout.text_last and layout.text > 0
        if turned:  # the rule wants [video, text], so that blocks and frames begin together
            query, key, value = (torch.cat(layout.split(x)[::-1], dim=1) for x in (query, key, value))
        blocks = plan.blocks
        if blocks.offsets.device != query.device:  # offloading moves the inputs after the geometry was read
            blocks = blocks.to(query.device)
        out = ops.block_sparse_attention(query, key, value, blocks, backend=self.config.backend)
        return torch.cat([out[:, layout.image :], out[:, : layout.image]], dim=1) if turned else out


def apply_radial_attention(
    pipe_or_transformer: Any,
    *,
    decay_factor: float = 1.0,
    dense_steps: int = 0,
    dense_layers: int | Sequence[int | str] = 0,
    block_size: int = 128,
    decimation_threshold: float = 128,
    sink: bool | None = None,
    keep_diagonal: bool = True,
    rule: str = "released",
    backend: str = "auto",
) -> Handle:
    """Let frames of a diffusers video pipeline or transformer see the less of each other, the further apart.

    Works for Wan 2.1, Wan 2.2 (both transformers, steps counted over both), HunyuanVideo, Mochi, CogVideoX
    and LTX-Video. Frames, sizes, text and padding are read at every call; any length works.

    Units: as in `radial_block_mask`. `sink` None: Wan has one, the others do not. The first `dense_steps`
        denoising steps stay dense, and so do `dense_layers`: the first n layers, or a list of indices, names
        ("blocks.0") or patterns ("single_*"). A video whose every block would be kept is left dense.
    Returns: a handle with `remove()`, `stats()` and `compare_dense()`, also a context manager.
    Raises: ConfigError, with nothing changed, for a class or a processor that is not supported, wrong
        settings, context parallelism, or a second call before `remove()`.
    Source: Li et al. 2025 (arXiv:2506.19852). Published settings: Wan 2.1 14B at 69 frames 768 x 1280 has
        decay_factor=0.2, dense_layers=1, dense_steps=12 of 50; HunyuanVideo at 117 frames 0.95, 0 and 12;
        Wan 2.2 at 77 frames 0.8 with block_size=64, 1 and 11 of 40.
    """
    config = RadialConfig(
        decay_factor=decay_factor, block_size=block_size, decimation_threshold=decimation_threshold,
        sink=sink, keep_diagonal=keep_diagonal, rule=rule, backend=backend,
    )  # fmt: skip
    return apply(
        pipe_or_transformer,
        RadialProcessor,
        config,
        method="radial",
        dense_steps=dense_steps,
        dense_layers=dense_layers,
    )
