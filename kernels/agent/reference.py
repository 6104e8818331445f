"""Agent attention by its definition: the agents attend to the tokens, then the queries to the agents."""

from __future__ import annotations

import torch
from torch import Tensor

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
    """Return the output [B, N, H, Dv] in at least float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    shared = agents.shape[2] // k.shape[2]
    q, k, v, agents = (x.to(dtype) for x in (q, k, v, agents))
    k, v = (x.repeat_interleave(shared, dim=2) for x in (k, v))
    gathered = torch.einsum("bham,bmhd->bahd", attention(agents, k, bias_in, scale), v)
    return torch.einsum("bhna,bahd->bnhd", attention(q, agents, bias_out, scale), gathered)


def attention(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Softmax over the keys for every query, [B, H, N, M]; a query that sees nothing weighs nothing."""
    logits = scale * torch.einsum("bnhd,bmhd->bhnm", q, k)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    return softmax(logits)[0]
