"""The modulated norm as one opaque operator: what torch.compile, export and autograd see of a backend.

The backend was chosen by the caller and goes along as a name, so that the backward pass and recomputation
take the same.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("zoo::modulated_norm", mutates_args=())
def forward(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, centered: bool, dtype: torch.dtype, backend: str
) -> Tensor:
    """Return the output [B, N, C] in `dtype`."""
    return _implementation(backend).forward(x, scale, shift, eps, centered, dtype)


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
    return _implementation(backend).backward(grad, x, scale, shift, eps, centered)


@backward.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), shift.new_empty(shift.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.eps, ctx.centered, _, ctx.backend = inputs[3:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = backward(grad, *ctx.saved_tensors, ctx.eps, ctx.centered, ctx.backend)
    return (*grads, None, None, None, None)


forward.register_autograd(_backward, setup_context=_setup_context)


def _implementation(backend: str) -> Any:
    # Triton is imported by the first call that runs it, never with the package.
    return import_module(f"zoo.kernels.modulated_norm.{backend}")
