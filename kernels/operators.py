"""What opaque operators share: the backend by its name, empty results for tracing, and the way back.

An operator is what torch.compile, export and autograd see of the backends of an op. The backend was chosen by
the caller and goes along as a name, so that the backward pass and recomputation take the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.checks import without_autocast

Tensors = Sequence[Tensor | None]


def implementation(op: str, backend: str) -> Any:
    """Return the module of a backend; Triton is imported by the first call that runs it, never before."""
    return import_module(f"zoo.kernels.{op}.{backend}")


def empty(*tensors: Tensor | None) -> list[Tensor]:
    """Return contiguous tensors as gradients are, one for each that is given."""
    return [x.new_empty(x.shape) for x in tensors if x is not None]


def as_they_are(tensors: Tensors, flags: Sequence[bool]) -> Sequence[bool]:
    """Each flag stands for one tensor after q, k and v."""
    return flags


def register_attention(
    forward: Any,
    backward: Any,
    tensors: int,
    flags: Callable[[Tensors, Sequence[bool]], Sequence[bool]] = lambda tensors, needs: (),
    given: Callable[[Tensors, Sequence[bool]], Sequence[bool]] = as_they_are,
) -> None:
    """Register the results for tracing and the gradient of an operator that returns the output and its LSE.

    `forward` takes q, k, v [..., H, D] and further tensors, `tensors` in all, then plain values. `backward`
    takes the gradients of output and LSE, the tensors, output, LSE, the values and flags; it returns the
    gradients of q, k, v and of some of the others in a list. `flags` says what it is to compute, from the
    tensors and which inputs want a gradient; `given` says which of the others come back, from the tensors
    and the flags.
    """

    def empty_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(q.dtype, torch.float32)
        return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=dtype)

    def empty_backward(grad_out: Tensor, grad_lse: Tensor | None, *rest: Any) -> list[Tensor]:
        q, k, v, *more = rest[:tensors]
        back = given(rest[:tensors], rest[len(rest) - number_of_flags :])
        return empty(q, k, v, *(x for x, there in zip(more, back, strict=False) if there))

    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:tensors], *output)
        ctx.values = inputs[tensors:]

    def gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        if grad_out is None:
            grad_out = torch.zeros_like(saved[tensors])
        wanted = flags(saved, needs)
        with without_autocast(grad_out):  # dtypes are those of the forward pass, wherever backward is called
            found = iter(backward(grad_out, grad_lse, *saved, *ctx.values, *wanted))
        back = (True, True, True, *given(saved, wanted))
        return (*(next(found) if there else None for there in back), *[None] * (len(needs) - len(back)))

    number_of_flags = len(flags([None] * tensors, [False] * tensors))
    forward.register_fake(empty_forward)
    backward.register_fake(empty_backward)
    forward.register_autograd(gradients, setup_context=setup_context)


def bias_wanted(tensors: Tensors, needs: Sequence[bool]) -> Sequence[bool]:
    """The bias follows q, k and v."""
    return (needs[3],)
