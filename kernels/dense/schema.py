"""Attention of all to all with a bias as one opaque operator; agent attention calls it twice.

The backend was chosen by the caller and goes along as a name, so that the backward pass and recomputation
take the same.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("zoo::biased_attention", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Return the output [B, N, H, Dv] in q's dtype and the natural-log LSE [B, N, H].

    The bias is [B or 1, H or 1, N, M], or [B or 1, 1, 1, M] without a gradient.
    """
    return _implementation(backend).forward(q, k, v, bias, scale)


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=dtype)


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
    return _implementation(backend).backward(grad_out, grad_lse, q, k, v, bias, out, lse, scale, bias_grad)


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
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.rest = inputs[4:]


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    saved, bias_grad = ctx.saved_tensors, ctx.needs_input_grad[3]
    if grad_out is None:
        grad_out = torch.zeros_like(saved[4])
    grads = backward(grad_out, grad_lse, *saved, *ctx.rest, bias_grad)
    return (*grads[:3], grads[3] if bias_grad else None, None, None)


forward.register_autograd(_backward, setup_context=_setup_context)


def _implementation(backend: str) -> Any:
    # Triton is imported by the first call that runs it, never with the package.
    return import_module(f"zoo.kernels.dense.{backend}")
