"""Aligned attention as one opaque operator."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.operators import implementation, register_attention


@torch.library.custom_op("zoo::aligned_attention", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, radius: list[int], scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Return the output [B, *grid, Hq, Dv] in q's dtype and the natural-log LSE [B, *grid, Hq]."""
    return implementation("aligned", backend).forward(q, k, v, tuple(radius), scale)


@torch.library.custom_op("zoo::aligned_attention_backward", mutates_args=())
def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    radius: list[int],
    scale: float,
    backend: str,
) -> list[Tensor]:
    """Return the gradients of q, k and v."""
    return implementation("aligned", backend).backward(
        grad_out, grad_lse, q, k, v, out, lse, tuple(radius), scale
    )


register_attention(forward, backward, 3)
