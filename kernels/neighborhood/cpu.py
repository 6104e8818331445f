"""Neighborhood attention on a CPU: tiles of queries with the halo of keys they see, in one attention call.

Neighbouring queries share most of their keys, so a tile of 8 x 8 queries reads one halo of 14 x 14 keys
instead of 64 windows of 49. Inside the halo a mask keeps each query's own window. Dilation groups become
tiles of their own. A small map is one tile, which is dense attention with a mask. Without gradients two
rows of queries and the rows of keys they see are often less work: they lie in order and are not copied.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import all_finite, in_graph, learns, shows_values, widened
from zoo.kernels.neighborhood.geometry import Axis, as_tensors, keys_of, outer

# Measured on one core with AVX-512, 32 channels per head; `scripts/bench/ops_cpu.py` shows what they lead to.
COPIED_TOKEN = 32.0  # cost of copying one token into a tile, in query-key products
BAND = 2  # rows of queries that are taken together
# What bands and tiles cost beside their products: a token that the fused call reads or writes, which takes
# some queries at once and reads all keys for them; a token that is copied before and after; a call.
READ_TOKEN, MOVED_TOKEN, CALL = 32, 60, 20_000
QUERIES_AT_ONCE = ((192, 32), (768, 64), (float("inf"), 256))  # in a call of fewer than so many
TOKENS_AT_ONCE = (
    2048  # images are taken together until they have so many: fewer calls, yet the cache holds them
)


class Tiles(NamedTuple):
    """Tiles along one axis: n tiles of t queries, each with a halo of h keys, in P distinct patterns."""

    queries: np.ndarray  # [n, t] token of every query
    keys: np.ndarray  # [n, h] token of every key
    pattern: np.ndarray  # [n] which pattern a tile has
    seen: np.ndarray  # [P, t, h] does the query see the key
    relative: np.ndarray  # [P, t, h] (key - query) / dilation + kernel_size - 1, within the bias table


def _tile(axis: Axis, size: int) -> Tiles:
    """Cut one axis into tiles of `size` queries; a dilation group's last tile overlaps the one before."""
    starts, groups = [], []
    for group in range(axis.dilation):
        length = int(axis.group_length(np.array(group)))
        starts.append(np.minimum(np.arange(0, length, size), length - size))
        groups.append(np.full_like(starts[-1], group))
    group = np.concatenate(groups)[:, None]
    position = np.concatenate(starts)[:, None] + np.arange(size)  # [n, t], within the group
    queries = position * axis.dilation + group
    first, end = (edge[queries] for edge in axis.windows())
    halo = int((end.max(1) - first.min(1)).max())
    length = axis.group_length(group)
    key = np.minimum(first.min(1, keepdims=True), np.maximum(length - halo, 0)) + np.arange(halo)  # [n, h]
    seen = (first[..., None] <= key[:, None]) & (key[:, None] < end[..., None])
    keys = np.minimum(key, length - 1) * axis.dilation + group
    return _tiles(axis, queries, keys, seen, key[:, None] - position[..., None])


def _whole(axis: Axis) -> Tiles:
    """The whole axis as one tile, dilation groups and all."""
    tokens = np.arange(axis.length)
    position = tokens // axis.dilation
    return _tiles(axis, tokens[None], tokens[None], axis.seen()[None], (position - position[:, None])[None])


def _tiles(axis: Axis, queries: np.ndarray, keys: np.ndarray, seen: np.ndarray, apart: np.ndarray) -> Tiles:
    """Keep mask and offsets once for all the tiles that share them: inner tiles are all alike."""
    relative = np.where(seen, apart + axis.kernel_size - 1, 0)
    both = np.concatenate([seen, relative], axis=2).reshape(len(seen), -1)
    _, first, pattern = np.unique(both, axis=0, return_index=True, return_inverse=True)
    return Tiles(queries, keys, pattern.reshape(-1), seen[first], relative[first])


def _tile_sizes(axes: tuple[Axis, ...]) -> tuple[int, ...] | None:
    """Tile sizes with the least work, None where one dense attention is less: products and copied tokens."""
    candidates = []
    for axis in axes:
        lengths = axis.group_length(np.arange(axis.dilation))
        shortest = int(lengths.min())
        sizes = [n for n in (*range(1, 17), 20, 24, 28, 32, 40, 48, 56, 64, 96, 128) if n <= shortest]
        counts = [int((-(-lengths // size)).sum()) for size in sizes]
        halos = [min(shortest, size + axis.kernel_size - 1) for size in sizes]
        candidates.append(list(zip(sizes, counts, halos, strict=True)))

    def cost(choice: tuple[tuple[int, int, int], ...]) -> float:
        queries, tiles, keys = (prod(axis[i] for axis in choice) for i in range(3))
        return tiles * (queries * keys + COPIED_TOKEN * (queries + keys))

    best = min(product(*candidates), key=cost)
    tokens = prod(axis.length for axis in axes)
    return None if tokens**2 <= cost(best) else tuple(size for size, _, _ in best)


class Plan(NamedTuple):
    """The tiles of a grid, M of t queries and h keys in P patterns: first as arrays, then as tensors."""

    tiles: int  # M
    queries: Tensor  # [M * t] flat tokens; empty where it would list all tokens in order
    keys: Tensor  # [M * h]; likewise
    place: Tensor  # [N] where each token stands in `queries`; likewise
    pattern: Tensor  # [M]
    seen: Tensor  # [P, t, h]
    mask: Tensor  # [P, t, h] 0 where seen, else -inf, float32
    relative: Tensor  # [P, t, h] flat index into the bias table


@lru_cache(maxsize=64)
def _plan(axes: tuple[Axis, ...]) -> Plan:
    tokens = prod(axis.length for axis in axes)
    sizes = _tile_sizes(axes)
    if sizes is None:
        per_axis = [_whole(axis) for axis in axes]
    else:
        per_axis = [_tile(axis, size) for axis, size in zip(axes, sizes, strict=True)]
    queries, keys, pattern, seen, relative = _on_grid(axes, per_axis)
    queries, keys, in_order = queries.ravel(), keys.ravel(), np.arange(tokens)
    place = np.empty_like(in_order)
    place[queries] = np.arange(queries.size)
    queries, keys, place = (x[:0] if np.array_equal(x, in_order) else x for x in (queries, keys, place))
    return Plan(pattern.size, queries, keys, place, pattern, seen, _mask(seen), relative)


def _on_grid(axes: tuple[Axis, ...], per_axis: list[Tiles]) -> Tiles:
    """The tiles of a grid from those of its axes, in row-major order."""
    queries, keys, pattern, seen, relative = per_axis[0]
    for axis, tiles in zip(axes[1:], per_axis[1:], strict=True):
        queries = outer(queries * axis.length, tiles.queries, np.add)
        keys = outer(keys * axis.length, tiles.keys, np.add)
        pattern = outer(pattern * len(tiles.seen), tiles.pattern, np.add)
        seen = outer(seen, tiles.seen, np.logical_and)
        relative = outer(relative * (2 * axis.kernel_size - 1), tiles.relative, np.add)
    return Tiles(queries, keys, pattern, seen, relative)


def _mask(seen: np.ndarray) -> np.ndarray:
    return np.where(seen, 0.0, -np.inf).astype(np.float32)


# A tracer keeps the plan as constants of its graph.
@torch.compiler.assume_constant_result
def _plan_tensors(axes: tuple[Axis, ...]) -> list[int | Tensor]:
    tiles, *arrays = _plan(axes)
    return [tiles, *as_tensors(arrays)]


class Bands(NamedTuple):
    """The first axis in steps of a few rows: n bands of t queries, each with h keys, in P patterns."""

    queries: list[int]  # [n] first query of every band
    keys: list[int]  # [n] its first key
    pattern: list[int]  # [n]
    seen: np.ndarray  # [P, t, h]
    mask: np.ndarray  # [P, t, h]
    relative: np.ndarray  # [P, t, h]


@lru_cache(maxsize=64)
def _bands(axes: tuple[Axis, ...]) -> Bands:
    rows = _tile(axes[0], min(BAND, axes[0].length))
    queries, keys, pattern, seen, relative = _on_grid(axes, [rows, *map(_whole, axes[1:])])
    first = (x.reshape(pattern.size, -1)[:, 0].tolist() for x in (queries, keys))
    return Bands(*first, pattern.ravel().tolist(), seen, _mask(seen), relative)


@lru_cache(maxsize=1024)
def _bands_are_less(axes: tuple[Axis, ...], pairs: int) -> bool:
    """Whether bands cost less than the tiles of `_plan`, each for so many images times heads."""
    if axes[0].dilation > 1:  # its rows do not lie side by side
        return False
    length, row = axes[0].length, prod(axis.length for axis in axes[1:])
    rows = min(BAND, length)
    keys = min(length, rows + axes[0].kernel_size - 1)
    bands = -(-length // rows) * (_cost(rows * row, keys * row) + CALL / pairs)
    plan = _plan(axes)
    _, queries, keys = plan.seen.shape
    moved = 0 if plan.tiles == 1 else MOVED_TOKEN * (queries + keys)
    return bands < plan.tiles * (_cost(queries, keys) + moved) + CALL / pairs


def _cost(queries: int, keys: int) -> int:
    """What the fused call does, in query-key products."""
    at_once = next(count for end, count in QUERIES_AT_ONCE if queries < end)
    return queries * keys + READ_TOKEN * (queries + -(-queries // at_once) * keys)


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: tuple[Axis, ...],
    rpb: Tensor | None,
    extra_k: Tensor | None,
    return_lse: bool,
) -> str:
    """How a call would be computed, in words."""
    if _in_order(q, k, v, axes, rpb, extra_k, return_lse):
        bands = _bands(axes)
        return "{} bands of {} queries and {} keys".format(len(bands.queries), *bands.seen.shape[1:])
    plan = _plan(axes)
    _, queries, keys = plan.seen.shape
    if plan.tiles == 1:
        return "one dense attention with a mask"
    return f"{plan.tiles} tiles of {queries} queries and {keys} keys"


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: tuple[Axis, ...],
    scale: float,
    rpb: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    *,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the output [B, *grid, Hq, Dv] and, where asked for, the natural-log LSE [B, *grid, Hq]."""
    q, k, v, extra_k, extra_v = widened(q, k, v, extra_k, extra_v)
    out, lse = _attention(q, k, v, axes, scale, rpb, extra_k, extra_v, return_lse)
    if all_finite(out):
        return out, lse
    # A mask multiplies the halo's unseen keys by zero, which NaN and infinity survive. So they are taken out,
    # and the queries that do see them are told.
    bad_k, bad_v = ~k.isfinite().all(dim=-1), ~v.isfinite()
    k, v = (x.nan_to_num(0.0, 0.0, 0.0) for x in (k, v))
    out, lse = _attention(q, k, v, axes, scale, rpb, extra_k, extra_v, return_lse)
    shared = q.shape[-2] // k.shape[-2]
    nan_k, nan_v = (_nan_where_seen(bad, axes, shared) for bad in (bad_k, bad_v))
    return out + nan_k[..., None] + nan_v, lse + nan_k if return_lse else None


def _nan_where_seen(bad: Tensor, axes: tuple[Axis, ...], shared: int) -> Tensor:
    """[B, *grid, Hkv, ..] to [B, *grid, Hq, ..]: NaN for the queries that see a bad key, else 0."""
    index, visible = keys_of(axes)
    bad = bad.flatten(1, len(axes))  # [B, N, Hkv, ..]
    seen = torch.zeros_like(bad)
    for slot in range(index.shape[1]):  # one after the other: channels make it large
        there = visible[:, slot].view(-1, *(1,) * (bad.ndim - 2))
        seen |= bad[:, index[:, slot]] & there
    seen = seen.repeat_interleave(shared, 2)
    nan = torch.zeros(seen.shape, device=seen.device).masked_fill(seen, float("nan"))
    return nan.unflatten(1, [axis.length for axis in axes])


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: tuple[Axis, ...],
    scale: float,
    rpb: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    if _in_order(q, k, v, axes, rpb, extra_k, return_lse):
        return _attend_in_bands(q, k, v, axes, rpb, scale), None
    plan = Plan(*_plan_tensors(axes))
    tiles, grid, shared = plan.tiles, q.shape[1:-2], q.shape[-2] // k.shape[-2]
    bias = _bias(plan.seen, plan.mask, plan.relative, rpb, torch.promote_types(q.dtype, torch.float32))
    bias = bias if tiles == 1 else bias.index_select(0, plan.pattern)  # [M, H or 1, t, h]
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))  # [B, N, H, D]
    keys = plan.keys
    if extra_k is not None:
        # Every tile also reads the tokens appended here, and every query sees them.
        more, tokens = extra_k.shape[1], k.shape[1]
        k, v = torch.cat([k, extra_k], dim=1), torch.cat([v, extra_v], dim=1)
        bias = F.pad(bias, (0, more))
        if tiles > 1 or keys.numel():
            own = keys if keys.numel() else torch.arange(tokens, device=k.device)
            appended = torch.arange(tokens, tokens + more, device=k.device).expand(tiles, -1)
            keys = torch.cat([own.view(tiles, -1), appended], dim=1).flatten()
    if shared > 1:
        k, v = (x.repeat_interleave(shared, 2) for x in (k, v))
    nothing = None
    if _may_hide(rpb):
        nothing = (bias == float("-inf")).all(dim=-1, keepdim=True)  # [M, H, t, 1]
        bias = bias.masked_fill(nothing, 0.0)

    if tiles == 1 or in_graph():
        out, lse = _attend(q, k, v, plan, keys, bias, nothing, scale, return_lse)
    else:
        # A few images at a time: the halos stay in the cache, and the mask is not repeated for a whole batch.
        some = max(1, TOKENS_AT_ONCE // prod(grid))
        images = zip(q.split(some), k.split(some), v.split(some), strict=True)
        parts = [_attend(*image, plan, keys, bias, nothing, scale, return_lse) for image in images]
        out = _cat([part[0] for part in parts])
        lse = _cat([part[1] for part in parts]) if return_lse else None
    return out.unflatten(1, grid), lse.unflatten(1, grid) if return_lse else None


def _may_hide(rpb: Tensor | None) -> bool:
    """Whether a bias may hide every key of a query."""
    return rpb is not None and not (shows_values(rpb) and all_finite(rpb))


def _bias(seen: Tensor, mask: Tensor, relative: Tensor, rpb: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is added to the logits, mask and relative positional bias: [P, H or 1, t, h]."""
    if rpb is None:
        return mask[:, None].to(dtype)
    bias = rpb.flatten(1).to(dtype).index_select(1, relative.flatten()).unflatten(1, seen.size())
    return torch.where(seen, bias, float("-inf")).transpose(0, 1)


def _in_order(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: tuple[Axis, ...],
    rpb: Tensor | None,
    extra_k: Tensor | None,
    return_lse: bool,
) -> bool:
    """Whether bands are possible and less work than tiles.

    Backward they would not be: a sum over all tokens for each band.
    """
    if return_lse or extra_k is not None or v.shape[-1] != q.shape[-1] or not shows_values(q):
        return False
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, rpb)):
        return False
    return _bands_are_less(axes, max(1, q.shape[0] * q.shape[-2])) and not _may_hide(rpb)


def _attend_in_bands(
    q: Tensor, k: Tensor, v: Tensor, axes: tuple[Axis, ...], rpb: Tensor | None, scale: float
) -> Tensor:
    """Attention of one band after the other, [B, *grid, H, D] in and out; nothing is copied but results."""
    bands, shared = _bands(axes), q.shape[-2] // k.shape[-2]
    grid, (_, queries, keys) = q.shape[1:-2], bands.seen.shape
    bias = _bias(*as_tensors(bands[-3:]), rpb, torch.promote_types(q.dtype, torch.float32))
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    if shared > 1:
        k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
    parts, done = [], 0
    for own, seen, pattern in zip(bands.queries, bands.keys, bands.pattern, strict=True):
        some, *others = q[:, :, own : own + queries], *(x[:, :, seen : seen + keys] for x in (k, v))
        part = F.scaled_dot_product_attention(some, *others, attn_mask=bias[pattern, None], scale=scale)
        parts.append(part.transpose(1, 2)[:, done - own :])  # the last band may begin in the one before
        done = own + queries
    return torch.cat(parts, dim=1).unflatten(1, grid)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    keys: Tensor,
    bias: Tensor,
    nothing: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention of all tiles of some images: [B, N, H, D] in, [B, N, H, D] and [B, N, H] out.

    `nothing` [M, H, t, 1] are the queries that see nothing, to which `bias` [M, H, t, h] shows something.
    """
    batch, tiles = q.shape[0], plan.tiles
    q, k, v = _cut(q, plan.queries, tiles), _cut(k, keys, tiles), _cut(v, keys, tiles)  # [B * M, H, t, D]
    bias = bias.expand(batch, -1, -1, -1, -1).flatten(0, 1)
    nothing = None if nothing is None else nothing.expand(batch, -1, -1, -1, -1).flatten(0, 1)
    # What is mapped does not tell whether it wants a gradient, and SDPA has none for a bias.
    mapped = torch._C._are_functorch_transforms_active()
    if not (return_lse or learns(bias) or mapped or v.shape[-1] != k.shape[-1]):
        out, lse = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale), None
    else:
        # SDPA returns no LSE, and with a bias that wants a gradient it is slower than the plain form.
        shape = (*q.shape[:3], k.shape[2])
        flat_q, flat_k = q.flatten(0, 1), k.flatten(0, 1)
        flat_bias = bias.expand(shape).flatten(0, 1)
        logits = torch.baddbmm(flat_bias, flat_q, flat_k.transpose(1, 2), alpha=scale).view(shape)
        out = logits.softmax(dim=-1) @ v
        lse = logits.logsumexp(dim=-1, keepdim=True) if return_lse else None
    if nothing is not None:
        out = out.masked_fill(nothing, 0.0)
        lse = None if lse is None else lse.masked_fill(nothing, float("-inf"))
    out, lse = (None if x is None else _join(x, plan.place, batch, tiles) for x in (out, lse))
    return out, None if lse is None else lse.squeeze(-1)


def _cut(x: Tensor, index: Tensor, tiles: int) -> Tensor:
    """[B, N, H, D] to [B * M, H, t, D]: the tokens of every tile."""
    heads = x.shape[2]
    if index.numel():
        x = x.flatten(2).index_select(1, index).unflatten(2, (heads, -1))  # whole tokens: long rows to copy
    return x.unflatten(1, (tiles, x.shape[1] // tiles)).flatten(0, 1).transpose(1, 2)


def _join(x: Tensor, place: Tensor, batch: int, tiles: int) -> Tensor:
    """[B * M, H, t, D] back to [B, N, H, D]."""
    heads = x.shape[1]
    x = x.transpose(1, 2).unflatten(0, (batch, tiles)).flatten(1, 2)
    if place.numel():
        x = x.flatten(2).index_select(1, place).unflatten(2, (heads, -1))
    return x


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
