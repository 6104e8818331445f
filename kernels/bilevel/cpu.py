"""Bi-level routing attention on a CPU: a few regions at a time with the keys they have chosen.

Whole regions are long rows to copy, so the chosen keys of some regions are put side by side and go through
one fused attention call. Forward and backward walk the same regions and keep inputs, output and LSE only:
however many regions are chosen, memory is linear in tokens. On a small map one dense call with a mask is
faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.kernels.bilevel.regions import region_of, to_map, to_regions
from zoo.kernels.checks import all_finite, is_traced, widened

# Measured on one core with AVX-512, 32 channels per head; `scripts/bench/ops_cpu.py` shows what they lead to.
COPIED_TOKEN = 32  # cost of copying one key and its value, in query-key products
DENSE_PRODUCTS = 1 << 16  # where a mask of this many entries for each image still costs nothing
BYTES_AT_ONCE = 1 << 19  # of chosen keys; with values, queries and results they stay in a core's own cache

# SDPA's own kernel, named because it gives the LSE and takes its backward pass apart from autograd.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def bilevel_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    regions: tuple[int, int],
    scale: float,
    route_weights: Tensor | None,
    *,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the output [B, Y, X, Hq, Dv] and, where asked for, the natural-log LSE [B, Y, X, Hq].

    Both are in at least float32, as is everything on the way.
    """
    width, shared = v.shape[-1], q.shape[3] // k.shape[3]
    q, k, v, route_weights = widened(q, k, v, route_weights)
    wide = max(width, q.shape[-1])  # the fused call wants keys and values of one width
    q, k, v = (F.pad(x, (0, wide - x.shape[-1])) if x.shape[-1] < wide else x for x in (q, k, v))
    if shared > 1:
        k, v = (x.repeat_interleave(shared, 3) for x in (k, v))
    if _is_dense(q, k, routes, route_weights, return_lse):
        out = _dense(q, k, v, routes, regions, scale)
        # A mask multiplies unseen values by zero, which NaN and infinity survive; gathering never sees them.
        if all_finite(out):
            return out[..., :width], None
    out, lse = _gathered(q, k, v, routes, regions, scale, route_weights, return_lse)
    return out[..., :width], lse


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    regions: tuple[int, int],
    route_weights: Tensor | None,
    return_lse: bool,
) -> str:
    """How a call would be computed, in words."""
    if _is_dense(q, k, routes, route_weights, return_lse):
        return "one dense attention with a mask"
    if route_weights is not None:
        rows, columns = regions
    else:
        rows, columns = _at_once(k, routes, regions, q.shape[3] * max(q.shape[4], v.shape[4]))
    return f"{rows * columns} regions at once with {_chosen_keys(k, routes)} keys each"


def _is_dense(q: Tensor, k: Tensor, routes: Tensor, route_weights: Tensor | None, return_lse: bool) -> bool:
    """Whether every query against every key is possible and less work than gathering."""
    if return_lse or route_weights is not None:
        return False
    queries, keys, chosen = q.shape[1] * q.shape[2], k.shape[1] * k.shape[2], _chosen_keys(k, routes)
    gathering = chosen * (queries + COPIED_TOKEN * routes.shape[1])
    return queries * keys <= min(DENSE_PRODUCTS, gathering)


def _chosen_keys(k: Tensor, routes: Tensor) -> int:
    """How many keys a query sees."""
    return routes.shape[2] * k.shape[1] * k.shape[2] // routes.shape[1]


def _at_once(k: Tensor, routes: Tensor, regions: tuple[int, int], channels: int) -> tuple[int, int]:
    """How many regions are taken together: rows of regions, or of one row so many columns."""
    rows, columns = len(routes) * regions[0], regions[1]
    some = max(1, BYTES_AT_ONCE // (_chosen_keys(k, routes) * channels * k.element_size()))
    return max(1, min(rows, some // columns)), min(columns, some)


def _dense(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: tuple[int, int], scale: float) -> Tensor:
    """Every query against every key, those of regions not chosen behind a mask."""
    parts, grid = routes.shape[1], q.shape[1:3]
    # How often a region was chosen, as a bias: log 0 hides it, and one chosen twice counts twice.
    chosen = q.new_zeros(routes.shape[0], parts, parts)
    bias = chosen.scatter_add(2, routes, chosen.new_ones(()).expand(routes.shape)).log()
    own = region_of(regions, grid, q.device)
    keys = own if k.shape[1:3] == grid else region_of(regions, k.shape[1:3], q.device)
    bias = bias.index_select(1, own).index_select(2, keys)
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None], scale=scale)
    return out.transpose(1, 2).unflatten(1, grid)


def _gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    regions: tuple[int, int],
    scale: float,
    route_weights: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Every region against the regions it has chosen, and no others."""
    if route_weights is None and not is_traced():
        return _Regions.apply(q, k, v, routes, regions, scale)
    (batch, parts, _), grid = routes.shape, q.shape[1:3]
    q, k, v = (to_regions(x, regions).flatten(0, 1) for x in (q, k, v))  # [B * p, tokens, H, D]
    rows = (routes + parts * torch.arange(batch, device=q.device)[:, None, None]).flatten(0, 1)
    weights = None if route_weights is None else route_weights.to(q.dtype).flatten(0, 1)
    out, lse = _all_at_once(q, k, v, rows, weights, scale, return_lse)
    out = to_map(out.unflatten(0, (batch, parts)), regions, grid)
    return out, to_map(lse.unflatten(0, (batch, parts)), regions, grid) if return_lse else None


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Regions [p, tokens, H, D] side by side as `rows` [P, topk] lists them: [P, topk, tokens, H, D]."""
    return x.flatten(1).index_select(0, rows.flatten()).unflatten(1, x.shape[1:]).unflatten(0, rows.shape)


def _heads_first(x: Tensor) -> Tensor:
    """[P, ..., tokens, H, D] to [P, H, all tokens, D]."""
    return x.flatten(1, -3).transpose(1, 2)


def _all_at_once(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, weights: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """What `_Regions` does, in operations that a tracer and autograd understand; copies `topk` times k, v."""
    k, v = _take(k, rows), _take(v, rows)
    if weights is not None:
        k, v = (x * weights[..., None, None, None] for x in (k, v))
    q, k, v = (_heads_first(x) for x in (q, k, v))
    if not return_lse:
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2), None
    logits = scale * (q @ k.transpose(-1, -2))
    return (logits.softmax(dim=-1) @ v).transpose(1, 2), logits.logsumexp(dim=-1).transpose(1, 2)


class _Regions(torch.autograd.Function):
    """What `_all_at_once` does, on maps, some regions at a time: output, and LSE [B, Y, X, H]."""

    @staticmethod
    def forward(ctx, q, k, v, routes, regions, scale):  # noqa: ANN001, ANN205
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:-1])
        queries, *results = (_bands(x, regions) for x in (q, out, lse))
        for part, _, *keys in _parts(k, v, routes, regions):
            some = (queries[part].flatten(0, 1), *keys)
            for whole, done in zip(results, _flash(*map(_heads_first, some), scale=scale), strict=True):
                whole = whole[part]
                whole.copy_(done.transpose(1, 2).reshape(whole.shape))
        ctx.save_for_backward(q, k, v, routes, out, lse)
        ctx.regions, ctx.scale = regions, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):  # noqa: ANN001, ANN205
        q, k, v, routes, out, lse = ctx.saved_tensors
        width, regions = q.shape[-1], ctx.regions
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        if grad_lse is not None:
            # The kernel subtracts the row sums of grad_out * out from the logits' gradient; grad_lse must be
            # added to it. One more channel does: nothing in q, k and v, 1 in grad_out, -grad_lse in out.
            q, k, v = (F.pad(x, (0, 1)) for x in (q, k, v))
            grad_out = F.pad(grad_out, (0, 1), value=1.0)
            out = torch.cat([out, -grad_lse[..., None]], dim=-1)
        grad_q = q.new_empty(q.shape)
        # Sums over all regions that chose a region.
        grad_k, grad_v = (x.new_zeros(x.shape) for x in (k, v))
        sides = [_bands(x, regions) for x in (grad_out, q, out, lse[..., None], grad_q)]
        for part, strips, *keys in _parts(k, v, routes, regions):
            *queries, whole = (x[part] for x in sides)
            d_out, some_q, some_out, some_lse = (_heads_first(x.flatten(0, 1)) for x in queries)
            some = (d_out, some_q, *map(_heads_first, keys), some_out, some_lse[..., 0])
            grads = _flash_backward(*some, 0.0, False, scale=ctx.scale)
            whole.copy_(grads[0].transpose(1, 2).reshape(whole.shape))
            for whole, grad in zip((grad_k, grad_v), grads[1:], strict=True):
                whole = _strips(whole, regions)
                grad = grad.transpose(1, 2).reshape(-1, *whole.shape[1:])
                whole.index_add_(0, strips, grad)
        return *(x[..., :width] for x in (grad_q, grad_k, grad_v)), None, None, None


def _bands(x: Tensor, regions: tuple[int, int]) -> Tensor:
    """A map [B, Y, X, ...] as rows of regions, [B * rows, columns, height, width, ...].

    A view where `x` is contiguous, otherwise maybe a copy; the last axis has stride 1, as the fused call,
    named without its own checks, takes for granted.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, columns = regions
    x = x.unflatten(2, (columns, x.shape[2] // columns)).unflatten(1, (rows, x.shape[1] // rows))
    return x.flatten(0, 1).transpose(1, 2)


def _strips(x: Tensor, regions: tuple[int, int]) -> Tensor:
    """A map [B, Y, X, H, D] cut at the regions' borders, [B * Y * columns, width of a region, H, D]."""
    return x.unflatten(2, (regions[1], x.shape[2] // regions[1])).flatten(0, 2)


def _parts(
    k: Tensor, v: Tensor, routes: Tensor, regions: tuple[int, int]
) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor, Tensor]]:
    """Regions that are taken together, a part of `_bands`, the strips they see, and their keys and values.

    These are [regions, topk * height, width, H, D] and lie where those of the part before lay.
    """
    (rows, columns), height = regions, k.shape[1] // regions[0]
    images = torch.arange(len(routes), device=k.device)[:, None, None]
    first = ((images * rows + routes // columns) * height) * columns + routes % columns
    strips = first[..., None] + columns * torch.arange(height, device=k.device)  # [B, p, topk, height]
    strips = strips.unflatten(1, regions).flatten(0, 1).flatten(2)  # [B * rows, columns, topk * height]
    down, right = _at_once(k, routes, regions, k.shape[3:].numel())
    wholes = [_strips(x, regions) for x in (k, v)]
    rooms = [x.new_empty(down * right * strips.shape[2], *x.shape[1:]) for x in wholes]
    for row, column in product(range(0, len(strips), down), range(0, columns, right)):
        part = slice(row, row + down), slice(column, column + right)
        seen = strips[part].flatten()
        taken = (
            torch.index_select(whole, 0, seen, out=room[: len(seen)]).unflatten(0, (-1, strips.shape[2]))
            for whole, room in zip(wholes, rooms, strict=True)
        )
        yield part, seen, *taken
