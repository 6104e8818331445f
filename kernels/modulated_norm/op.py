"""The modulated norm: check the arguments, choose a backend, compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.kernels import dispatch, tile
from zoo.kernels.checks import dtype_of_call, per_image, without_autocast
from zoo.kernels.modulated_norm import cpu, reference, schema

OP = "modulated_norm"
WIDEST = 8192  # channels of a token that stay in registers
NORMS = ("layer", "rms")


@dataclass(frozen=True)
class Call:
    """A checked call, its tokens in one axis: x [B, N, C], scale and shift [B, C]; `dtype` is the
    result's."""

    x: Tensor
    scale: Tensor
    shift: Tensor
    eps: float
    norm: str
    dtype: torch.dtype


def modulated_norm(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, norm: str = "layer", backend: str = "auto"
) -> Tensor:
    """Norm every token over its channels, then scale and shift it as its image's condition says (adaLN).

    The result is norm(x) (1 + scale) + shift: `norm` "layer" subtracts the mean of a token and divides by the
    deviation, "rms" divides by the root of the mean square. Neither has parameters of its own.

    Shapes: x [B, *tokens, C] with any number of token axes; scale and shift [B, C], also with axes of one
        token between, as models have them. Returns x's shape.
    Units: eps is added to the variance, or the mean square.
    Numerics: all in at least float32 and rounded once. Result in x's dtype, under autocast in autocast's:
        what follows is a projection.
    Raises: ValueError for arguments that do not fit each other; RuntimeError when a named backend cannot run
        the call.
    Source: Peebles and Xie 2023 (arXiv:2212.09748) Sec. 3.2; RMS: Zhang and Sennrich 2019 (arXiv:1910.07467).
    """
    call = _check(x, scale, shift, eps, norm)
    chosen, _ = dispatch.resolve(OP, backend, call)
    with without_autocast(x):
        out = chosen.run(call)
    return out.to(call.dtype).view(x.shape)


def explain(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, norm: str = "layer", backend: str = "auto"
) -> dispatch.Explanation:
    """Say which backend `modulated_norm` with these arguments would use, how, and why."""
    call = _check(x, scale, shift, eps, norm)
    chosen, reason = dispatch.resolve(OP, backend, call)
    return dispatch.Explanation(OP, chosen.name, chosen.configuration(call), reason)


def _check(x: Tensor, scale: Tensor, shift: Tensor, eps: float, norm: str) -> Call:
    if x.ndim < 3 or x.shape[-1] == 0:
        raise ValueError(f"x must be [B, *tokens, C] with a channel, found shape {tuple(x.shape)}")
    if norm not in NORMS:
        raise ValueError(f"norm must be {' or '.join(NORMS)}, found {norm!r}")
    if not isinstance(eps, int | float) or not eps >= 0:
        raise ValueError(f"eps must be a number that is not negative, found {eps!r}")
    scale, shift = per_image("scale", scale, x), per_image("shift", shift, x)
    dtype = dtype_of_call(x=x, scale=scale, shift=shift)
    return Call(x.flatten(1, -2), scale, shift, float(eps), norm, dtype)


# Backends ---------------------------------------------------------------------------------------------------


def _cpu_why_not(call: Call) -> str | None:
    if call.x.device.type != "cpu":
        return f"the tensors are on {call.x.device}"
    if call.norm == "rms":
        return "PyTorch has no RMS norm of one pass on a CPU"
    return None


def _triton_why_not(call: Call) -> str | None:
    if call.x.shape[-1] > WIDEST:
        return f"tokens of more than {WIDEST} channels, found {call.x.shape[-1]}"
    return tile.why_not_here(call.x)


def _describe_triton(call: Call) -> str:
    from zoo.kernels.modulated_norm import triton

    config = triton.config(call.x)
    return f"tiles of {config.queries} tokens, {config.warps} warps"


dispatch.OPERATIONS[OP] = (
    dispatch.Backend(
        "triton",
        run=lambda call: schema.forward(
            call.x, call.scale, call.shift, call.eps, call.norm == "layer", call.dtype, "triton"
        ),
        why_not=_triton_why_not,
        missing=tile.missing,
        configuration=_describe_triton,
    ),
    dispatch.Backend(
        "cpu",
        run=lambda call: cpu.modulated_norm(call.x, call.scale, call.shift, call.eps),
        why_not=_cpu_why_not,
    ),
    dispatch.Backend(
        "reference",
        run=lambda call: reference.modulated_norm(
            call.x, call.scale, call.shift, call.eps, call.norm == "layer"
        ),
        why_not=lambda call: None,
    ),
)
