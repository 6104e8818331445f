"""The modulated norm as one opaque operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.kernels.operators import empty, implementation


@torch.library.custom_op("zoo::modulated_norm", mutates_args=())
def forward(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, centered: bool, dtype: torch.dtype, backend: str
) -> Tensor:
    """Return the output [B, N, C] in `dtype`."""
    return implementation("modulated_norm", backend).forward(x, scale, shift, eps, centered, dtype)


@forward.register_fake
def _(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, centered: bool, dtype: torch.dtype, backend: str
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("zoo::modulated_norm_backward", mutates_args=())
def backward(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, eps: float, centered: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, scale and shift."""
    return implementation("modulated_norm", backend).backward(grad, x, scale, shift, eps, centered)


@backward.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(empty(x, scale, shift))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.eps, ctx.centered, _, ctx.backend = inputs[3:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = backward(grad, *ctx.saved_tensors, ctx.eps, ctx.centered, ctx.backend)
    return (*grads, None, None, None, None)


forward.register_autograd(_backward, setup_context=_setup_context)
