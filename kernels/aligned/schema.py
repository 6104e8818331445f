"""Aligned attention as one opaque operator: what torch.compile, export and autograd see of it.

The backend was chosen by the caller and goes along as a name, so that the backward pass and recomputation
take the same.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("zoo::aligned_attention", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, radius: list[int], scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Return the output [B, *grid, Hq, Dv] in q's dtype and the natural-log LSE [B, *grid, Hq]."""
    return _implementation(backend).forward(q, k, v, tuple(radius), scale)


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=dtype)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    return _implementation(backend).backward(grad_out, grad_lse, q, k, v, out, lse, tuple(radius), scale)


@backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.rest = inputs[3:]


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(saved[3])
    return (*backward(grad_out, grad_lse, *saved, *ctx.rest), None, None, None)


forward.register_autograd(_backward, setup_context=_setup_context)


def _implementation(backend: str) -> Any:
    # Triton is imported by the first call that runs it, never with the package.
    return import_module(f"zoo.kernels.aligned.{backend}")
