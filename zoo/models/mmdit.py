"""MMDiT: text and image in two streams that attend together; conditions beside them at linear cost.

Esser et al. 2024 (arXiv:2403.03206): joint attention, normed queries and keys, adaptive norms from time and
the pooled text; positions are rotary ones over rows and columns, as in Flux. Conditions (arXiv:2602.06850)
are modulated by time 0 whatever the step, so that their keys and values are the same at every step. Plain
modules; saving and loading as diffusers does is in zoo/diffusion/transformers.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo import ops
from zoo.attention.capture import AttentionRecord, weights_under
from zoo.errors import ConfigError
from zoo.layers.pka import ConditionCache, KeywordState, pka_attention, relation_mask
from zoo.layers.tokens import TokenLayout
from zoo.models.dit import (
    MLP,
    Block,
    FinalLayer,
    Modulation,
    PatchEmbed,
    TimestepEmbedder,
    init_as_published,
    per_sample,
    run_block,
)
from zoo.models.video_dit import check_attention, clamp_window, window_mask
from zoo.registry import register_generators

ATTENTIONS = ("global", "neighborhood")
QKV = tuple[Tensor, Tensor, Tensor]
Angles = tuple[Tensor, Tensor]
Settings = Mapping[str, Any] | None  # arguments of `pka_attention`


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    """Width in channels, depth in blocks."""

    depth: int
    hidden_size: int
    num_heads: int
    in_channels: int = 16
    text_dim: int = 768
    pooled_dim: int = 768


class Stream(nn.Module):
    """What a block has for one kind of tokens: norms, projections, MLP and their modulation."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = (nn.RMSNorm(dim // num_heads, eps=1e-6) for _ in range(2))
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = Modulation(dim, 6)

    def before(self, x: Tensor, condition: Tensor, angles: Angles | None) -> tuple[QKV, tuple[Tensor, ...]]:
        """Queries, keys and values [B, N, H, D], and the modulation that `after` needs."""
        modulation = self.adaLN_modulation(condition, 1)
        x = ops.modulated_norm(x, scale=modulation[1], shift=modulation[0])
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        turns = () if angles is None else angles
        q, k = (ops.rotary_norm(y, norm.weight, *turns) for y, norm in ((q, self.norm_q), (k, self.norm_k)))
        return (q, k, v), modulation

    def after(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Residuals of attention [B, N, H, D] and MLP."""
        _, _, gate, shift, scale, gate2 = modulation
        x = ops.gated_residual(x, self.proj(attended.flatten(2)), gate)
        return ops.gated_residual(x, self.mlp(ops.modulated_norm(x, scale, shift)), gate2)


class JointAttention(nn.Module):
    """Attention over [text, image, conditions], without projections: these belong to the streams.

    With `settings` there are conditions among keys and values; without, `attention` says what the image sees
    of itself.
    """

    def __init__(self, attention: str, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.attention, self.kwargs = attention, dict(kwargs)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, settings: Settings
    ) -> Tensor:
        """All [B, N, H, D]."""
        if settings is not None:
            return pka_attention(query, key, value, layout, **settings)
        if self.attention == "neighborhood" and layout.image > 1:
            return self.near(query, key, value, layout)
        return ops.attention(query, key, value)

    def near(self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout) -> Tensor:
        """Image tokens see their neighborhood and the text, text tokens see all; [B, N, H, D]."""
        axes = [i for i, n in enumerate(layout.grid) if n > 1]
        grid = [layout.grid[i] for i in axes]
        text, window = layout.text, clamp_window(layout.grid, axes, self.kwargs)
        maps = (x[:, text:].unflatten(1, grid) for x in (query, key, value))
        near = ops.neighborhood_attention(*maps, **window, extra_k=key[:, :text], extra_v=value[:, :text])
        return torch.cat([ops.attention(query[:, :text], key, value), near.flatten(1, -3)], dim=1)

    def attention_weights(
        self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, settings: Settings
    ) -> AttentionRecord:
        """Weights of every image token over text, image and conditions, for the arguments of `forward`.

        Raises: ConfigError where conditions are added up, each under a softmax of its own.
        """
        image, mask = layout.image_slice, None
        if settings is not None:
            settings = dict(settings)
            if settings.pop("combine") == "sum":
                raise ConfigError('combine="sum" has no common weights to look at; capture with "joint"')
            mask = relation_mask(layout, batch=len(query), **settings)[:, image]
        elif self.attention == "neighborhood":
            mask = torch.ones(layout.image, layout.tokens, dtype=torch.bool)
            mask[:, image] = window_mask(layout.grid, self.kwargs)
        weights = weights_under(query[:, image], key, mask).unflatten(1, layout.grid)
        keys = torch.full((key.shape[1],), -1, device=query.device)
        keys[image] = torch.arange(layout.image, device=query.device)
        axes = ("batch", "row", "column", "head", "key")
        return AttentionRecord(weights, axes, layout.grid, layout.grid, keys.expand(layout.image, -1))

    def macs(self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, settings: Settings) -> int:
        """Multiply-adds of both products, without conditions."""
        pairs = layout.tokens**2
        if self.attention == "neighborhood" and layout.image > 1:
            axes = [i for i, n in enumerate(layout.grid) if n > 1]
            window = math.prod(clamp_window(layout.grid, axes, self.kwargs)["kernel_size"])
            pairs = layout.text * layout.tokens + layout.image * (window + layout.text)
        return 2 * len(query) * pairs * query.shape[2] * query.shape[3]


class MMDiTBlock(Block):
    """One stream for the text, one for the image and its conditions."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, attention: str, kwargs: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.text, self.image = (Stream(dim, num_heads, mlp_ratio) for _ in range(2))
        self.attn = JointAttention(attention, kwargs)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        condition: Tensor,
        angles: Angles,
        layout: TokenLayout,
        extra: tuple[Tensor, Tensor] | None,
        settings: Mapping[str, Any],
        look: Callable[[Tensor, Tensor], list[Tensor | None] | None] | None,
    ) -> tuple[Tensor, Tensor]:
        """One step of both streams; `extra` are keys and values of the conditions in this layer.

        `look` is shown the image's queries and the text's keys; what it returns is routed at once.
        """
        text_qkv, text_modulation = self.text.before(text, condition, None)
        image_qkv, image_modulation = self.image.before(image, condition, angles)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(text_qkv, image_qkv, strict=True))
        if extra is not None:
            key, value = (torch.cat(pair, dim=1) for pair in zip((key, value), extra, strict=True))
            if look is not None:
                routed = look(image_qkv[0], text_qkv[1])
                settings = settings if routed is None else {**settings, "routed": routed}
        out = self.processor(self.attn, query, key, value, layout, None if extra is None else settings)
        text_out, image_out = out[:, : layout.text], out[:, layout.text :]
        return (
            self.image.after(image, image_out, image_modulation),
            self.text.after(text, text_out, text_modulation),
        )

    def on_its_own(self, x: Tensor, condition: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """One step of a condition, which sees itself alone; and its keys and values for the image."""
        (query, key, value), modulation = self.image.before(x, condition, angles)
        x = self.image.after(x, ops.attention(query, key, value), modulation)
        return x, key, value


class MMDiT(nn.Module):
    """Predict velocity from noisy latents, a time, a text and any number of conditions.

    Shapes: latents [B, C, height, width] that `patch_size` divides, time [B] or a number from 0 to 1000
        (noise), text [B, M, text_dim], pooled [B, pooled_dim]. `spatial` latents have the image's size and
        are aligned with it, `subjects` have any size. Returns the latents' shape.
    `keywords` remembers between steps where the subjects' keywords are, `cache` the conditions' keys and
    values: both belong to one generation and, with guidance, to one of its two prompts. In training there is
    no step before, and `keywords` route by the same forward. `paa_radius` and `combine` as in
    `pka_attention`. With conditions, attention is PKA whatever `attention` says.
    Raises: ConfigError for sizes that do not divide or fit, and an unknown attention or argument of one.
    """

    def __init__(
        self,
        *,
        depth: int = 12,
        hidden_size: int = 384,
        num_heads: int = 6,
        patch_size: int = 2,
        in_channels: int = 16,
        text_dim: int = 768,
        pooled_dim: int = 768,
        mlp_ratio: float = 4.0,
        attention: str = "global",
        attention_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        width = hidden_size // num_heads
        if hidden_size % num_heads or width % 4:
            raise ConfigError(
                f"hidden_size must give each of {num_heads} heads a width that 4 divides, found {hidden_size}"
            )
        check_attention(attention, attention_kwargs or {}, ATTENTIONS, axes=2)
        self.patch_size, self.width = patch_size, width
        self.x_embedder = PatchEmbed(in_channels, hidden_size, (patch_size, patch_size))
        self.text_embedder = nn.Linear(text_dim, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.pooled_embedder = nn.Sequential(
            nn.Linear(pooled_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        kwargs = {"kernel_size": 7, **(attention_kwargs or {})} if attention == "neighborhood" else {}
        self.blocks = nn.ModuleList(
            MMDiTBlock(hidden_size, num_heads, mlp_ratio, attention, kwargs) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)
        self.gradient_checkpointing = False
        init_as_published(self)

    def forward(
        self,
        latents: Tensor,
        time: Tensor | float,
        text: Tensor,
        pooled: Tensor,
        *,
        spatial: Sequence[Tensor] = (),
        subjects: Sequence[Tensor] = (),
        keywords: KeywordState | None = None,
        cache: ConditionCache | None = None,
        paa_radius: int = 0,
        combine: str = "joint",
    ) -> Tensor:
        image = self.x_embedder(latents)
        grid = tuple(image.shape[1:-1])
        pooled = self.pooled_embedder(pooled)
        condition = self.t_embedder(per_sample(time, latents)) + pooled
        extra, layout = None, TokenLayout(text.shape[1], grid)
        if spatial or subjects:
            layout = self.layout_of(layout, spatial, subjects)
            # Nothing here knows the time.
            make = lambda: self.keys_and_values((*spatial, *subjects), len(spatial), grid, pooled)  # noqa: E731
            keys, values = make() if cache is None else cache.get("conditions", make, time)
            extra = list(zip(keys, values, strict=True))
        image, text = image.flatten(1, 2), self.text_embedder(text)
        angles = angles_of(grid, self.width, image.device)
        for layer, block in enumerate(self.blocks):
            # Asked for here: a block that is computed again for its gradient must not see what it found.
            routed = [None] * len(subjects) if keywords is None else keywords.routed(layer)
            settings = {"routed": routed, "paa_radius": paa_radius, "combine": combine}
            image, text = run_block(
                self, block, image, text, condition, angles, layout,
                None if extra is None else extra[layer], settings,
                self.look_of(keywords, layer),
            )  # fmt: skip
        x = self.final_layer(image.unflatten(1, grid), condition)
        x = x.unflatten(-1, (self.patch_size, self.patch_size, -1))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Arguments of forward for an image of 512 x 512 pixels behind a usual VAE and a prompt, all zero."""
        latents = torch.zeros(1, self.x_embedder.proj.in_channels, 64, 64)
        text = torch.zeros(1, 77, self.text_embedder.in_features)
        return latents, torch.zeros(1), text, torch.zeros(1, self.pooled_embedder[0].in_features)

    def look_of(self, keywords: KeywordState | None, layer: int) -> Callable[..., Any] | None:
        """What a block is asked for: masks for the next step, or in training for this one."""
        if keywords is None:
            return None
        if self.training:
            return keywords.routed_by
        waiting = [keywords]

        def look(query_image: Tensor, key_text: Tensor) -> None:
            # A block that is computed again for its gradient must not undo what later steps have found.
            if waiting:
                waiting.pop().look(layer, query_image, key_text)

        return look

    def layout_of(
        self, layout: TokenLayout, spatial: Sequence[Tensor], subjects: Sequence[Tensor]
    ) -> TokenLayout:
        """Where text, image and conditions lie, or ConfigError."""
        grids = [tuple(n // self.patch_size for n in x.shape[-2:]) for x in (*spatial, *subjects)]
        for grid in grids[: len(spatial)]:
            if grid != layout.grid:
                raise ConfigError(
                    f"spatial conditions must have the image's grid of tokens {layout.grid}, found {grid}"
                )
        counts = tuple(rows * columns for rows, columns in grids[len(spatial) :])
        return TokenLayout(layout.text, layout.grid, len(spatial), counts)

    def keys_and_values(
        self, conditions: Sequence[Tensor], aligned: int, grid: tuple[int, int], pooled: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of all conditions in all layers, [L, B, N, H, D]; the first ones are `aligned`.

        Those that are not lie to the right of the image and of each other.
        """
        condition = self.t_embedder(pooled.new_zeros(len(pooled))) + pooled
        keys, values, right = [], [], grid[1]
        for number, latents in enumerate(conditions):
            x = self.x_embedder(latents)
            own = tuple(x.shape[1:-1])
            angles = angles_of(own, self.width, x.device, shift=0 if number < aligned else right)
            right += 0 if number < aligned else own[1]
            x, layers = x.flatten(1, 2), []
            for block in self.blocks:
                x, key, value = block.on_its_own(x, condition, angles)
                layers.append((key, value))
            for into, parts in zip((keys, values), zip(*layers, strict=True), strict=True):
                into.append(torch.stack(parts))
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)


def angles_of(grid: tuple[int, int], width: int, device: torch.device, *, shift: int = 0) -> Angles:
    """Cosines and sines of every place, [N, D / 2]: half of the channels turns with each axis."""
    count = width // 4
    omega = 10_000.0 ** (-torch.arange(count, dtype=torch.float32, device=device) / count)
    row, column = (
        (torch.arange(n, dtype=torch.float32, device=device) + start)[:, None] * omega
        for n, start in zip(grid, (0, shift), strict=True)
    )
    rows, columns = grid
    angle = torch.cat(
        [row[:, None].expand(-1, columns, -1), column[None].expand(rows, -1, -1)], dim=-1
    ).flatten(0, 1)
    return angle.cos(), angle.sin()


VARIANTS = {
    f"mmdit_{size}": MMDiTConfig(depth=depth, hidden_size=width, num_heads=heads)
    for size, (depth, width, heads) in {
        "s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (24, 1536, 24)
    }.items()
}  # fmt: skip
# Ours, for pictures of two handwritten digits and prompts of a few words.
VARIANTS["mmdit_digits"] = MMDiTConfig(
    depth=4, hidden_size=96, num_heads=4, in_channels=1, text_dim=64, pooled_dim=64
)
register_generators(
    MMDiT, VARIANTS, paper="arXiv:2403.03206, arXiv:2602.06850", attention="global, neighborhood, PKA"
)
