"""The gated residual: check the arguments, choose a backend, compute."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from zoo.kernels import dispatch, tile
from zoo.kernels.checks import dtype_of_call, per_image, without_autocast
from zoo.kernels.gated_residual import cpu, reference, schema

OP = "gated_residual"


@dataclass(frozen=True)
class Call:
    """A checked call, its tokens in one axis: x and y [B, N, C], gate [B, C]."""

    x: Tensor
    y: Tensor
    gate: Tensor


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, *, backend: str = "auto") -> Tensor:
    """Add to every token what a layer made of it, as far as its image's condition opens the gate: x + gate y.

    Shapes: x and y [B, *tokens, C] with any number of token axes; gate [B, C], also with axes of one token
        between, as models have them. Returns x's shape.
    Numerics: in at least float32 and rounded once. Result in x's dtype, under autocast too: what is added up
        over the depth of a model keeps its precision.
    Raises: ValueError for arguments that do not fit each other; RuntimeError when a named backend cannot run
        the call.
    Source: Peebles and Xie 2023 (arXiv:2212.09748) Sec. 3.2 (adaLN-Zero).
    """
    call = _check(x, y, gate)
    chosen, _ = dispatch.resolve(OP, backend, call)
    with without_autocast(x):
        out = chosen.run(call)
    return out.to(x.dtype).view(x.shape)


def explain(x: Tensor, y: Tensor, gate: Tensor, *, backend: str = "auto") -> dispatch.Explanation:
    """Say which backend `gated_residual` with these arguments would use, how, and why."""
    call = _check(x, y, gate)
    chosen, reason = dispatch.resolve(OP, backend, call)
    return dispatch.Explanation(OP, chosen.name, chosen.configuration(call), reason)


def _check(x: Tensor, y: Tensor, gate: Tensor) -> Call:
    if x.ndim < 3 or x.shape[-1] == 0:
        raise ValueError(f"x must be [B, *tokens, C] with a channel, found shape {tuple(x.shape)}")
    if y.shape != x.shape:
        raise ValueError(f"y must have x's shape {tuple(x.shape)}, found {tuple(y.shape)}")
    gate = per_image("gate", gate, x)
    dtype_of_call(x=x, y=y, gate=gate)
    return Call(x.flatten(1, -2), y.flatten(1, -2), gate)


# Backends ---------------------------------------------------------------------------------------------------


def _cpu_why_not(call: Call) -> str | None:
    return None if call.x.device.type == "cpu" else f"the tensors are on {call.x.device}"


def _describe_triton(call: Call) -> str:
    from zoo.kernels.gated_residual import triton

    config = triton.config(call.x)
    return f"tiles of {config.queries} tokens and {config.keys} channels, {config.warps} warps"


dispatch.OPERATIONS[OP] = (
    dispatch.Backend(
        "triton",
        run=lambda call: schema.forward(call.x, call.y, call.gate, "triton"),
        why_not=lambda call: tile.why_not_here(call.x),
        missing=tile.missing,
        configuration=_describe_triton,
    ),
    dispatch.Backend(
        "cpu",
        run=lambda call: cpu.gated_residual(call.x, call.y, call.gate),
        why_not=_cpu_why_not,
    ),
    dispatch.Backend(
        "reference",
        run=lambda call: reference.gated_residual(call.x, call.y, call.gate),
        why_not=lambda call: None,
    ),
)
