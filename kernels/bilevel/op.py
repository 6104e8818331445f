"""Bi-level routing: check the arguments, choose a backend, compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from torch import Tensor

from zoo.kernels import dispatch, tile
from zoo.kernels.bilevel import cpu, reference, schema
from zoo.kernels.bilevel.regions import to_regions
from zoo.kernels.checks import floating, same_kind, scale_or_default, shows_values, without_autocast

OP = "bilevel_routing_attention"


@dataclass(frozen=True)
class Call:
    """A checked call: consistent tensors, one number of regions for each axis."""

    q: Tensor
    k: Tensor
    v: Tensor
    routes: Tensor
    regions: tuple[int, int]
    scale: float
    route_weights: Tensor | None
    return_lse: bool


def bilevel_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    regions: int | tuple[int, int],
    *,
    scale: float | None = None,
    route_weights: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every token to all tokens of the regions that its own region was routed to.

    Shapes: q [B, Y, X, Hq, D], cut into `regions` equal rectangles counted row by row, p in all; k
        [B, Yk, Xk, Hkv, D] and v [B, Yk, Xk, Hkv, Dv] are cut into as many and may be coarser than q. Query
        head h reads key head h // (Hq // Hkv). routes [B, p, topk], whole numbers from 0 to p - 1, which is
        checked on a CPU only, since a GPU would be waited for; a region listed twice counts twice.
        route_weights [B, p, topk] multiplies the keys and the values of a routed region. Returns
        [B, Y, X, Hq, Dv] and, with `return_lse`, the natural-log LSE [B, Y, X, Hq].
    Units: regions per axis, one number or (rows, columns), which divide it; scale multiplies q.k and is
        D**-0.5 by default. (The published models scale by the width of all heads together.)
    Numerics: logits and softmax in at least float32, result in q's dtype. Cost: p * topk region pairs; memory
        linear in tokens.
    Raises: ValueError for arguments that do not fit each other; RuntimeError when a named backend cannot run
        the call.
    Source: Zhu et al. 2023 (arXiv:2303.08810) Sec. 3.2, Eq. 5-6.
    """
    call = _check(q, k, v, routes, regions, scale=scale, route_weights=route_weights, return_lse=return_lse)
    chosen, _ = dispatch.resolve(OP, backend, call)
    with without_autocast(q):
        out, lse = chosen.run(call)
    out = out.to(call.q.dtype)
    return (out, lse) if return_lse else out


def route(
    q: Tensor,
    k: Tensor,
    regions: int | tuple[int, int],
    topk: int,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose for every region the `topk` regions whose mean key is nearest to its mean query.

    The choice is hard: where two affinities nearly tie, another precision, device or compiler may choose the
    other region, and the attention changes by more than rounding. Compare results under the same `routes`.

    Shapes: q [B, Y, X, Hq, D] and k [B, Yk, Xk, Hkv, D], cut into `regions` equal rectangles, p in all; a map
        of `region_means`, one token for each region, is taken as it is. Heads count together: all see the
        same regions. Returns routes, int64 [B, p, topk], the best first, and their affinities [B, p, topk] in
        at least float32.
    Units: scale multiplies the affinities and is (Hq * D)**-0.5 by default.
    Gradients: affinities carry them, routes cannot; the published models detach q and k first.
    Raises: ValueError for arguments that do not fit each other.
    Source: Zhu et al. 2023 (arXiv:2303.08810) Sec. 3.2, Eq. 3-4.
    """
    _check_maps(q, k)
    sizes = _regions(q, k, regions)
    parts, topk = sizes[0] * sizes[1], _whole("topk", topk)
    if not 1 <= topk <= parts:
        raise ValueError(f"topk must be between 1 and the {parts} regions, found {topk}")
    width = q.shape[3] * q.shape[4]
    scale = scale_or_default(scale, width)
    q, k = same_kind(q=q, k=k)
    with without_autocast(q):
        q, k = (region_means(x, sizes).flatten(1, 2) for x in (q, k))  # [B, p, H, D]
        k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        affinity = scale * q.flatten(2) @ k.flatten(2).transpose(1, 2)
        scores, routes = affinity.topk(topk, dim=-1)
    return routes, scores


def region_means(
    x: Tensor, regions: int | tuple[int, int], *, image: tuple[int, int] | None = None
) -> Tensor:
    """Average a token map over its regions.

    Shapes: x [B, Y, X, H, D]; `image` (rows, columns) leaves the padding beyond it out. Returns
        [B, rows of regions, columns of regions, H, D] in at least float32.
    Raises: ValueError where the regions do not divide the map, and for a tensor that is no such map.
    """
    if x.ndim != 5:
        raise ValueError(f"x must be [B, Y, X, H, D], found shape {tuple(x.shape)}")
    floating("x", x)
    if image is not None and (not isinstance(image, Sequence) or len(image) != 2):
        raise ValueError(f"image must be (rows, columns), found {image!r}")
    rows, columns = _regions(x, x, regions)
    means = to_regions(x, (rows, columns)).sum(dim=2, dtype=torch.promote_types(x.dtype, torch.float32))
    means = means.unflatten(1, (rows, columns))
    for axis, parts in ((1, rows), (2, columns)):
        length = x.shape[axis]
        inside = length if image is None else index(image[axis - 1])
        if not 1 <= inside <= length:
            raise ValueError(f"image must lie inside the map {tuple(x.shape[1:3])}, found {image}")
        counts = (inside - length // parts * torch.arange(parts, device=x.device)).clamp(1, length // parts)
        means = means / counts.view(-1, *[1] * (4 - axis))
    return means


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    regions: int | tuple[int, int],
    *,
    backend: str = "auto",
    **options: Any,
) -> dispatch.Explanation:
    """Say which backend `bilevel_routing_attention` with these arguments would use, how, and why."""
    call = _check(q, k, v, routes, regions, **options)
    chosen, reason = dispatch.resolve(OP, backend, call)
    return dispatch.Explanation(OP, chosen.name, chosen.configuration(call), reason)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    regions: int | tuple[int, int],
    *,
    scale: float | None = None,
    route_weights: Tensor | None = None,
    return_lse: bool = False,
) -> Call:
    _check_maps(q, k)
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"v must have k's batch, map and heads {tuple(k.shape[:-1])}, found {tuple(v.shape)}"
        )
    sizes = _regions(q, k, regions)
    parts = sizes[0] * sizes[1]
    if routes.ndim != 3 or routes.shape[:2] != (q.shape[0], parts) or routes.shape[2] == 0:
        raise ValueError(
            f"routes must be [B, p, topk] with batch {q.shape[0]}, {parts} regions and topk of at least 1, "
            f"found {tuple(routes.shape)}"
        )
    if routes.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"routes must be int64 or int32, found {routes.dtype}")
    if route_weights is not None and route_weights.shape != routes.shape:
        raise ValueError(
            f"route_weights must be one for each of routes {tuple(routes.shape)}, "
            f"found {tuple(route_weights.shape)}"
        )
    if (
        routes.device.type == "cpu"
        and routes.numel()
        and shows_values(routes)
        and not 0 <= int(routes.min()) <= int(routes.max()) < parts
    ):
        raise ValueError(
            f"routes must be between 0 and {parts - 1}, found {int(routes.min())} to {int(routes.max())}"
        )

    for name, x in (("routes", routes), ("route_weights", route_weights)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, found {x.device}")
    if route_weights is not None:
        floating("route_weights", route_weights)
    scale = scale_or_default(scale, q.shape[-1])
    q, k, v = same_kind(q=q, k=k, v=v)
    return Call(q, k, v, routes.long(), sizes, scale, route_weights, return_lse)


def _check_maps(q: Tensor, k: Tensor) -> None:
    if q.ndim != 5 or 0 in q.shape[1:]:
        raise ValueError(
            f"q must be [B, Y, X, H, D] with at least one token, head and channel, found {tuple(q.shape)}"
        )
    if k.ndim != 5 or k.shape[0] != q.shape[0] or k.shape[-1] != q.shape[-1] or 0 in k.shape[1:]:
        raise ValueError(
            f"k must be [B, Y, X, H, D] with q's batch {q.shape[0]} and width {q.shape[-1]} and at least one "
            f"token and head, found shape {tuple(k.shape)}"
        )
    if q.shape[3] % k.shape[3]:
        raise ValueError(f"q's {q.shape[3]} heads must be a multiple of k's {k.shape[3]} heads")


def _regions(q: Tensor, k: Tensor, regions: int | tuple[int, int]) -> tuple[int, int]:
    """Regions along both axes, which divide both maps."""
    pair = (regions, regions) if hasattr(regions, "__index__") else regions
    if not isinstance(pair, Sequence) or len(pair) != 2:
        raise ValueError(f"regions must be one number or (rows, columns), found {regions!r}")
    rows, columns = (_whole("regions", number) for number in pair)
    for name, (height, width) in (("q", q.shape[1:3]), ("k", k.shape[1:3])):
        if rows < 1 or columns < 1 or height % rows or width % columns:
            raise ValueError(
                f"regions {rows} x {columns} must divide {name}'s map of {height} x {width} tokens; pad the "
                "map or take other regions"
            )
    return rows, columns


def _whole(name: str, value: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be a whole number, found {value!r}")
    return index(value)


# Backends ---------------------------------------------------------------------------------------------------


def _arguments(call: Call) -> tuple:
    return call.q, call.k, call.v, call.routes, call.regions, call.scale, call.route_weights


def _cpu_why_not(call: Call) -> str | None:
    return dispatch.why_not_fused() if call.q.device.type == "cpu" else f"the tensors are on {call.q.device}"


def _triton_why_not(call: Call) -> str | None:
    if call.route_weights is not None:
        return "route_weights"
    return tile.why_not(call.q, call.v)


def _run_triton(call: Call) -> tuple[Tensor, Tensor]:
    return schema.forward(call.q, call.k, call.v, call.routes, list(call.regions), call.scale, "triton")


def _describe_triton(call: Call) -> str:
    from zoo.kernels.bilevel import triton

    return triton.describe(call.q, call.k, call.v, call.routes, call.regions)


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
        run=lambda call: cpu.bilevel_routing_attention(*_arguments(call), return_lse=call.return_lse),
        why_not=_cpu_why_not,
        configuration=lambda call: cpu.describe(
            call.q, call.k, call.v, call.routes, call.regions, call.route_weights, call.return_lse
        ),
    ),
    dispatch.Backend(
        "reference",
        run=lambda call: reference.bilevel_routing_attention(*_arguments(call)),
        why_not=lambda call: None,
    ),
)
