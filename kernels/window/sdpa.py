"""Window attention through PyTorch's fused attention, without a mask; for any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import widened
from zoo.kernels.window.windows import in_windows


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
    bias: Tensor | None,
    *,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the output [B, Y, X, H, Dv] and, where asked for, the natural-log LSE [B, Y, X, H]."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = widened(q, k, v)
    # SDPA returns no LSE and wants one width; with a bias it is slower on a CPU than two products.
    fused = not return_lse and v.shape[-1] == k.shape[-1] and (bias is None or q.device.type != "cpu")

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if bias is None:
            return weigh(q, k, v, None)
        nothing = (bias == float("-inf")).all(dim=-1, keepdim=True)  # [H, T, 1]: it hides the whole window
        out, lse = weigh(q, k, v, bias.masked_fill(nothing, 0.0))
        return out.masked_fill(nothing, 0.0), None if lse is None else lse.masked_fill(nothing, float("-inf"))

    def weigh(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if fused:
            bias = None if bias is None else bias.to(q.dtype)  # CUDA's kernels take no other
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale), None
        logits = (q.to(dtype) * scale) @ k.to(dtype).mT
        logits = logits if bias is None else logits + bias
        out = logits.softmax(dim=-1) @ v.to(dtype)
        return out, logits.logsumexp(dim=-1, keepdim=True) if return_lse else None

    if bias is not None:
        bias = bias.to(dtype)
    return in_windows(attend, q, k, v, window_size, shift, bias)
