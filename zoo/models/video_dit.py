"""Video diffusion transformers: DiT blocks over frames, rows and columns with rotary positions.

The blocks are DiT's (arXiv:2212.09748), positions three-dimensional rotary ones, queries and keys normed; the
text is read by cross-attention. Self-attention is global, radial (arXiv:2506.19852) or a neighborhood
(arXiv:2504.16922). Plain modules; saving and loading as diffusers does is in zoo/diffusion/transformers.py.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo import ops
from zoo.attention.capture import AttentionRecord, weights_under
from zoo.errors import ConfigError, did_you_mean
from zoo.layers.radial import radial_block_mask
from zoo.models.dit import (
    DiTBlock,
    FinalLayer,
    PatchEmbed,
    TimestepEmbedder,
    init_as_published,
    per_sample,
    run_block,
)
from zoo.registry import register_generators

ATTENTIONS = ("global", "radial", "neighborhood")
ARGUMENTS = {
    "global": (),
    "radial": (
        "block_size", "decay_factor", "decimation_threshold", "model_type", "sink", "keep_diagonal", "rule"
    ),
    "neighborhood": ("kernel_size", "dilation", "stride"),
}  # fmt: skip
GEOMETRIES = 16  # of which a model keeps the lists of blocks


@dataclass(frozen=True, kw_only=True)
class VideoDiTConfig:
    """Width in channels, depth in blocks."""

    depth: int
    hidden_size: int
    num_heads: int


class VideoAttention(nn.Module):
    """Self-attention over [B, T, Y, X, C], then cross-attention to a text [B, M, C], if there is one.

    `attention` "radial" takes the arguments of `radial_block_mask` (block_size, decay_factor ...),
    "neighborhood" those of `ops.neighborhood_attention` (kernel_size, dilation, stride), clamped to the grid.
    """

    def __init__(
        self, dim: int, num_heads: int, attention: str, kwargs: Mapping[str, Any] | None, has_text: bool
    ) -> None:
        super().__init__()
        if dim % num_heads or dim // num_heads < 6 or dim // num_heads % 2:
            raise ConfigError(
                f"hidden_size must give each of {num_heads} heads an even width of at least 6, found {dim}"
            )
        check_attention(attention, kwargs or {}, ATTENTIONS, axes=3)
        self.num_heads, self.attention, self.kwargs = num_heads, attention, dict(kwargs or {})
        if attention == "neighborhood":
            self.kwargs = {"kernel_size": 7, **self.kwargs}
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = (nn.RMSNorm(dim // num_heads, eps=1e-6) for _ in range(2))
        self.cross = CrossAttention(dim, num_heads) if has_text else None

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        lists: Any,
        text: Tensor | None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        out = self.proj(self.mix(*self.project(x, rotary), lists).flatten(-2))
        return out if self.cross is None else out + self.cross(x, text, text_mask)

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, T, Y, X, H, D]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        q, k = (ops.rotary_norm(y, norm.weight, *rotary) for y, norm in ((q, self.norm_q), (k, self.norm_k)))
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, lists: ops.BlockList | None) -> Tensor:
        """Attend over the grid; all [B, T, Y, X, H, D]."""
        grid = q.shape[1:4]
        if self.attention == "neighborhood":
            axes = [i for i, n in enumerate(grid) if n > 1]  # along one token there is nothing to choose
            if axes:
                flat = [y.reshape(len(y), *(grid[i] for i in axes), *y.shape[4:]) for y in (q, k, v)]
                window = clamp_window(grid, axes, self.kwargs)
                return ops.neighborhood_attention(*flat, **window).view(v.shape)
        q, k, v = (y.flatten(1, 3) for y in (q, k, v))
        if lists is not None:
            out = ops.block_sparse_attention(q, k, v, lists)
        else:
            out = ops.attention(q, k, v)
        return out.unflatten(1, grid)

    def attention_weights(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], lists: ops.BlockList | None, *text: Tensor | None
    ) -> AttentionRecord:
        """Weights of every token over all tokens of the video, for the arguments of `forward`."""
        grid, tokens = tuple(x.shape[1:4]), x[0, ..., 0].numel()
        mask = window_mask(grid, self.kwargs) if self.attention == "neighborhood" else None
        if lists is not None:
            sizes = lists.query_size, lists.key_size
            mask = lists.to_mask()[0, 0].repeat_interleave(sizes[0], 0).repeat_interleave(sizes[1], 1)
            mask = mask[:tokens, :tokens]
        q, k, _ = (y.flatten(1, 3) for y in self.project(x, rotary))
        weights = weights_under(q, k, mask).unflatten(1, grid)
        keys = torch.arange(tokens, device=x.device).expand(tokens, -1)
        return AttentionRecord(weights, ("batch", "frame", "row", "column", "head", "key"), grid, grid, keys)

    def macs(self, x: Tensor, rotary: Any, lists: ops.BlockList | None, *text: Tensor | None) -> int:
        """Multiply-adds of both products of self-attention for these arguments of forward."""
        batch, *grid, channels = x.shape
        tokens = math.prod(grid)
        pairs = tokens**2
        if lists is not None:
            pairs = min(pairs, lists.indices.shape[-1] * lists.query_size * lists.key_size)
        elif self.attention == "neighborhood":
            axes = [i for i, n in enumerate(grid) if n > 1]
            pairs = tokens * math.prod(clamp_window(grid, axes, self.kwargs)["kernel_size"])
        return 2 * batch * pairs * channels


class CrossAttention(nn.Module):
    """What a token reads from the text; nothing of its padding, and 0 where there is nothing else."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        q = self.q(x).flatten(1, -2).unflatten(-1, (self.num_heads, -1))
        k, v = self.kv(text).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return self.proj(ops.attention(q, k, v, key_mask=text_mask).flatten(2)).view(x.shape)

    def macs(self, x: Tensor, text: Tensor, text_mask: Tensor | None = None) -> int:
        """Multiply-adds of both products for these arguments of forward."""
        return 2 * x.numel() * text.shape[1]


class VideoDiT(nn.Module):
    """Predict noise or velocity from noisy video latents, a time and, with `text_dim`, a text.

    Shapes: latents [B, C, T, height, width] that `patch_size` divides, time [B] or a number, text
        [B, M, text_dim], text_mask [B, M], bool or 0 and 1, true where the text is no padding; returns the
        latents' shape. Any size.
    Units: `patch_size` (frames, rows, columns) in latent pixels.
    Raises: ConfigError for a size that does not divide, an unknown attention or argument of one, a text
        where there is none (or none where there is one), or a mask that does not fit the text.
    """

    def __init__(
        self,
        *,
        depth: int = 12,
        hidden_size: int = 384,
        num_heads: int = 6,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        in_channels: int = 16,
        text_dim: int | None = None,
        mlp_ratio: float = 4.0,
        attention: str = "global",
        attention_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = tuple(patch_size)
        self.attention, self.attention_kwargs = attention, dict(attention_kwargs or {})
        self.head_dim = hidden_size // num_heads
        self.x_embedder = PatchEmbed(in_channels, hidden_size, self.patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.text_embedder = None if text_dim is None else nn.Linear(text_dim, hidden_size)
        self.blocks = nn.ModuleList(
            DiTBlock(
                hidden_size,
                VideoAttention(hidden_size, num_heads, attention, attention_kwargs, text_dim is not None),
                mlp_ratio,
            )
            for _ in range(depth)
        )
        patch = self.patch_size[0] * self.patch_size[1] * self.patch_size[2]
        self.final_layer = FinalLayer(hidden_size, patch * in_channels)
        self.gradient_checkpointing = False
        self._lists: OrderedDict[Any, ops.BlockList | None] = OrderedDict()
        init_as_published(self)

    def forward(
        self,
        latents: Tensor,
        time: Tensor | float,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        if (text is None) != (self.text_embedder is None):
            raise ConfigError(
                f"text must be {'left out' if self.text_embedder is None else 'given'} for this model, "
                f"found {None if text is None else tuple(text.shape)}"
            )
        if text_mask is not None:
            wanted = None if text is None else tuple(text.shape[:2])
            if tuple(text_mask.shape) != wanted or text_mask.is_floating_point():
                raise ConfigError(
                    f"text_mask must be bool, or 0 and 1, for each token of the text {wanted}, found "
                    f"{text_mask.dtype} {tuple(text_mask.shape)}"
                )
            text_mask = text_mask.bool()
        x = self.x_embedder(latents)
        text = None if text is None else self.text_embedder(text)
        condition = self.t_embedder(per_sample(time, latents))
        grid = tuple(x.shape[1:-1])
        context = (rotary_of(grid, self.head_dim, x.device), self.lists_of(grid, x.device), text, text_mask)
        for block in self.blocks:
            x = run_block(self, block, x, condition, *context)
        x = self.final_layer(x, condition).unflatten(-1, (*self.patch_size, -1))
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [B, C, T, pt, Y, py, X, px]
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Arguments of forward for 33 frames of 256 x 256 pixels behind a usual VAE, all zero."""
        text = [] if self.text_embedder is None else [torch.zeros(1, 77, self.text_embedder.in_features)]
        return torch.zeros(1, self.x_embedder.proj.in_channels, 9, 32, 32), torch.zeros(1), *text

    def lists_of(self, grid: tuple[int, int, int], device: torch.device) -> ops.BlockList | None:
        """Which blocks see which, made once for each geometry; None where all see all."""
        if self.attention != "radial":
            return None
        key = (grid, str(device))
        if key not in self._lists:
            # Lists made under torch.inference_mode must serve training as well.
            with torch.inference_mode(False):
                mask = radial_block_mask(grid[0], grid[1] * grid[2], **self.attention_kwargs)
                size = self.attention_kwargs.get("block_size", 128)
                blocks = ops.BlockList.from_mask(mask, block_size=size).to(device)
                self._lists[key] = None if bool(mask.all()) else blocks
            if len(self._lists) > GEOMETRIES:
                self._lists.popitem(last=False)
        return self._lists[key]


def check_attention(
    attention: str, kwargs: Mapping[str, Any], attentions: tuple[str, ...], *, axes: int
) -> None:
    """Raise ConfigError for an unknown attention, or arguments that it does not take on so many axes."""
    if attention not in attentions:
        near = did_you_mean(str(attention), attentions)
        raise ConfigError(f"unknown attention {attention!r}; use {', '.join(attentions)}{near}")
    allowed = ARGUMENTS[attention]
    for name in kwargs:
        if name not in allowed:
            use = f"use {', '.join(allowed)}{did_you_mean(str(name), allowed)}" if allowed else "it has none"
            raise ConfigError(f"unknown {name!r} in attention_kwargs of {attention!r}; {use}")
    if attention == "radial":
        radial_block_mask(1, 1, **kwargs)
        if type(kwargs.get("keep_diagonal", True)) is not bool:
            raise ConfigError(f"keep_diagonal must be True or False, found {kwargs['keep_diagonal']!r}")
    elif attention == "neighborhood":
        values = {"kernel_size": 7, "dilation": 1, "stride": 1, **kwargs}
        numbers = {}
        for name, value in values.items():
            least = 2 if name == "kernel_size" else 1
            numbers[name] = list(value) if isinstance(value, (tuple, list)) else [value] * axes
            if len(numbers[name]) != axes or not all(type(n) is int and n >= least for n in numbers[name]):
                raise ConfigError(
                    f"{name} must be one whole number >= {least} or {axes} of them, found {value!r}"
                )
        if any(s > k for s, k in zip(numbers["stride"], numbers["kernel_size"], strict=True)):
            raise ConfigError(
                f"stride must not exceed kernel_size {values['kernel_size']}, found {values['stride']}"
            )


def clamp_window(grid: tuple[int, ...], axes: list[int], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of neighborhood attention such that no window reaches beyond the grid."""
    every = {"kernel_size": 7, "dilation": 1, "stride": 1, **given}
    window = {name: [] for name in ("kernel_size", "dilation", "stride")}
    for i in axes:
        kernel_size, dilation, stride = (
            value[i] if isinstance(value, (tuple, list)) else value
            for value in (every[name] for name in window)
        )
        dilation = min(dilation, grid[i] // 2)
        kernel_size = min(kernel_size, grid[i] // dilation)
        for name, value in zip(window, (kernel_size, dilation, min(stride, kernel_size)), strict=True):
            window[name].append(value)
    return window


def window_mask(grid: tuple[int, ...], given: Mapping[str, Any]) -> Tensor:
    """Which tokens are in the neighborhood of which, bool [N, N]; for pictures, it is quadratic."""
    tokens, axes = math.prod(grid), [i for i, n in enumerate(grid) if n > 1]
    if not axes:
        return torch.ones(tokens, tokens, dtype=torch.bool)
    keys = ops.neighborhood_indices([grid[i] for i in axes], **clamp_window(grid, axes, given))
    return torch.zeros(tokens, tokens, dtype=torch.bool).scatter(1, keys, True)


def rotary_of(grid: tuple[int, int, int], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every place, [T, Y, X, D / 2]: a third of the channels turns with each axis."""
    pairs = width // 2
    parts = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    angles = []
    for axis, (length, count) in enumerate(zip(grid, parts, strict=True)):
        omega = 10_000.0 ** (-torch.arange(count, dtype=torch.float32, device=device) / max(count, 1))
        place = torch.arange(length, dtype=torch.float32, device=device)[:, None] * omega
        shape = [1, 1, 1, count]
        shape[axis] = length
        angles.append(place.view(shape).expand(*grid, count))
    angle = torch.cat(angles, dim=-1)
    return angle.cos(), angle.sin()


VARIANTS = {
    f"video_dit_{size}": VideoDiTConfig(depth=depth, hidden_size=width, num_heads=heads)
    for size, (depth, width, heads) in {
        "s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)
    }.items()
}  # fmt: skip
register_generators(
    VideoDiT, VARIANTS, paper="arXiv:2212.09748, arXiv:2506.19852", attention="global, radial, neighborhood"
)
