"""Bi-level routing attention as one opaque operator."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.operators import implementation, register_attention


@torch.library.custom_op("zoo::bilevel_routing_attention", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: list[int], scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Return the output [B, Y, X, Hq, Dv] in q's dtype and the natural-log LSE [B, Y, X, Hq]."""
    return implementation("bilevel", backend).forward(q, k, v, routes, tuple(regions), scale)


@torch.library.custom_op("zoo::bilevel_routing_attention_backward", mutates_args=())
def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    out: Tensor,
    lse: Tensor,
    regions: list[int],
    scale: float,
    backend: str,
) -> list[Tensor]:
    """Return the gradients of q, k and v."""
    return implementation("bilevel", backend).backward(
        grad_out, grad_lse, q, k, v, routes, out, lse, tuple(regions), scale
    )


register_attention(forward, backward, 4)
