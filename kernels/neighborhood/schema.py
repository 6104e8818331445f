"""Neighborhood attention as one opaque operator, on flat tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.kernels.neighborhood.geometry import Axis
from zoo.kernels.operators import bias_wanted, implementation, register_attention


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
    return implementation("neighborhood", backend).forward(
        q, k, v, rpb, extra_k, extra_v, axes_of(axes), scale
    )


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
    return implementation("neighborhood", backend).backward(
        grad_out, grad_lse, q, k, v, rpb, extra_k, extra_v, out, lse, axes_of(axes), scale, rpb_grad
    )


register_attention(
    forward,
    backward,
    tensors=6,
    flags=bias_wanted,
    given=lambda tensors, flags: (*flags, tensors[4] is not None, tensors[5] is not None),
)
