"""Attention of every token to every token, with a depthwise convolution that tells where things are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo import ops
from zoo.attention.capture import AttentionRecord
from zoo.attention.layers import Pointwise, lepe
from zoo.errors import ConfigError


class GlobalAttention(nn.Module):
    """Multi-head attention over the whole map, plus a locally enhanced positional encoding (LePE).

    Shapes: [B, Y, X, C] in and out. LePE is a depthwise convolution, `side_dwconv` tokens wide, of the values
    (`lepe_of` "value", as first published) or of the module's input ("input", as in BiFormer); None leaves it
    out, and tokens are then a set. `pointwise` keeps the projections' weights as 1 x 1 convolutions, which
    some published files do. Logits are scaled by the width of a head.
    Raises: ConfigError when num_heads does not divide dim, or for an unknown `lepe_of`.
    Source: Vaswani et al. 2017 (arXiv:1706.03762) Sec. 3.2; LePE: Dong et al. 2022 (arXiv:2107.00652)
    Sec. 3.2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        lepe_of: str | None = "value",
        side_dwconv: int = 5,
        pointwise: bool = False,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ConfigError(f"dim {dim} must be a multiple of num_heads {num_heads}")
        if lepe_of not in ("value", "input", None):
            raise ConfigError(f"lepe_of must be 'value', 'input' or None, found {lepe_of!r}")
        self.dim, self.num_heads, self.lepe_of = dim, num_heads, lepe_of
        linear = Pointwise if pointwise else nn.Linear
        self.qkv = linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = linear(dim, dim, **factory)
        self.lepe = None if lepe_of is None else lepe(dim, side_dwconv, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as [B, N, H, D]."""
        return self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).unbind(2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, Y, X, C] to [B, Y, X, C]."""
        q, k, v = self._project(x)
        out = ops.attention(q, k, v).flatten(2).view(x.shape)
        if self.lepe is not None:
            values = v.flatten(2).view(x.shape)
            out = out + self.lepe(x if self.lepe_of == "input" else values)
        return self.proj_drop(self.proj(out))

    def attention_weights(self, x: Tensor) -> AttentionRecord:
        """Weights of every query over all tokens for the input [B, Y, X, C] of `forward`."""
        q, k, _ = (part.float().transpose(1, 2) for part in self._project(x))
        with torch.autocast(x.device.type, enabled=False):
            weights = (q.shape[-1] ** -0.5 * q @ k.transpose(-1, -2)).softmax(dim=-1)
        grid, tokens = tuple(x.shape[1:3]), weights.shape[-1]
        keys = torch.arange(tokens, device=x.device).expand(tokens, -1)
        axes = ("batch", "row", "column", "head", "key")
        return AttentionRecord(weights.transpose(1, 2).unflatten(1, grid), axes, grid, grid, keys)

    def attention_macs(self, shape: torch.Size) -> int:
        """Multiply-adds of the two products for an input of this shape, [B, Y, X, C]."""
        batch, rows, columns, channels = shape
        return 2 * batch * (rows * columns) ** 2 * channels

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, lepe_of={self.lepe_of!r}"
