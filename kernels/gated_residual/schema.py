"""The gated residual as one opaque operator: what torch.compile, export and autograd see of a backend.

The backend was chosen by the caller and goes along as a name, so that the backward pass and recomputation
take the same.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("zoo::gated_residual", mutates_args=())
def forward(x: Tensor, y: Tensor, gate: Tensor, backend: str) -> Tensor:
    """Return the output [B, N, C] in x's dtype."""
    return _implementation(backend).forward(x, y, gate)


@forward.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("zoo::gated_residual_backward", mutates_args=())
def backward(grad: Tensor, y: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of y and gate; that of x is the result's own."""
    return _implementation(backend).backward(grad, y, gate)


@backward.register_fake
def _(grad: Tensor, y: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])
    ctx.backend = inputs[3]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (grad, *backward(grad, *ctx.saved_tensors, ctx.backend), None)


forward.register_autograd(_backward, setup_context=_setup_context)


def _implementation(backend: str) -> Any:
    # Triton is imported by the first call that runs it, never with the package.
    return import_module(f"zoo.kernels.gated_residual.{backend}")
