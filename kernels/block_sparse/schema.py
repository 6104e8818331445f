"""Block-sparse attention as one opaque operator: what torch.compile, export and autograd see of the backends.

A piece-by-piece loop and a Triton launch alike are hidden behind it. The backend was chosen by the caller and
goes along as a name, so that the backward pass and recomputation take the same.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.block_sparse.cpu import Lists


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
    return _implementation(backend).forward(q, k, v, bias, lists, scale)


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=dtype)


@torch.library.custom_op("zoo::block_sparse_attention_backward", mutates_args=())
def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
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
    bias_grad: bool,
) -> list[Tensor]:
    """Return the gradients of q, k, v and, with `bias_grad`, of the bias."""
    lists = Lists(offsets, indices, query_size, key_size, query_segments, key_segments)
    more = () if backend == "cpu" else (inverse_offsets, inverse_indices)
    *grads, dbias = _implementation(backend).backward(
        grad_out, grad_lse, q, k, v, bias, out, lse, lists, scale, bias_grad, *more
    )
    return grads if dbias is None else [*grads, dbias]


@backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    wanted = (q, k, v, bias) if rest[-1] else (q, k, v)
    return [x.new_empty(x.shape) for x in wanted]


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, query_size, key_size, scale, backend = inputs
    ctx.save_for_backward(*tensors[:4], *output, *tensors[4:])
    ctx.rest = (query_size, key_size, scale, backend)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    bias_grad = ctx.needs_input_grad[3]
    if grad_out is None:
        grad_out = torch.zeros_like(ctx.saved_tensors[4])
    grads = backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.rest, bias_grad)
    dbias = grads[3] if bias_grad else None
    return (*grads[:3], dbias, *(None,) * 10)


forward.register_autograd(_backward, setup_context=_setup_context)


def _implementation(backend: str) -> Any:
    # Triton is imported by the first call that runs it, never with the package.
    return import_module(f"zoo.kernels.block_sparse.{backend}")
