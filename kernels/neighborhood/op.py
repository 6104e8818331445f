"""Neighborhood attention: check the arguments, choose a backend, compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from operator import index
from typing import TypeVar

import torch
from torch import Tensor

from zoo.errors import did_you_mean
from zoo.kernels import dispatch
from zoo.kernels.neighborhood import cpu, reference
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
    call = _check(q, k, v, kernel_size, dilation, stride, is_causal, scale, rpb, extra_k, extra_v, return_lse)
    chosen, _ = dispatch.resolve(OP, backend, call)
    # The call's dtypes are settled; autocast must not change them inside.
    with torch.autocast(q.device.type, enabled=False) if _autocasts(q) else nullcontext():
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
    index, visible = keys_of(_axes(tuple(size), kernel_size, dilation, stride, is_causal))
    return index.masked_fill(~visible, -1)


def explain(*args: object, backend: str = "auto", **kwargs: object) -> dispatch.Explanation:
    """Say which backend `neighborhood_attention` with these arguments would use, and why."""
    call = _check(*_bind(*args, **kwargs))
    chosen, reason = dispatch.resolve(OP, backend, call)
    return dispatch.Explanation(OP, chosen.name, chosen.configuration(call), reason)


# natten's functions of the same names -----------------------------------------------------------------------

_NATTEN_BACKENDS = {"cutlass-fna", "hopper-fna", "blackwell-fna", "flex-fna", "reference-fna"}
_NATTEN_TUNING = {
    "attention_kwargs",
    "q_tile_shape",
    "kv_tile_shape",
    "backward_q_tile_shape",
    "backward_kv_tile_shape",
    "backward_kv_splits",
    "backward_use_pt_reduction",
    "run_persistent_kernel",
    "kernel_schedule",
    "torch_compile",
}


def _natten(rank: int) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    def function(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: PerAxis[int],
        stride: PerAxis[int] = 1,
        dilation: PerAxis[int] = 1,
        is_causal: PerAxis[bool] | None = False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        *,
        backend: str | None = None,
        return_lse: bool = False,
        **tuning: object,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if query.ndim != rank + 3:
            raise ValueError(f"na{rank}d wants query [B, {rank} grid axes, H, D], found {tuple(query.shape)}")
        if unknown := sorted(set(tuning) - _NATTEN_TUNING):
            near = did_you_mean(unknown[0], _NATTEN_TUNING)
            raise TypeError(f"na{rank}d got an unexpected keyword argument {unknown[0]!r}{near}")
        return neighborhood_attention(
            query,
            key,
            value,
            kernel_size,
            dilation=dilation,
            stride=stride,
            is_causal=is_causal or False,
            scale=scale or None,
            extra_k=additional_keys,
            extra_v=additional_values,
            return_lse=return_lse,
            backend="auto" if backend is None or backend in _NATTEN_BACKENDS else backend,
        )

    function.__name__ = function.__qualname__ = f"na{rank}d"
    function.__doc__ = f"""Attend in {rank}-D neighborhoods; the signature is that of natten's na{rank}d.

    Shapes: query, key, value [B, {rank} grid axes, H, D]; additional_keys and additional_values [B, n, H, D].
    natten's own backend names mean `auto`; arguments that only tune its kernels (tile shapes, splits,
    schedules, torch_compile, attention_kwargs) are accepted and change nothing.
    Raises: as `neighborhood_attention`.
    """
    return function


na1d, na2d, na3d = _natten(1), _natten(2), _natten(3)


# The contract -----------------------------------------------------------------------------------------------


def _bind(
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
) -> tuple:
    return q, k, v, kernel_size, dilation, stride, is_causal, scale, rpb, extra_k, extra_v, return_lse


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: PerAxis[int],
    dilation: PerAxis[int],
    stride: PerAxis[int],
    is_causal: PerAxis[bool],
    scale: float | None,
    rpb: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    return_lse: bool,
) -> Call:
    if not 4 <= q.ndim <= 6:
        raise ValueError(f"q must be [B, one to three grid axes, H, D], found shape {tuple(q.shape)}")
    grid, heads, width = q.shape[1:-2], q.shape[-2], q.shape[-1]
    if k.ndim != q.ndim or k.shape[:-2] != q.shape[:-2] or k.shape[-1] != width:
        raise ValueError(f"k must have q's batch, grid and width {tuple(q.shape)}, found {tuple(k.shape)}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"v must have k's batch, grid and heads {tuple(k.shape[:-1])}, found {tuple(v.shape)}"
        )
    kv_heads = k.shape[-2]
    if heads == 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"q's {heads} heads must be a multiple of k's {kv_heads} heads, and neither may be 0"
        )
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

    tensors = {"q": q, "k": k, "v": v, "extra_k": extra_k, "extra_v": extra_v}
    if _autocasts(q) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        tensors = {name: None if x is None else x.to(dtype) for name, x in tensors.items()}
    for name, x in tensors.items():
        if x is None:
            continue
        if x.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{name} must be float64, float32, float16 or bfloat16, found {x.dtype}")
        if x.dtype != tensors["q"].dtype or x.device != q.device:
            raise ValueError(
                f"{name} must have q's dtype and device {tensors['q'].dtype} on {q.device}, "
                f"found {x.dtype} on {x.device}"
            )
    if rpb is not None and (rpb.device != q.device or not rpb.is_floating_point()):
        raise ValueError(
            f"rpb must be floating point on q's device {q.device}, found {rpb.dtype} on {rpb.device}"
        )
    return Call(
        **tensors,
        axes=axes,
        scale=width**-0.5 if scale is None else float(scale),
        rpb=rpb,
        return_lse=return_lse,
    )


def _autocasts(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _axes(
    size: tuple[int, ...],
    kernel_size: PerAxis[int],
    dilation: PerAxis[int],
    stride: PerAxis[int],
    is_causal: PerAxis[bool],
) -> tuple[Axis, ...]:
    given = {"kernel_size": kernel_size, "dilation": dilation, "stride": stride, "is_causal": is_causal}
    per_axis = {name: _spread(name, value, len(size)) for name, value in given.items()}
    axes = []
    for number, length in enumerate(size):
        axis = Axis(
            index(length), *(per_axis[name][number] for name in ("kernel_size", "dilation", "stride"))
        )
        where = f"on axis {number} of the grid {tuple(size)}"
        if axis.kernel_size < 2:
            raise ValueError(f"kernel_size must be at least 2, found {axis.kernel_size} {where}")
        if axis.dilation < 1:
            raise ValueError(f"dilation must be at least 1, found {axis.dilation} {where}")
        if not 1 <= axis.stride <= axis.kernel_size:
            raise ValueError(
                f"stride must be between 1 and kernel_size = {axis.kernel_size}, found {axis.stride} {where}"
            )
        if axis.kernel_size * axis.dilation > length:
            raise ValueError(
                f"kernel_size * dilation = {axis.kernel_size} * {axis.dilation} must not exceed the length "
                f"{length} {where}; use a smaller window or pad the grid"
            )
        axes.append(axis._replace(is_causal=per_axis["is_causal"][number]))
    return tuple(axes)


def _spread(name: str, value: PerAxis[T], rank: int) -> tuple[T, ...]:
    """One value for every axis; numbers must be whole, flags must be flags."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    kind, wanted = (bool, "True or False") if name == "is_causal" else (int, "a whole number")
    if len(values) != rank:
        raise ValueError(
            f"{name} must have one value or one for each of the {rank} grid axes, found {value!r}"
        )
    for each in values:
        if not isinstance(each, kind) or (kind is int and isinstance(each, bool)):
            raise ValueError(f"{name} must be {wanted} (one, or one for each axis), found {value!r}")
    return values


# Backends ---------------------------------------------------------------------------------------------------


def _arguments(call: Call) -> tuple:
    return call.q, call.k, call.v, call.axes, call.scale, call.rpb, call.extra_k, call.extra_v


def _cpu_why_not(call: Call) -> str | None:
    return None if call.q.device.type == "cpu" else f"the tensors are on {call.q.device}"


dispatch.OPERATIONS[OP] = (
    dispatch.Backend(
        "cpu",
        run=lambda call: cpu.neighborhood_attention(*_arguments(call), return_lse=call.return_lse),
        why_not=_cpu_why_not,
        configuration=lambda call: cpu.describe(call.axes),
    ),
    dispatch.Backend(
        "reference",
        run=lambda call: reference.neighborhood_attention(*_arguments(call)),
        why_not=lambda call: None,
    ),
)
