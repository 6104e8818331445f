"""Block-sparse attention as one opaque operator: a loop over pieces or a Triton launch."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.block_sparse.cpu import Lists
from zoo.kernels.operators import bias_wanted, implementation, register_attention


@torch.library.custom_op("zoo::block_sparse_attention", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    indices: Tensor,
    inverse_offsets: Tensor,
    inverse_indices: Tensor,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    query_size: int,
    key_size: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the output [B, N, Hq, Dv] in q's dtype and the natural-log LSE [B, N, Hq]."""
    lists = Lists(offsets, indices, query_size, key_size, query_segments, key_segments)
    return implementation("block_sparse", backend).forward(q, k, v, bias, lists, scale)


@torch.library.custom_op("zoo::block_sparse_attention_backward", mutates_args=())
def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    indices: Tensor,
    inverse_offsets: Tensor,
    inverse_indices: Tensor,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query_size: int,
    key_size: int,
    scale: float,
    backend: str,
    bias_grad: bool,
) -> list[Tensor]:
    """Return the gradients of q, k, v and, with `bias_grad`, of the bias."""
    lists = Lists(offsets, indices, query_size, key_size, query_segments, key_segments)
    more = () if backend == "cpu" else (inverse_offsets, inverse_indices)
    *grads, dbias = implementation("block_sparse", backend).backward(
        grad_out, grad_lse, q, k, v, bias, out, lse, lists, scale, bias_grad, *more
    )
    return grads if dbias is None else [*grads, dbias]


register_attention(forward, backward, 10, bias_wanted)
