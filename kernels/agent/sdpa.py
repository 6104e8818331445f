"""Agent attention through PyTorch's fused attention, twice: fastest on a CPU, and for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.checks import all_finite, learns, shows_values, widened
from zoo.kernels.fused import breaks_vectors, fused_attention
from zoo.kernels.softmax import softmax


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
    q, k, v, agents = widened(q, k, v, agents)  # what the agents gather is not rounded on the way
    if shared > 1:
        k, v = k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)
    agents = agents.transpose(1, 2)  # [B, H, A, D]
    gathered = _attend(agents, k.transpose(1, 2), v.transpose(1, 2), bias_in, scale)
    return _attend(q.transpose(1, 2), agents, gathered, bias_out, scale).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    if bias is not None and bias.ndim < 4:
        bias = bias[(None,) * (4 - bias.ndim)]
    if bias is None or not learns(bias):
        if bias is not None:
            bias = _as_mask(bias, q, k.shape[2])
        return fused_attention(q, k, v, bias, scale)
    # Where a bias wants its gradient, SDPA is slower than the two products. Agents are few: scale them.
    given, dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v, bias = (x.to(dtype) for x in (q, k, v, bias))
    q, k = (q * scale, k) if q.shape[2] < k.shape[2] else (q, k * scale)
    # Whether rows may see nothing is looked up where that costs next to nothing, else assumed.
    may_hide = bias.device.type != "cpu" or not (shows_values(bias) and all_finite(bias))
    if not may_hide and breaks_vectors(q, k.shape[2]):
        # The softmax goes along the many queries, which are whole vectors.
        logits = k @ q.mT + bias.mT.contiguous()
        return (logits.softmax(dim=-2).mT @ v).to(given)
    logits = q @ k.mT + bias
    weights = softmax(logits)[0] if may_hide else logits.softmax(dim=-1)
    return (weights @ v).to(given)


def _as_mask(bias: Tensor, q: Tensor, keys: int) -> Tensor:
    """What the fused kernels of a CPU take: of q's dtype, of all keys, and nothing that wants a gradient."""
    # Only the calls that are needed: each takes 10 to 20 microseconds after a long one has filled the caches.
    bias = bias.detach() if bias.requires_grad else bias
    bias = bias if bias.dtype == q.dtype else bias.to(q.dtype)
    return bias if bias.shape[-1] == keys else bias.expand(-1, -1, -1, keys)
