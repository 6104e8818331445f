"""Deformable sampling and attention as opaque operators: what torch.compile, export and autograd see.

The backend was chosen by the caller and goes along as a name, so that the backward pass and recomputation
take the same.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("zoo::deformable_sample", mutates_args=())
def sample(x: Tensor, positions: Tensor, backend: str) -> Tensor:
    """Return the samples [B, N, C] in x's dtype."""
    return _implementation(backend).sample(x, positions)


@sample.register_fake
def _(x: Tensor, positions: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], positions.shape[2], x.shape[3])


@torch.library.custom_op("zoo::deformable_sample_backward", mutates_args=())
def sample_backward(grad: Tensor, x: Tensor, positions: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and positions."""
    return _implementation(backend).sample_backward(grad, x, positions)


@sample_backward.register_fake
def _(grad: Tensor, x: Tensor, positions: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), positions.new_empty(positions.shape)


def _setup_sample(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.backend = inputs[2]


def _sample_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*sample_backward(grad, *ctx.saved_tensors, ctx.backend), None)


sample.register_autograd(_sample_backward, setup_context=_setup_sample)


@torch.library.custom_op("zoo::deformable_attention", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    corners: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the output [B, Y, X, H, Dv] in q's dtype and the natural-log LSE [B, Y, X, H]."""
    return _implementation(backend).forward(q, k, v, positions, table, bias, corners, scale)


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:4], v.shape[-1]), q.new_empty(q.shape[:4], dtype=dtype)


@torch.library.custom_op("zoo::deformable_attention_backward", mutates_args=())
def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    corners: bool,
    scale: float,
    backend: str,
    table_grad: bool,
    bias_grad: bool,
) -> list[Tensor]:
    """Return the gradients of q, k, v, with `table_grad` of positions and table, with `bias_grad` of bias."""
    return _implementation(backend).backward(
        grad_out, grad_lse, q, k, v, positions, table, bias, out, lse, corners, scale, table_grad, bias_grad
    )


@backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    table_grad, bias_grad = rest[-2:]
    wanted = [q, k, v, *([positions, table] if table_grad else []), *([bias] if bias_grad else [])]
    return [x.new_empty(x.shape) for x in wanted]


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.rest = inputs[6:]


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    table_grad = saved[4] is not None and any(ctx.needs_input_grad[3:5])
    bias_grad = ctx.needs_input_grad[5]
    if grad_out is None:
        grad_out = torch.zeros_like(saved[6])
    grads = iter(backward(grad_out, grad_lse, *saved, *ctx.rest, table_grad, bias_grad))
    given = (True, True, True, table_grad, table_grad, bias_grad)
    return (*(next(grads) if there else None for there in given), None, None, None)


forward.register_autograd(_backward, setup_context=_setup_context)


def _implementation(backend: str) -> Any:
    # Triton is imported by the first call that runs it, never with the package.
    return import_module(f"zoo.kernels.deformable.{backend}")
