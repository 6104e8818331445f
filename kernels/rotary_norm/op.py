"""Norm and rotary positions: check the arguments, choose a backend, compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.kernels import dispatch, tile
from zoo.kernels.checks import beside, dtype_of_call, in_graph, without_autocast
from zoo.kernels.rotary_norm import cpu, reference, schema

OP = "rotary_norm"
WIDEST = 1024  # channels of a head that stay in registers


@dataclass(frozen=True)
class Call:
    """A checked call, its tokens in one axis: x [B, N, H, D], weight [D], angles [N, D / 2]; `dtype` is the
    result's."""

    x: Tensor
    weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    eps: float
    dtype: torch.dtype


def rotary_norm(
    x: Tensor,
    weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Norm every head of every token, then turn its pairs of channels by the angles of the token's place.

    This is what queries and keys go through before attention. With a weight a head is divided by the root of
    its mean square and multiplied by the weight; without, it is not normed. With cos and sin the channels
    (2 i, 2 i + 1) are turned as a point of the plane; without, nothing is. Axes are in the angles: a model
    gives some pairs to the row and others to the column.

    Shapes: x [B, *tokens, H, D] with any number of token axes; weight [D]; cos and sin [*tokens, D / 2], the
        same for all images and heads. Returns x's shape.
    Units: eps is added to the mean square.
    Numerics: all in at least float32 and rounded once; cos and sin in any dtype. Result in x's dtype, under
        autocast in autocast's: what follows are products.
    Raises: ValueError for arguments that do not fit each other; RuntimeError when a named backend cannot run
        the call.
    Source: Su et al. 2021 (arXiv:2104.09864) Eq. 34; norm: Dehghani et al. 2023 (arXiv:2302.05442), Sec. 2,
        with Zhang and Sennrich 2019 (arXiv:1910.07467).
    """
    call = _check(x, weight, cos, sin, eps)
    chosen, _ = dispatch.resolve(OP, backend, call)
    with without_autocast(x):
        out = chosen.run(call)
    return out.to(call.dtype).unflatten(1, x.shape[1:-2])


def explain(
    x: Tensor,
    weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> dispatch.Explanation:
    """Say which backend `rotary_norm` with these arguments would use, how, and why."""
    call = _check(x, weight, cos, sin, eps)
    chosen, reason = dispatch.resolve(OP, backend, call)
    return dispatch.Explanation(OP, chosen.name, chosen.configuration(call), reason)


def _check(x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float) -> Call:
    if x.ndim < 4 or 0 in x.shape[-2:]:
        raise ValueError(
            f"x must be [B, *tokens, H, D] with a head and a channel, found shape {tuple(x.shape)}"
        )
    if not isinstance(eps, int | float) or not eps >= 0:
        raise ValueError(f"eps must be a number that is not negative, found {eps!r}")
    width = x.shape[-1]
    if weight is not None and tuple(weight.shape) != (width,):
        raise ValueError(f"weight must be [{width}], found {tuple(weight.shape)}")
    dtype = dtype_of_call(x=x, weight=weight)
    if (cos is None) != (sin is None):
        raise ValueError(f"{'cos' if cos is None else 'sin'} must come with the other, found None")
    if cos is not None:
        if width % 2:
            raise ValueError(f"x must have pairs of channels for cos and sin, found {width} channels")
        wanted = (*x.shape[1:-2], width // 2)
        for name, angles in (("cos", cos), ("sin", sin)):
            beside(name, angles, "x", x)
            if tuple(angles.shape) != wanted:
                raise ValueError(f"{name} must be [*tokens, D / 2] = {wanted}, found {tuple(angles.shape)}")
        cos, sin = (angles.flatten(0, -2) for angles in (cos, sin))
    return Call(x.flatten(1, -3), weight, cos, sin, float(eps), dtype)


# Backends ---------------------------------------------------------------------------------------------------


def _cpu_why_not(call: Call) -> str | None:
    if call.x.device.type != "cpu":
        return f"the tensors are on {call.x.device}"
    if in_graph():
        return "compilers do not fuse complex numbers"
    return None


def _triton_why_not(call: Call) -> str | None:
    if call.x.shape[-1] > WIDEST:
        return f"heads of more than {WIDEST} channels, found {call.x.shape[-1]}"
    if any(angles is not None and angles.requires_grad for angles in (call.cos, call.sin)):
        return "cos and sin want gradients"
    return tile.why_not_here(call.x)


def _describe_triton(call: Call) -> str:
    from zoo.kernels.rotary_norm import triton

    config = triton.config(call.x)
    return f"tiles of {config.queries} heads, {config.warps} warps"


dispatch.OPERATIONS[OP] = (
    dispatch.Backend(
        "triton",
        run=lambda call: schema.forward(
            call.x, call.weight, call.cos, call.sin, call.eps, call.dtype, "triton"
        ),
        why_not=_triton_why_not,
        missing=tile.missing,
        configuration=_describe_triton,
    ),
    dispatch.Backend(
        "cpu",
        run=lambda call: cpu.rotary_norm(call.x, call.weight, call.cos, call.sin, call.eps),
        why_not=_cpu_why_not,
    ),
    dispatch.Backend(
        "reference",
        run=lambda call: reference.rotary_norm(call.x, call.weight, call.cos, call.sin, call.eps),
        why_not=lambda call: None,
    ),
)
