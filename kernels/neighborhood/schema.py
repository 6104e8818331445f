"""Neighborhood attention as one opaque operator: what torch.compile, export and autograd see of a backend.

Tokens are flat here. The backend was chosen by the caller and goes along as a name, so that the backward pass
and recomputation take the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.neighborhood.geometry import Axis


def numbers_of(axes: tuple[Axis, ...]) -> list[int]:
    """The axes as a list of numbers, five each."""
    return [int(number) for axis in axes for number in axis]


def axes_of(numbers: Sequence[int]) -> tuple[Axis, ...]:
    """The axes of a list of numbers."""
    return tuple(Axis(*numbers[i : i + 4], is_causal=bool(numbers[i + 4])) for i in range(0, len(numbers), 5))


@torch.library.custom_op("zoo::neighborhood_attention", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    axes: list[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the output [B, N, Hq, Dv] in q's dtype and the natural-log LSE [B, N, Hq]."""
    return _implementation(backend).forward(q, k, v, rpb, extra_k, extra_v, axes_of(axes), scale)


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=dtype)


@torch.library.custom_op("zoo::neighborhood_attention_backward", mutates_args=())
def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    axes: list[int],
    scale: float,
    backend: str,
    rpb_grad: bool,
) -> list[Tensor]:
    """Return the gradients of q, k, v, with `rpb_grad` of rpb, and of the extra keys and values if any."""
    return _implementation(backend).backward(
        grad_out, grad_lse, q, k, v, rpb, extra_k, extra_v, out, lse, axes_of(axes), scale, rpb_grad
    )


@backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    wanted = (q, k, v, rpb if rest[-1] else None, extra_k, extra_v)
    return [x.new_empty(x.shape) for x in wanted if x is not None]


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.rest = inputs[6:]


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    saved, rpb_grad = ctx.saved_tensors, ctx.needs_input_grad[3]
    if grad_out is None:
        grad_out = torch.zeros_like(saved[6])
    grads = iter(backward(grad_out, grad_lse, *saved, *ctx.rest, rpb_grad))
    given = (True, True, True, rpb_grad, saved[4] is not None, saved[5] is not None)
    return (*(next(grads) if there else None for there in given), None, None, None)


forward.register_autograd(_backward, setup_context=_setup_context)


def _implementation(backend: str) -> Any:
    # Triton is imported by the first call that runs it, never with the package.
    return import_module(f"zoo.kernels.neighborhood.{backend}")
