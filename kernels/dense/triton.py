"""Attention of all to all in Triton: the tile template over all pairs of tiles, with or without a bias.

Gradients of a bias that images or heads share are summed in registers.
"""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.tile import launch, policies
from zoo.kernels.tile.launch import Bias


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output [B, N, H, Dv] in q's dtype and the natural-log LSE [B, N, H]."""
    return launch.forward(q, k, v, launch.dense(q, k), scale, _bias(bias))


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
    """Return the gradients of q, k, v and, with `bias_grad`, of the bias."""
    tiling, table = launch.dense(q, k), _bias(bias, bias_grad)
    *grads, rows = launch.backward(grad_out, grad_lse, q, k, v, out, lse, tiling, scale, table)
    if bias_grad:
        grads.append(launch.pair_gradient(grad_out, q, k, v, rows, bias, tiling, scale, table))
    return grads


def describe(q: Tensor, v: Tensor, biased: bool) -> str:
    """How a call would be computed, in words."""
    config = launch.config_of("forward", q, v, biased)
    return f"tiles of at most {config.queries} queries and {config.keys} keys, {config.warps} warps"


def _bias(bias: Tensor | None, wants_gradient: bool = False) -> Bias:
    """One of all pairs, which alone has a gradient, or one number for each key of an image."""
    if bias is None or wants_gradient or bias.shape[1:3] != (1, 1):
        return launch.table(bias)
    return Bias(policies.key_bias, (bias, bias.stride(0) if len(bias) > 1 else 0, bias.stride(3)))
