"""Window attention as one opaque operator."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.operators import bias_wanted, implementation, register_attention


@torch.library.custom_op("zoo::window_attention", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window_size: list[int],
    shift: list[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the output [B, Y, X, H, Dv] in q's dtype and the natural-log LSE [B, Y, X, H]."""
    return implementation("window", backend).forward(q, k, v, bias, tuple(window_size), tuple(shift), scale)


@torch.library.custom_op("zoo::window_attention_backward", mutates_args=())
def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window_size: list[int],
    shift: list[int],
    scale: float,
    backend: str,
    bias_grad: bool,
) -> list[Tensor]:
    """Return the gradients of q, k, v and, with `bias_grad`, of the bias."""
    return implementation("window", backend).backward(
        grad_out, grad_lse, q, k, v, bias, out, lse, tuple(window_size), tuple(shift), scale, bias_grad
    )


register_attention(forward, backward, 4, bias_wanted)
