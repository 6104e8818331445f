"""Norm and rotary positions by their definition."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_norm(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float
) -> Tensor:
    """Return x [B, N, H, D] normed where there is a weight [D] and turned by angles [N, D / 2] where there
    are any, in at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x = x.to(dtype)
    if weight is not None:
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(dtype)
    if cos is not None:
        cos, sin = (part.to(dtype)[:, None] for part in (cos, sin))
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        x = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
    return x
