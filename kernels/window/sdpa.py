"""Window attention through PyTorch's fused attention, no shift behind a mask; for any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import all_finite, is_traced, learns, shows_values, widened
from zoo.kernels.window.windows import in_some_windows, in_windows


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
    on_cpu = q.device.type == "cpu"
    # What torch.func maps does not tell whether it wants a gradient.
    mapped = torch._C._are_functorch_transforms_active()
    trained = bias is not None and (mapped or learns(bias))
    # SDPA returns no LSE and wants one width; for a bias with a gradient a CPU's has no fused path.
    fused = not return_lse and v.shape[-1] == k.shape[-1] and not (on_cpu and trained)
    if bias is not None:
        # A parameter would cost it that path even where no gradients are taken.
        bias = bias.to(dtype) if trained else bias.detach().to(dtype)
    # Whether a bias hides a whole window is looked up where that costs next to nothing, else assumed.
    may_hide = bias is not None and not (on_cpu and shows_values(bias) and all_finite(bias))

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not may_hide:
            return weigh(q, k, v, bias)
        nothing = (bias == float("-inf")).all(dim=-1, keepdim=True)  # [H, T, 1]: it hides the whole window
        out, lse = weigh(q, k, v, bias.masked_fill(nothing, 0.0))
        return out.masked_fill(nothing, 0.0), None if lse is None else lse.masked_fill(nothing, float("-inf"))

    def weigh(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if fused:
            # CUDA's kernels take no other dtype than q's, a CPU's no mask of three axes.
            bias = None if bias is None else bias[None].to(q.dtype)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale), None
        logits = (q.to(dtype) * scale) @ k.to(dtype).mT
        logits = logits if bias is None else logits + bias
        out = logits.softmax(dim=-1) @ v.to(dtype)
        return out, logits.logsumexp(dim=-1, keepdim=True) if return_lse else None

    in_parts = (
        on_cpu and fused and not (torch.is_grad_enabled() or is_traced() or q.shape[1:3] == window_size)
    )
    each = in_some_windows if in_parts else in_windows
    return each(attend, q, k, v, window_size, shift, bias)
