"""Attention of all to all on a CPU, with its LSE: SDPA's own kernel, which keeps that to itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output [B, N, H, Dv] in q's dtype and the natural-log LSE [B, N, H].

    The bias [B, 1, 1, M] is 0 or -inf.
    """
    if 0 in (q.numel(), k.numel()):  # the kernel divides by their lengths
        dtype = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        return out, q.new_full(q.shape[:3], float("-inf"), dtype=dtype)
    out, lse = _flash(*_heads_first(q, k, v), attn_mask=bias, scale=scale)
    out, lse = out[..., : v.shape[-1]].transpose(1, 2), lse.transpose(1, 2)
    if bias is not None:
        lse = lse.masked_fill(_nothing(bias), float("-inf"))
    return out.contiguous().to(q.dtype), lse.contiguous()


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    bias_grad: bool,
) -> list[Tensor]:
    """Return the gradients of q, k and v; a bias has none here."""
    if bias_grad:
        raise NotImplementedError("the CPU's kernel gives no gradient of a bias")
    if 0 in (q.numel(), k.numel()):
        return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    heads, kv_heads, widths, dtype = q.shape[2], k.shape[2], [x.shape[-1] for x in (q, k, v)], q.dtype
    if bias is not None:
        lse = lse.masked_fill(_nothing(bias), 0.0)
    if grad_lse is not None:
        # The kernel subtracts the row sums of grad_out * out from the logits' gradient; grad_lse must be
        # added to it. One more channel does: nothing in v, 1 in grad_out, -grad_lse in out.
        v, grad_out = F.pad(v, (0, 1)), F.pad(grad_out, (0, 1), value=1.0)
        out = torch.cat([out, -grad_lse[..., None]], dim=-1)
    q, k, v, grad_out, out = _heads_first(q, k, v, grad_out, out)
    grads = _flash_backward(
        grad_out, q, k, v, out, lse.transpose(1, 2), 0.0, False, attn_mask=bias, scale=scale
    )
    dq, *dkv = (x[..., :width].transpose(1, 2) for x, width in zip(grads, widths, strict=True))
    if kv_heads < heads:
        dkv = [x.unflatten(2, (kv_heads, -1)).sum(dim=3) for x in dkv]
    return [x.contiguous().to(dtype) for x in (dq, *dkv)]


def _heads_first(q: Tensor, *others: Tensor) -> list[Tensor]:
    """[B, H, N, D] of all as the kernel wants them: q's heads, the widest one's channels, at least float32,
    below which it rounds the weights."""
    tensors = [x.to(torch.promote_types(q.dtype, torch.float32)) for x in (q, *others)]
    wide = max(x.shape[-1] for x in tensors)
    tensors = [F.pad(x, (0, wide - x.shape[-1])) if x.shape[-1] < wide else x for x in tensors]
    heads = q.shape[2]
    return [x.repeat_interleave(heads // x.shape[2], dim=2).transpose(1, 2) for x in tensors]


def _nothing(bias: Tensor) -> Tensor:
    """Images that hide all their keys, [B, 1, 1]."""
    return (bias == float("-inf")).all(dim=-1)[:, 0, :, None]
