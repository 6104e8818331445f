"""The gated residual as one opaque operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.kernels.operators import empty, implementation


@torch.library.custom_op("zoo::gated_residual", mutates_args=())
def forward(x: Tensor, y: Tensor, gate: Tensor, backend: str) -> Tensor:
    """Return the output [B, N, C] in x's dtype."""
    return implementation("gated_residual", backend).forward(x, y, gate)


@forward.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("zoo::gated_residual_backward", mutates_args=())
def backward(grad: Tensor, y: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of y and gate; that of x is the result's own."""
    return implementation("gated_residual", backend).backward(grad, y, gate)


@backward.register_fake
def _(grad: Tensor, y: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return tuple(empty(y, gate))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])
    ctx.backend = inputs[3]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (grad, *backward(grad, *ctx.saved_tensors, ctx.backend), None)


forward.register_autograd(_backward, setup_context=_setup_context)
