"""Aligned attention in Triton: the tile template over boxes of the grid, with windows that a border cuts off.

Keys and values are read where they lie; no slot is gathered.
"""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.neighborhood.geometry import Axis
from zoo.kernels.neighborhood.triton import tiling_of
from zoo.kernels.tile import launch
from zoo.kernels.tile.launch import Tiling


def forward(q: Tensor, k: Tensor, v: Tensor, radius: tuple[int, ...], scale: float) -> tuple[Tensor, Tensor]:
    """Return the output [B, *grid, Hq, Dv] in q's dtype and the natural-log LSE [B, *grid, Hq]."""
    grid = q.shape[1:-2]
    out, lse = launch.forward(*(x.flatten(1, -3) for x in (q, k, v)), _tiling(grid, radius), scale)
    return out.unflatten(1, grid), lse.unflatten(1, grid)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    radius: tuple[int, ...],
    scale: float,
) -> list[Tensor]:
    """Return the gradients of q, k and v."""
    grid = q.shape[1:-2]
    lse, grad_lse = (None if x is None else x.flatten(1, -2) for x in (lse, grad_lse))
    grad_out, q, k, v, out = (x.flatten(1, -3) for x in (grad_out, q, k, v, out))
    *grads, _ = launch.backward(grad_out, grad_lse, q, k, v, out, lse, _tiling(grid, radius), scale)
    return [x.unflatten(1, grid) for x in grads]


def describe(q: Tensor, v: Tensor, radius: tuple[int, ...]) -> str:
    """How a call would be computed, in words."""
    config = launch.config_of("forward", q, v)
    shape = _tiling(q.shape[1:-2], radius)(config.queries, config.keys).shape
    sides = ["x".join(map(str, shape[end - len(radius) : end])) for end in (5, 8)]
    return f"tiles of {sides[0]} queries and {sides[1]} keys, {config.warps} warps, {config.stages} stages"


def _tiling(grid: tuple[int, ...], radius: tuple[int, ...]) -> Tiling:
    axes = tuple(Axis(length, 2 * reach + 1) for length, reach in zip(grid, radius, strict=True))
    return tiling_of(axes, clipped=True)
