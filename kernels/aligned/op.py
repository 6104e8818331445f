"""Aligned attention: check the arguments, choose a backend, compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

from torch import Tensor

from zoo.kernels import dispatch, tile
from zoo.kernels.aligned import cpu, reference, schema
from zoo.kernels.checks import on_one_grid, same_kind, scale_or_default, without_autocast

OP = "aligned_attention"


@dataclass(frozen=True)
class Call:
    """A checked call: consistent tensors, one radius for every axis of the grid."""

    q: Tensor
    k: Tensor
    v: Tensor
    radius: tuple[int, ...]
    scale: float


def aligned_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    radius: int | Sequence[int] = 0,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every place of one grid to the same place of another and those up to `radius` away.

    At a border the window is clipped: it neither shifts nor wraps. With radius 0 a query sees one key, so
    that the output is v and q shows in the LSE alone; merged with attention to other keys by their LSEs
    (`merge_attentions`), it is one softmax over all.

    Shapes: q [B, *grid, Hq, D], k [B, *grid, Hkv, D], v [B, *grid, Hkv, Dv] with one to three grid axes;
        query head h reads key head h // (Hq // Hkv). Returns [B, *grid, Hq, Dv] and, with `return_lse`, the
        natural-log LSE [B, *grid, Hq], differentiable too.
    Units: radius in tokens, one number or one per axis; scale multiplies q.k and is D**-0.5 by default.
    Numerics: logits and softmax in at least float32, result in q's dtype.
    Raises: ValueError for arguments that do not fit each other; RuntimeError when a named backend cannot run
        the call.
    Source: position-aligned attention, arXiv:2602.06850, Eq. 2.
    """
    call = _check(q, k, v, radius, scale=scale, return_lse=return_lse)
    chosen, _ = dispatch.resolve(OP, backend, call)
    with without_autocast(q):
        out, lse = chosen.run(call)
    out = out.to(call.q.dtype)
    return (out, lse) if return_lse else out


def explain(
    q: Tensor, k: Tensor, v: Tensor, radius: int | Sequence[int] = 0, *, backend: str = "auto", **options: Any
) -> dispatch.Explanation:
    """Say which backend `aligned_attention` with these arguments would use, how, and why."""
    call = _check(q, k, v, radius, **options)
    chosen, reason = dispatch.resolve(OP, backend, call)
    return dispatch.Explanation(OP, chosen.name, chosen.configuration(call), reason)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    radius: int | Sequence[int],
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Call:
    on_one_grid(q, k, v)
    if v.shape[-1] == 0:
        raise ValueError(f"v must have channels, found shape {tuple(v.shape)}")
    axes = q.ndim - 3
    reach = tuple(radius) if isinstance(radius, Sequence) else (radius,) * axes
    if len(reach) != axes or any(
        isinstance(n, bool) or not hasattr(n, "__index__") or index(n) < 0 for n in reach
    ):
        raise ValueError(
            f"radius must be a whole number >= 0, or one for each of {axes} axes, found {radius!r}"
        )
    # A key further away than the grid is long does not exist.
    reach = tuple(min(index(n), max(length - 1, 0)) for n, length in zip(reach, q.shape[1:-2], strict=True))

    scale = scale_or_default(scale, q.shape[-1])
    return Call(*same_kind(q=q, k=k, v=v), reach, scale)


# Backends ---------------------------------------------------------------------------------------------------


def _arguments(call: Call) -> tuple:
    return call.q, call.k, call.v, call.radius, call.scale


def _cpu_why_not(call: Call) -> str | None:
    if call.q.device.type != "cpu":
        return f"the tensors are on {call.q.device}"
    if 0 in call.q.shape[1:-2]:
        return "a grid without tokens"
    # It writes into tensors of its own, which vmap does not see through.
    return dispatch.why_not_opaque()


def _triton_why_not(call: Call) -> str | None:
    if 0 in call.q.shape[1:-2]:
        return "a grid without tokens"
    return tile.why_not(call.q, call.v)


def _run_triton(call: Call) -> tuple[Tensor, Tensor]:
    return schema.forward(call.q, call.k, call.v, list(call.radius), call.scale, "triton")


def _describe_triton(call: Call) -> str:
    from zoo.kernels.aligned import triton

    return triton.describe(call.q, call.v, call.radius)


dispatch.OPERATIONS[OP] = (
    dispatch.Backend(
        "triton",
        run=_run_triton,
        why_not=_triton_why_not,
        missing=tile.missing,
        configuration=_describe_triton,
    ),
    dispatch.Backend(
        "cpu",
        run=lambda call: cpu.aligned_attention(*_arguments(call)),
        why_not=_cpu_why_not,
        configuration=lambda call: f"shifts within {call.radius}",
    ),
    dispatch.Backend(
        "reference",
        run=lambda call: reference.aligned_attention(*_arguments(call)),
        why_not=lambda call: None,
    ),
)
