"""Deformable sampling and attention as opaque operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.kernels.operators import empty, implementation, register_attention


@torch.library.custom_op("zoo::deformable_sample", mutates_args=())
def sample(x: Tensor, positions: Tensor, backend: str) -> Tensor:
    """Return the samples [B, N, C] in x's dtype."""
    return implementation("deformable", backend).sample(x, positions)


@sample.register_fake
def _(x: Tensor, positions: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], positions.shape[2], x.shape[3])


@torch.library.custom_op("zoo::deformable_sample_backward", mutates_args=())
def sample_backward(grad: Tensor, x: Tensor, positions: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and positions."""
    return implementation("deformable", backend).sample_backward(grad, x, positions)


@sample_backward.register_fake
def _(grad: Tensor, x: Tensor, positions: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return tuple(empty(x, positions))


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
    return implementation("deformable", backend).forward(q, k, v, positions, table, bias, corners, scale)


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
    return implementation("deformable", backend).backward(
        grad_out, grad_lse, q, k, v, positions, table, bias, out, lse, corners, scale, table_grad, bias_grad
    )


register_attention(
    forward,
    backward,
    tensors=6,
    flags=lambda tensors, needs: (tensors[4] is not None and any(needs[3:5]), needs[5]),
    given=lambda tensors, flags: (flags[0], *flags),
)
