"""Attention of all to all with a bias as one opaque operator; agent attention calls it twice."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.operators import bias_wanted, implementation, register_attention


@torch.library.custom_op("zoo::biased_attention", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Return the output [B, N, H, Dv] in q's dtype and the natural-log LSE [B, N, H].

    The bias is [B or 1, H or 1, N, M], or [B or 1, 1, 1, M] without a gradient.
    """
    return implementation("dense", backend).forward(q, k, v, bias, scale)


@torch.library.custom_op("zoo::biased_attention_backward", mutates_args=())
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
    backend: str,
    bias_grad: bool,
) -> list[Tensor]:
    """Return the gradients of q, k, v and, with `bias_grad`, of the bias."""
    return implementation("dense", backend).backward(
        grad_out, grad_lse, q, k, v, bias, out, lse, scale, bias_grad
    )


register_attention(forward, backward, 4, bias_wanted)
