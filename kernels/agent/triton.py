"""Agent attention in Triton: the tile template over all pairs of tiles, with a bias for each pair of tokens.

Each of the two softmaxes is one call. Gradients of a bias that images or heads share are summed in registers.
"""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.tile import launch


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output [B, N, H, Dv] in q's dtype and the natural-log LSE [B, N, H]."""
    return launch.forward(q, k, v, launch.dense(q, k), scale, launch.table(bias))


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
    tiling, table = launch.dense(q, k), launch.table(bias)
    *grads, rows = launch.backward(grad_out, grad_lse, q, k, v, out, lse, tiling, scale, table)
    if bias_grad:
        grads.append(launch.pair_gradient(grad_out, q, k, v, rows, bias, tiling, scale, table))
    return grads


def describe(q: Tensor, v: Tensor, biased: bool) -> str:
    """How a call would be computed, in words."""
    config = launch.config_of("forward", q, v, biased)
    return f"twice in tiles of at most {config.queries} queries and {config.keys} keys, {config.warps} warps"
