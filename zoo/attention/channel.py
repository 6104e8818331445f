"""Channel attention as a module: groups of channels attend to each other over all tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo import ops
from zoo.attention.capture import AttentionRecord
from zoo.errors import ConfigError


class ChannelAttention(nn.Module):
    """Attention of every channel to the channels of its group, whose features are all tokens of the map.

    `version` is the published form, which the names of the weights do not tell. With D channels in a group
    and N tokens, and as the projections are called in the files:

        version               1 (DaViT)      2 (Florence-2)
        who attends to whom   k to v         q to k
        what is summed        q              v
        scale                 D**-0.5        N**-0.5

    Shapes: [B, Y, X, C] in and out; `num_heads` is the number of groups. The weights follow the number of
    tokens, version 1's strongly. Raises: ConfigError when num_heads does not divide dim, or for another
    version. Source: Ding et al. 2022 (arXiv:2204.03645) Sec. 3.2, which has version 2's roles and version 1's
    scale; version 2: Xiao et al. 2023 (arXiv:2311.06242).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        version: int = 1,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ConfigError(f"dim {dim} must be a multiple of num_heads {num_heads}")
        if version not in (1, 2):
            raise ConfigError(f"version must be 1 (DaViT) or 2 (Florence-2), found {version!r}")
        self.dim, self.num_heads = dim, num_heads
        self.version = version
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def _project(self, x: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
        """What attends, what is attended and what is summed as [B, Y, X, H, D], and the scale."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        if self.version == 1:
            return (k, v, q), (self.dim // self.num_heads) ** -0.5
        return (q, k, v), (x.shape[1] * x.shape[2]) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        """[B, Y, X, C] to [B, Y, X, C]."""
        roles, scale = self._project(x)
        return self.proj_drop(self.proj(ops.channel_attention(*roles, scale=scale).flatten(-2)))

    def attention_weights(self, x: Tensor) -> AttentionRecord:
        """Weights of every channel over its group for the input [B, Y, X, C] of `forward`."""
        (q, k, _), scale = self._project(x)
        with torch.autocast(x.device.type, enabled=False):
            logits = scale * torch.einsum("byxhd,byxhe->bhde", q.float(), k.float())
        axes = ("batch", "head", "channel", "key channel")
        grid = tuple(x.shape[1:3])
        return AttentionRecord(logits.softmax(dim=-1), axes, grid, grid)

    def attention_macs(self, shape: torch.Size) -> int:
        """Multiply-adds of the two products for an input of this shape, [B, Y, X, C]."""
        batch, rows, columns, channels = shape
        return 2 * batch * rows * columns * channels * (channels // self.num_heads)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, version={self.version}"
