"""Neighborhood attention in Triton: the tile template over boxes of the token grid.

A program owns a box of queries of one dilation group and walks the boxes of keys that any of them sees,
read in place: neither tokens nor windows are copied. Extra keys are a second, dense pass joined by the LSE;
with the LSE of both, their backward passes are independent.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import prod

import numpy as np
import torch
from torch import Tensor

from zoo.kernels.merge.op import merge_attentions
from zoo.kernels.neighborhood.geometry import Axis
from zoo.kernels.tile import kernels, launch, policies
from zoo.kernels.tile.launch import NO_BIAS, Bias, Policy, Tiling, tile_size

PROGRAMS = 512  # that share the gradient of the bias table: enough for any GPU, and always the same sums


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    axes: tuple[Axis, ...],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output [B, N, Hq, Dv] in q's dtype and the natural-log LSE [B, N, Hq]."""
    near, bias = tiling_of(axes), _bias(rpb)
    if extra_k is None or extra_k.shape[1] == 0:
        return launch.forward(q, k, v, near, scale, bias)
    dtype = torch.promote_types(q.dtype, torch.float32)
    parts = (
        launch.forward(q, k, v, near, scale, bias, out_dtype=dtype),
        launch.forward(q, extra_k, extra_v, launch.dense(q, extra_k), scale, out_dtype=dtype),
    )
    out, lse = merge_attentions(*zip(*parts, strict=True))
    return out.to(q.dtype), lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    axes: tuple[Axis, ...],
    scale: float,
    rpb_grad: bool,
) -> list[Tensor]:
    """Return the gradients of q, k, v, with `rpb_grad` of rpb, and of the extra keys and values if any."""
    bias = _bias(rpb)
    after = (out, lse)
    *grads, rows = launch.backward(grad_out, grad_lse, q, k, v, *after, tiling_of(axes), scale, bias)
    if rpb_grad:
        grads.append(_table_gradient(grad_out, q, k, v, rows, rpb, axes, scale, bias))
    if extra_k is not None:
        dense = launch.dense(q, extra_k)
        dq, *more, _ = launch.backward(grad_out, grad_lse, q, extra_k, extra_v, *after, dense, scale)
        grads[0] = grads[0] + dq
        grads += more
    return grads


def describe(axes: tuple[Axis, ...], q: Tensor, v: Tensor, biased: bool) -> str:
    """How a grid would be computed, in words."""
    config = launch.config_of("forward", q, v, biased)
    shape = tiling_of(axes)(config.queries, config.keys).shape
    rank = len(axes)
    sides = ["x".join(map(str, shape[end - rank : end])) for end in (5, 8)]
    launched = f"{config.warps} warps, {config.stages} stages"
    return f"tiles of {sides[0]} queries and {sides[1]} keys, {launched}"


def tiling_of(axes: tuple[Axis, ...], *, clipped: bool = False) -> Tiling:
    """Which boxes of tokens meet; `clipped` windows are cut off at a border, where others shift."""
    border = [policies.CLIPPED.value if clipped else int(axis.is_causal) for axis in axes]
    border = (0,) * (3 - len(axes)) + tuple(border)
    axes = (Axis(1, 1),) * (3 - len(axes)) + axes
    data = tuple(n for axis in axes for n in (axis.length, axis.kernel_size, axis.dilation, axis.stride))
    # A clipped window may be wider than the map.
    fitting = tuple(axis._replace(kernel_size=min(axis.kernel_size, axis.length)) for axis in axes)
    rank = max([3 - number for number, axis in enumerate(axes) if axis.length > 1], default=1)

    def tiling(wanted_queries: int, wanted_keys: int) -> Policy:
        members = prod(_longest_group(axis) for axis in axes)
        query_box, key_box = _boxes(
            fitting, tile_size(wanted_queries, members), tile_size(wanted_keys, members)
        )
        return Policy(
            data,
            (prod(query_box), prod(key_box), *query_box, *key_box, *border, rank),
            _count(axes, query_box),
            _count(axes, key_box),
            policies.na_own_q,
            policies.na_own_k,
            policies.na_keys_of,
            policies.na_queries_of,
            policies.na_visit_k,
            policies.na_visit_q,
            policies.na_allow,
        )

    return tiling


def _longest_group(axis: Axis) -> int:
    return -(-axis.length // axis.dilation)


def _count(axes: tuple[Axis, ...], box: tuple[int, ...]) -> int:
    """Boxes that cover every dilation group; the shorter groups' last ones may be empty."""
    return prod(
        axis.dilation * -(-_longest_group(axis) // side) for axis, side in zip(axes, box, strict=True)
    )


@lru_cache(maxsize=256)
def _boxes(axes: tuple[Axis, ...], queries: int, keys: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sides of the query and the key tile for which the fewest pairs of tiles meet."""
    visits = [_visits(axis, queries, keys) for axis in axes]

    def cost(boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[int, int]:
        pairs = prod(visit[sides] for visit, sides in zip(visits, zip(*boxes, strict=True), strict=True))
        return pairs, -boxes[0][-1] - boxes[1][-1]  # of equals the one with the longest rows

    return min(product(_splits(queries, axes), _splits(keys, axes)), key=cost)


def _splits(tokens: int, axes: tuple[Axis, ...]) -> list[tuple[int, ...]]:
    """Every box of so many tokens with sides that are powers of two, long ones on long axes only."""
    powers = [2**n for n in range(tokens.bit_length())]
    boxes = [box for box in product(powers, repeat=3) if prod(box) == tokens]
    fits = lambda box: all(s == 1 or a.length > 1 for s, a in zip(box, axes, strict=True))  # noqa: E731
    return [box for box in boxes if fits(box)] or boxes


def _visits(axis: Axis, queries: int, keys: int) -> dict[tuple[int, int], int]:
    """How many pairs of tiles meet along one axis, for every pair of sides."""
    group = axis._replace(length=_longest_group(axis), dilation=1)
    first, end = group.windows()
    visits = {}
    for side in (2**n for n in range(queries.bit_length())):
        starts = np.arange(0, group.length, side)
        reach = end[np.minimum(starts + side, group.length) - 1] - first[starts]
        for other in (2**n for n in range(keys.bit_length())):
            visits[side, other] = axis.dilation * int((-(-reach // other)).sum())
    return visits


def _bias(rpb: Tensor | None) -> Bias:
    if rpb is None:
        return NO_BIAS
    rpb = rpb.contiguous()
    return Bias(policies.relative_bias, (rpb, rpb.stride(0)))


# The gradient of the bias table ----------------------------------------------------------------------------


def _table_gradient(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    rpb: Tensor,
    axes: tuple[Axis, ...],
    scale: float,
    bias: Bias,
) -> Tensor:
    q, k, v, grad_out = (launch.dense_rows(x) for x in (q, k, v, grad_out))
    batch, queries, heads, _ = q.shape
    config = launch.config_of("drelative", q, v)
    policy = tiling_of(axes)(config.queries, config.keys)
    tq, tk, *sides = policy.shape[:8]
    low, counts = _places(tuple(a.kernel_size for a in axes), tuple(sides))
    places, work = prod(counts), batch * policy.query_tiles
    splits = max(1, min(work, PROGRAMS // (heads * places)))
    sums = rows.new_empty(splits, heads, places * tq * tk)
    launch.launch(
        kernels.drelative_kernel, splits * places * heads, config, q,
        q, k, v, grad_out, rows, sums, bias.data, policy.data, *launch.exact(scale * launch.LOG2_E),
        policy.query_tiles, batch, heads, heads // k.shape[2], queries, rows[0].numel(), *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3], splits, *counts, *low, SHAPE=policy.shape,
        OWN=policy.own_q, CORNER=policies.na_corner, RANGE=policies.na_key_range, BOX=policies.na_box,
        TOKENS=policies.na_tokens, ALLOW=policy.allow, BIAS=bias.function, TQ=tq, TK=tk,
        **launch.constants(q, v),
    )  # fmt: skip
    # Every offset has one key for each query of a tile: a gather and a sum, in a fixed order.
    entries = _entries(tuple(a.kernel_size for a in axes), tuple(sides), low, counts, q.device)
    return sums.sum(dim=0)[:, entries].sum(dim=-1).view(rpb.shape).to(rpb.dtype)


@lru_cache(maxsize=64)
def _places(kernel_size: tuple[int, ...], sides: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First place of a key tile beside a query tile, and number of places, on each axis.

    The places begin where the windows of inner tiles do.
    """
    low, counts = [], []
    for size, query_side, key_side in zip(_three(kernel_size), sides[:3], sides[3:], strict=True):
        low.append(-(size // 2) - -(-(size - 1 - size // 2) // key_side) * key_side)
        counts.append(-(-(query_side - 1 + size - low[-1]) // key_side))
    return tuple(low), tuple(counts)


def _entries(
    kernel_size: tuple[int, ...],
    sides: tuple[int, ...],
    low: tuple[int, ...],
    counts: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """[bins, TQ] flat (place, query, key): for every entry of the bias table the one key of each query.

    Made by the device in each call: a copy would wait for it, and what is kept from one call to the next may
    lie in memory that a CUDA graph uses again.
    """
    index = torch.zeros([1] * 6, dtype=torch.int64, device=device)
    place_step, query_step, key_step = prod(sides), prod(sides[3:]), 1
    for axis, size in reversed(list(enumerate(_three(kernel_size)))):
        query_side, key_side = sides[axis], sides[3 + axis]
        query = torch.arange(query_side, device=device)
        token = torch.arange(1 - size - low[axis], size - low[axis], device=device)[:, None] + query
        part = token // key_side * place_step + query * query_step + token % key_side * key_step
        shape = [1] * 6
        shape[axis], shape[3 + axis] = part.shape
        index = index + part.view(shape)
        place_step, query_step, key_step = (
            place_step * counts[axis], query_step * query_side, key_step * key_side
        )  # fmt: skip
    return index.reshape(-1, prod(sides[:3]))


def _three(kernel_size: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * (3 - len(kernel_size)) + kernel_size
