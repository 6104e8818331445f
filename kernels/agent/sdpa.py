"""Agent attention through PyTorch's fused attention, twice: fastest on a CPU, and for any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    bias_in: Tensor | None,
    bias_out: Tensor | None,
    scale: float,
) -> Tensor:
    """Return the output [B, N, H, Dv]."""
    shared = agents.shape[2] // k.shape[2]
    if q.dtype.itemsize < 4 and q.device.type == "cpu":  # what the agents gather is not rounded on the way
        q, k, v, agents = q.float(), k.float(), v.float(), agents.float()
    if shared > 1:
        k, v = k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)
    agents = agents.transpose(1, 2)  # [B, H, A, D]
    gathered = _attend(agents, k.transpose(1, 2), v.transpose(1, 2), bias_in, scale)
    return _attend(q.transpose(1, 2), agents, gathered, bias_out, scale).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    if bias is None or not (bias.requires_grad and torch.is_grad_enabled()):
        # The fused kernels of a CPU take a mask of two or four axes.
        bias = None if bias is None else bias.to(q.dtype)[(None,) * (4 - bias.ndim)]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    # Where a bias wants its gradient, SDPA is slower than the two products. Agents are few: scale them.
    given, dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v, bias = (x.to(dtype) for x in (q, k, v, bias))
    q, k = (q * scale, k) if q.shape[2] < k.shape[2] else (q, k * scale)
    logits = q @ k.transpose(-2, -1)
    if not _may_hide(bias):
        return ((logits + bias).softmax(dim=-1) @ v).to(given)
    nothing = (bias == float("-inf")).all(dim=-1, keepdim=True)
    weights = (logits + bias.masked_fill(nothing, 0.0)).softmax(dim=-1)
    return (weights @ v).masked_fill(nothing, 0.0).to(given)


def _may_hide(bias: Tensor) -> bool:
    """Whether rows may see nothing: looked up where that costs next to nothing, else assumed."""
    if torch.compiler.is_compiling() or bias.device.type != "cpu":
        return True
    return bias.numel() > 0 and bias.detach().amin().item() == float("-inf")
