"""Neighborhood attention on a CPU: tiles of queries with the halo of keys they see, in one attention call.

Neighbouring queries share most of their keys, so a tile of 8 x 8 queries reads one halo of 14 x 14 keys
instead of 64 windows of 49. Inside the halo a mask keeps each query's own window. Dilation groups become
tiles of their own. Small maps are one tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import ceil, prod
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.neighborhood import reference
from zoo.kernels.neighborhood.geometry import TABLES, Axis, tables

DENSE_TOKENS = 256  # up to here one masked dense attention is faster than tiles
TILE_OVERHEAD = 96.0  # cost of one tile, in query-key products per query: copies of the halo and of the mask


@dataclass(frozen=True)
class Tiles:
    """Tiles along one axis: n tiles of t queries, each with a halo of h keys, in P distinct patterns."""

    queries: np.ndarray  # [n, t] token of every query
    keys: np.ndarray  # [n, h] token of every key
    pattern: np.ndarray  # [n] which pattern a tile has
    allowed: np.ndarray  # [P, t, h] does the query see the key
    relative: np.ndarray  # [P, t, h] (key - query) / dilation + kernel_size - 1, within the bias table


def _tile(axis: Axis, size: int) -> Tiles:
    """Cut one axis into tiles of `size` queries; a dilation group's last tile overlaps the one before."""
    start, end = axis.windows()
    groups = np.arange(axis.dilation)
    firsts, group_of_tile = [], []
    for group in groups:
        length = int(axis.group_length(group))
        first = np.minimum(np.arange(0, length, size), length - size)
        firsts.append(first)
        group_of_tile.append(np.full_like(first, group))
    first, group = np.concatenate(firsts)[:, None], np.concatenate(group_of_tile)[:, None]
    positions = first + np.arange(size)
    queries = positions * axis.dilation + group
    q_start, q_end = start[queries], end[queries]  # [n, t]
    halo = int((q_end.max(axis=1) - q_start.min(axis=1)).max())
    length = axis.group_length(group)
    key_positions = np.minimum(q_start.min(axis=1, keepdims=True), np.maximum(length - halo, 0)) + np.arange(
        halo
    )
    seen = (key_positions[:, None] >= q_start[..., None]) & (key_positions[:, None] < q_end[..., None])
    apart = key_positions[:, None] - positions[..., None] + axis.kernel_size - 1
    relative = np.clip(apart, 0, 2 * axis.kernel_size - 2)
    keys = np.minimum(key_positions, length - 1) * axis.dilation + group
    return _with_patterns(queries, keys, seen, relative)


def _whole(axis: Axis) -> Tiles:
    """The whole axis as one tile, dilation groups and all."""
    start, end = axis.windows()
    tokens = np.arange(axis.length)
    group, position = tokens % axis.dilation, tokens // axis.dilation
    seen = (group[:, None] == group) & (position >= start[:, None]) & (position < end[:, None])
    relative = np.clip(position - position[:, None] + axis.kernel_size - 1, 0, 2 * axis.kernel_size - 2)
    return _with_patterns(tokens[None], tokens[None], seen[None], relative[None])


def _with_patterns(queries: np.ndarray, keys: np.ndarray, seen: np.ndarray, relative: np.ndarray) -> Tiles:
    """Keep mask and offsets once for all the tiles that share them: inner tiles are all alike."""
    both = np.concatenate([seen, relative], axis=2).reshape(len(seen), -1)
    _, first, pattern = np.unique(both, axis=0, return_index=True, return_inverse=True)
    return Tiles(queries, keys, pattern.reshape(-1), seen[first], relative[first])


def _tile_sizes(axes: tuple[Axis, ...]) -> tuple[int, ...]:
    """Tile sizes with the least work: query-key products, plus an overhead for every tile."""
    candidates = []
    for axis in axes:
        shortest = int(axis.group_length(np.array(axis.dilation - 1)))
        sizes = range(1, shortest + 1) if shortest <= 16 else [4, 5, 6, 7, 8, 10, 12, 14, 16, 24, 32, 48, 64]
        sizes = [size for size in sizes if size <= shortest]
        counts = [axis.dilation * ceil(ceil(axis.length / axis.dilation) / size) for size in sizes]
        halos = [min(shortest, size + axis.kernel_size - 1) for size in sizes]
        candidates.append(list(zip(sizes, counts, halos, strict=True)))

    def cost(choice: tuple[tuple[int, int, int], ...]) -> float:
        queries, tiles, keys = (prod(axis[i] for axis in choice) for i in range(3))
        return tiles * (queries * keys + TILE_OVERHEAD * (keys + queries))

    return tuple(size for size, _, _ in min(product(*candidates), key=cost))


class Plan(NamedTuple):
    """Tiles over all axes, flattened: M tiles of t queries and h keys, P patterns. As arrays, then as
    tensors."""

    queries: Tensor  # [M * t] flat tokens, empty where they are the tokens in order
    keys: Tensor  # [M * h], empty where they are the tokens in order
    place: Tensor  # [N] where each token's result stands among the M * t queries, empty likewise
    pattern: Tensor  # [M]
    mask: Tensor  # [P, t, h] float32: 0 or -inf
    relative: Tensor  # [P, t * h] flat index into the bias table

    @property
    def tiles(self) -> int:
        return self.pattern.shape[0]


@lru_cache(maxsize=64)
def plan(axes: tuple[Axis, ...]) -> tuple[np.ndarray, ...]:
    """Choose the tiles of a grid and write down what they need; depends on the geometry only."""
    tokens = prod(axis.length for axis in axes)
    if tokens <= DENSE_TOKENS:
        per_axis = [_whole(axis) for axis in axes]
    else:
        per_axis = [_tile(axis, size) for axis, size in zip(axes, _tile_sizes(axes), strict=True)]
    first = per_axis[0]
    queries, keys, pattern, seen, relative = (
        first.queries,
        first.keys,
        first.pattern,
        first.allowed,
        first.relative,
    )
    for axis, tiles in zip(axes[1:], per_axis[1:], strict=True):
        queries = _outer(queries * axis.length, tiles.queries)
        keys = _outer(keys * axis.length, tiles.keys)
        pattern = (pattern[:, None] * len(tiles.allowed) + tiles.pattern).reshape(-1)
        seen = _outer2(seen, tiles.allowed, np.logical_and)
        relative = _outer2(relative * (2 * axis.kernel_size - 1), tiles.relative, np.add)
    place = np.zeros(tokens, dtype=np.int64)
    place[queries.ravel()] = np.arange(queries.size)
    nothing, in_order = np.zeros(0, dtype=np.int64), np.arange(tokens)
    same = np.array_equal(queries.ravel(), in_order)
    return Plan(
        queries=nothing if same else queries.ravel(),
        keys=nothing if np.array_equal(keys.ravel(), in_order) else keys.ravel(),
        place=nothing if same else place,
        pattern=pattern,
        mask=np.where(seen, np.float32(0), np.float32(-np.inf)),
        relative=relative.reshape(len(relative), -1),
    )


TABLES["tiles"] = plan


def _outer(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[n, t] and [m, s] to [n * m, t * s], entries added."""
    out = left[:, None, :, None] + right[None, :, None, :]
    return out.reshape(left.shape[0] * right.shape[0], -1)


def _outer2(left: np.ndarray, right: np.ndarray, join: np.ufunc) -> np.ndarray:
    """[p, t, h] and [r, s, g] to [p * r, t * s, h * g], entries joined."""
    out = join(left[:, None, :, None, :, None], right[None, :, None, :, None, :])
    return out.reshape(left.shape[0] * right.shape[0], left.shape[1] * right.shape[1], -1)


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
    if not _finite(k, v):
        # A tile multiplies the keys outside a window by zero, which NaN and infinity survive; the definition
        # never reads them.
        return reference.neighborhood_attention(q, k, v, axes, scale, rpb, extra_k, extra_v)
    layout = Plan(*tables("tiles", axes))
    grid, heads = q.shape[1:-2], q.shape[-2]
    shared = heads // k.shape[-2]
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    q = _select(q, layout.queries, layout.tiles)
    k, v = (
        _select(x, layout.keys, layout.tiles).repeat_interleave(shared, 1) for x in (k, v)
    )  # [B, H, M, h, D]
    bias = _bias(layout, rpb, q)  # [H or 1, M, t, h]
    if extra_k is not None:
        more = (x.transpose(1, 2).repeat_interleave(shared, 1)[:, :, None] for x in (extra_k, extra_v))
        k, v = (
            torch.cat([x, y.expand(-1, -1, layout.tiles, -1, -1)], 3)
            for x, y in zip((k, v), more, strict=True)
        )
        bias = F.pad(bias, (0, extra_k.shape[1]))

    lse = None
    if return_lse or bias.requires_grad or v.shape[-1] != k.shape[-1]:
        # SDPA has no LSE, and with a bias that wants a gradient it is slower than the plain form.
        dtype = torch.promote_types(q.dtype, torch.float32)
        logits = (q.to(dtype) * scale) @ k.to(dtype).transpose(-1, -2) + bias
        out = logits.softmax(dim=-1) @ v.to(dtype)
        if return_lse:
            lse = _untile(logits.logsumexp(dim=-1, keepdim=True), layout, grid).squeeze(-1)
    else:
        bias = bias.expand(heads, -1, -1, -1).flatten(0, 1)[None]
        out = F.scaled_dot_product_attention(
            q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), attn_mask=bias, scale=scale
        ).unflatten(1, (heads, layout.tiles))
    return _untile(out, layout, grid), lse


def describe(axes: tuple[Axis, ...]) -> str:
    """How a grid would be computed, in words."""
    tiles, (_, queries, keys) = len(plan(axes)[3]), plan(axes)[4].shape
    if tiles == 1:
        return "one dense attention with a mask"
    return f"{tiles} tiles of {queries} queries and {keys} keys"


def _finite(*tensors: Tensor) -> bool:
    """Whether no tensor holds NaN or infinity; a tracer cannot know and takes them as finite."""
    if torch.compiler.is_compiling() or any(type(x) is not Tensor for x in tensors):
        return True
    # A sum is one cheap pass. It may overflow by itself; that only costs the slower way.
    return all(bool(x.detach().sum(dtype=torch.float32).isfinite()) for x in tensors)


def _select(x: Tensor, index: Tensor, tiles: int) -> Tensor:
    """[B, H, N, D] to [B, H, M, t, D]: the tokens of every tile."""
    if index.numel():
        x = x.index_select(2, index)
    return x.unflatten(2, (tiles, x.shape[2] // tiles))


def _untile(x: Tensor, layout: Plan, grid: tuple[int, ...]) -> Tensor:
    """[B, H, M, t, D] back to [B, *grid, H, D]."""
    x = x.flatten(2, 3)
    if layout.place.numel():
        x = x.index_select(2, layout.place)
    return x.transpose(1, 2).unflatten(1, grid)


def _bias(layout: Plan, rpb: Tensor | None, q: Tensor) -> Tensor:
    """What is added to the logits: mask and relative positional bias, [H or 1, M, t, h]."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    bias = layout.mask.to(dtype)[None]  # [1, P, t, h]
    if rpb is not None:
        table = rpb.flatten(1).to(dtype)
        bias = table.index_select(1, layout.relative.flatten()).view(-1, *layout.mask.shape) + bias
    return bias if layout.tiles == 1 else bias.index_select(1, layout.pattern)
