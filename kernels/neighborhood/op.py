"""Neighborhood attention: check the arguments, choose a backend, compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, TypeVar

import torch
from torch import Tensor

from zoo.kernels import dispatch, peers, tile
from zoo.kernels.checks import beside, on_one_grid, same_kind, scale_or_default, without_autocast
from zoo.kernels.neighborhood import cpu, reference, schema
from zoo.kernels.neighborhood.geometry import Axis, keys_of

OP = "neighborhood_attention"

T = TypeVar("T", int, bool)
PerAxis = T | Sequence[T]


@dataclass(frozen=True)
class Call:
    """A checked call: consistent tensors, one `Axis` for every axis of the token grid."""

    q: Tensor
    k: Tensor
    v: Tensor
    axes: tuple[Axis, ...]
    scale: float
    rpb: Tensor | None
    extra_k: Tensor | None
    extra_v: Tensor | None
    return_lse: bool


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: PerAxis[int],
    *,
    dilation: PerAxis[int] = 1,
    stride: PerAxis[int] = 1,
    is_causal: PerAxis[bool] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every token to the `kernel_size` tokens nearest to it along each axis.

    At a border the window shifts inward and keeps its size. A causal axis sees only tokens up to the query.
    With a stride s, groups of s queries share one window; s = kernel_size is window attention. Even kernels
    reach one token further to the left.

    Shapes: q [B, *grid, Hq, D], k [B, *grid, Hkv, D], v [B, *grid, Hkv, Dv] with one to three grid axes;
        query head h reads key head h // (Hq // Hkv). rpb [Hq, 2 * kernel_size - 1 per axis], added to the
        logits unscaled at (key - query) / dilation + kernel_size - 1. extra_k [B, n, Hkv, D] and extra_v
        [B, n, Hkv, Dv] are seen by every query in the same softmax. Returns [B, *grid, Hq, Dv] and, with
        `return_lse`, the natural-log LSE [B, *grid, Hq].
    Units: kernel_size, dilation and stride in tokens, one number or one per axis; scale multiplies q.k and is
        D**-0.5 by default.
    Numerics: logits and softmax in at least float32, result in q's dtype.
    Raises: ValueError for arguments that do not fit each other or the grid (kernel_size * dilation must not
        exceed its length); RuntimeError when a named backend cannot run the call.
    Source: Hassani et al. 2023 (arXiv:2204.07143) Sec. 3; dilation arXiv:2209.15001; stride arXiv:2504.16922.
    """
    call = _check(
        q, k, v, kernel_size, dilation=dilation, stride=stride, is_causal=is_causal, scale=scale, rpb=rpb,
        extra_k=extra_k, extra_v=extra_v, return_lse=return_lse,
    )  # fmt: skip
    chosen, _ = dispatch.resolve(OP, backend, call)
    with without_autocast(q):
        out, lse = chosen.run(call)
    out = out.to(call.q.dtype)
    return (out, lse) if return_lse else out


def neighborhood_indices(
    size: Sequence[int],
    kernel_size: PerAxis[int],
    *,
    dilation: PerAxis[int] = 1,
    stride: PerAxis[int] = 1,
    is_causal: PerAxis[bool] = False,
) -> Tensor:
    """Return which tokens every query of a grid sees, as flat indices.

    Shapes: int64 [N, slots], N = prod(size), slots = prod(kernel_size); -1 where a causal window is shorter.
    Raises: ValueError for a window that does not fit the grid.
    """
    if not isinstance(size, Sequence):
        raise ValueError(f"size must have one length for each grid axis, found {size!r}")
    index, visible = keys_of(_axes(tuple(size), kernel_size, dilation, stride, is_causal))
    return index.masked_fill(~visible, -1)


def explain(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: PerAxis[int], *, backend: str = "auto", **options: Any
) -> dispatch.Explanation:
    """Say which backend `neighborhood_attention` with these arguments would use, how, and why."""
    call = _check(q, k, v, kernel_size, **options)
    chosen, reason = dispatch.resolve(OP, backend, call)
    return dispatch.Explanation(OP, chosen.name, chosen.configuration(call), reason)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: PerAxis[int],
    *,
    dilation: PerAxis[int] = 1,
    stride: PerAxis[int] = 1,
    is_causal: PerAxis[bool] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    return_lse: bool = False,
) -> Call:
    on_one_grid(q, k, v)
    grid, heads, width, kv_heads = q.shape[1:-2], q.shape[-2], q.shape[-1], k.shape[-2]
    axes = _axes(tuple(grid), kernel_size, dilation, stride, is_causal)

    if (extra_k is None) != (extra_v is None):
        raise ValueError("extra_k and extra_v must be given together")
    if extra_k is not None:
        wanted = (q.shape[0], extra_k.shape[1] if extra_k.ndim == 4 else "n", kv_heads)
        for name, extra, last in (("extra_k", extra_k, width), ("extra_v", extra_v, v.shape[-1])):
            if tuple(extra.shape) != (*wanted, last):
                raise ValueError(
                    f"{name} must be [B, n, Hkv, D] = {[*wanted, last]}, found {tuple(extra.shape)}"
                )
    if rpb is not None:
        table = (heads, *(2 * axis.kernel_size - 1 for axis in axes))
        if tuple(rpb.shape) != table:
            raise ValueError(
                f"rpb must be [Hq, 2 * kernel_size - 1 per axis] = {table}, found {tuple(rpb.shape)}"
            )

        beside("rpb", rpb, "q", q)
    scale = scale_or_default(scale, width)
    q, k, v, extra_k, extra_v = same_kind(q=q, k=k, v=v, extra_k=extra_k, extra_v=extra_v)
    return Call(q, k, v, axes, scale, rpb, extra_k, extra_v, return_lse)


def _axes(
    size: Sequence[int],
    kernel_size: PerAxis[int],
    dilation: PerAxis[int],
    stride: PerAxis[int],
    is_causal: PerAxis[bool],
) -> tuple[Axis, ...]:
    size = tuple(index(length) for length in size)
    given = {"kernel_size": kernel_size, "dilation": dilation, "stride": stride, "is_causal": is_causal}
    axes = tuple(map(Axis, size, *(_per_axis(name, value, len(size)) for name, value in given.items())))
    for number, axis in enumerate(axes):
        where = f"on axis {number} of the grid {size}"
        if axis.kernel_size < 2:
            raise ValueError(f"kernel_size must be at least 2, found {axis.kernel_size} {where}")
        if axis.dilation < 1:
            raise ValueError(f"dilation must be at least 1, found {axis.dilation} {where}")
        if not 1 <= axis.stride <= axis.kernel_size:
            raise ValueError(
                f"stride must be between 1 and kernel_size = {axis.kernel_size}, found {axis.stride} {where}"
            )
        if axis.kernel_size * axis.dilation > axis.length:
            raise ValueError(
                f"kernel_size * dilation = {axis.kernel_size} * {axis.dilation} must not exceed the length "
                f"{axis.length} {where}; use a smaller window or pad the grid"
            )
    return axes


def _per_axis(name: str, value: PerAxis[T], rank: int) -> tuple[T, ...]:
    """One value for every axis."""
    value = value.tolist() if hasattr(value, "tolist") else value
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(values) != rank:
        raise ValueError(
            f"{name} must have one value or one for each of the {rank} grid axes, found {value!r}"
        )
    flags = name == "is_causal"
    if any(isinstance(each, bool) != flags or not (flags or hasattr(each, "__index__")) for each in values):
        wanted = "True or False" if flags else "a whole number"
        raise ValueError(f"{name} must be {wanted}, or one for each axis, found {value!r}")
    return values if flags else tuple(map(index, values))


# Backends ---------------------------------------------------------------------------------------------------


def _arguments(call: Call) -> tuple:
    return call.q, call.k, call.v, call.axes, call.scale, call.rpb, call.extra_k, call.extra_v


def _cpu_why_not(call: Call) -> str | None:
    return dispatch.why_not_fused() if call.q.device.type == "cpu" else f"the tensors are on {call.q.device}"


def _run_triton(call: Call) -> tuple[Tensor, Tensor]:
    grid = call.q.shape[1:-2]
    q, k, v = (x.flatten(1, -3) for x in (call.q, call.k, call.v))
    axes = schema.numbers_of(call.axes)
    out, lse = schema.forward(q, k, v, call.rpb, call.extra_k, call.extra_v, axes, call.scale, "triton")
    return out.unflatten(1, grid), lse.unflatten(1, grid)


def _describe_triton(call: Call) -> str:
    from zoo.kernels.neighborhood import triton

    return triton.describe(call.axes, call.q, call.v, call.rpb is not None)


def _natten_missing() -> str | None:
    from zoo.kernels.neighborhood import peers

    return peers.natten_missing()


def _natten_why_not(call: Call) -> str | None:
    from zoo.kernels.neighborhood.peers import natten_why_not

    q, k, v, extra_k, extra_v = call.q, call.k, call.v, call.extra_k, call.extra_v
    leaves = [x for x in (q, k, v, extra_k, extra_v) if x is not None]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
    if call.rpb is not None:
        return "a bias, which natten has not"
    if q.dtype == torch.float64:
        return "float64 tensors"
    if 0 in q.shape or 0 in v.shape:
        return f"a tensor without entries, found {tuple(q.shape)}"
    if call.scale == 0:
        return "a scale of 0, which natten takes for its default"
    if call.return_lse and learns:
        return "an LSE with a gradient"
    if q.device.type == "cpu" and learns:
        return "natten has no backward pass on a CPU"
    return natten_why_not(q, k, v)


def _run_natten(call: Call) -> tuple[Tensor, Tensor]:
    from zoo.kernels.neighborhood import peers

    return peers.natten(call.q, call.k, call.v, call.axes, call.scale, call.extra_k, call.extra_v)


def _flex_why_not(call: Call) -> str | None:
    if call.rpb is not None:
        return "a bias"
    if call.extra_k is not None:
        return "extra keys"
    return peers.flex_why_not([call.q, call.k, call.v], call.q.shape[-1])


def _run_flex(call: Call) -> tuple[Tensor, Tensor]:
    from zoo.kernels.neighborhood import peers

    return peers.flex(call.q, call.k, call.v, call.axes, call.scale)


dispatch.OPERATIONS[OP] = (
    dispatch.Backend(
        "triton",
        run=_run_triton,
        why_not=lambda call: tile.why_not(call.q, call.v),
        missing=tile.missing,
        configuration=_describe_triton,
    ),
    dispatch.Backend(
        "cpu",
        run=lambda call: cpu.neighborhood_attention(*_arguments(call), return_lse=call.return_lse),
        why_not=_cpu_why_not,
        configuration=lambda call: cpu.describe(
            call.q, call.k, call.v, call.axes, call.rpb, call.extra_k, call.return_lse
        ),
    ),
    dispatch.Backend("flex", run=_run_flex, why_not=_flex_why_not, only_by_name=True),
    dispatch.Backend(
        "natten", run=_run_natten, why_not=_natten_why_not, missing=_natten_missing, only_by_name=True
    ),
    dispatch.Backend(
        "reference",
        run=lambda call: reference.neighborhood_attention(*_arguments(call)),
        why_not=lambda call: None,
    ),
)
