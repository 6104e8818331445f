"""Norm and rotary positions as one opaque operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.kernels.operators import empty, implementation


@torch.library.custom_op("zoo::rotary_norm", mutates_args=())
def forward(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Return the output [B, N, H, D] in `dtype`."""
    return implementation("rotary_norm", backend).forward(x, weight, cos, sin, eps, dtype)


@forward.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("zoo::rotary_norm_backward", mutates_args=())
def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    backend: str,
) -> list[Tensor]:
    """Return the gradient of x and, where there is a weight, its gradient."""
    return implementation("rotary_norm", backend).backward(grad, x, weight, cos, sin, eps)


@backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor | None, *rest: Any) -> list[Tensor]:
    return empty(x, weight)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.eps, _, ctx.backend = inputs[4:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx, *dweight = backward(grad, *ctx.saved_tensors, ctx.eps, ctx.backend)
    return dx, dweight[0] if dweight else None, None, None, None, None, None


forward.register_autograd(_backward, setup_context=_setup_context)
