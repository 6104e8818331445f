"""Window attention by its definition: softmax over the tokens of a query's window, sum their values."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.softmax import softmax
from zoo.kernels.window.windows import in_windows


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the output [B, Y, X, H, Dv] and the natural-log LSE [B, Y, X, H], in at least float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = scale * torch.einsum("whqd,whkd->whqk", q, k)
        if bias is not None:
            logits = logits + bias
        weights, lse = softmax(logits)
        return torch.einsum("whqk,whkd->whqd", weights, v), lse[..., None]

    q, k, v, bias = (None if x is None else x.to(dtype) for x in (q, k, v, bias))
    return in_windows(attend, q, k, v, window_size, shift, bias)
