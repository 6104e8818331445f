"""Channel attention as one opaque operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.kernels.operators import empty, implementation


@torch.library.custom_op("zoo::channel_attention", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """Return the output [B, N, H, D] in q's dtype and the weights [B, H, D, E]."""
    return implementation("channel", backend).forward(q, k, v, scale)


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    weights = (q.shape[0], q.shape[2], q.shape[3], k.shape[3])
    return q.new_empty(q.shape), q.new_empty(weights, dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("zoo::channel_attention_backward", mutates_args=())
def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    return implementation("channel", backend).backward(grad_out, q, k, v, weights, scale)


@backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(empty(q, k, v))


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.rest = inputs[3:]


def _backward(ctx: Any, grad_out: Tensor, grad_weights: Tensor | None) -> tuple[Tensor | None, ...]:
    # The weights are kept for this pass; nobody outside sees them.
    return (*backward(grad_out, *ctx.saved_tensors, *ctx.rest), None, None)


forward.register_autograd(_backward, setup_context=_setup_context)
