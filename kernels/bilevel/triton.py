"""Bi-level routing attention in Triton: the tile template over the regions that were chosen.

Regions are read where they lie in the map. The backward pass of keys and values walks inverse lists, which
are made on the device: nothing waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.tile import launch, policies
from zoo.kernels.tile.launch import Policy, Tiling, tile_size


def forward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output [B, Y, X, Hq, Dv] in q's dtype and the natural-log LSE [B, Y, X, Hq]."""
    tiling = _tiling(q, k, regions, routes, None)
    out, lse = launch.forward(*(x.flatten(1, 2) for x in (q, k, v)), tiling, scale)
    return out.unflatten(1, q.shape[1:3]), lse.unflatten(1, q.shape[1:3])


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    out: Tensor,
    lse: Tensor,
    regions: tuple[int, int],
    scale: float,
) -> list[Tensor]:
    """Return the gradients of q, k and v."""
    inverse = _inverse(routes)
    flat = [None if x is None else x.flatten(1, 2) for x in (grad_out, grad_lse, q, k, v, out, lse)]
    *grads, _ = launch.backward(
        *flat,
        _tiling(q, k, regions, routes, inverse),
        scale,
        tiling_of_keys=_tiling(q, k, regions, routes, inverse, keys_own=True),
    )
    return [x.unflatten(1, like.shape[1:3]) for x, like in zip(grads, (q, k, v), strict=True)]


def describe(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: tuple[int, int]) -> str:
    """How a call would be computed, in words."""
    config = launch.config_of("forward", q, v)
    queries, keys = _tiling(q, k, regions, routes, None)(config.queries, config.keys).shape[:2]
    return f"tiles of {queries} queries and {keys} keys, {config.warps} warps, {config.stages} stages"


def _tiling(
    q: Tensor,
    k: Tensor,
    regions: tuple[int, int],
    routes: Tensor,
    inverse: tuple[Tensor, Tensor] | None,
    *,
    keys_own: bool = False,
) -> Tiling:
    """A tile that owns lies in one region; one that is visited may hold several."""
    parts, chosen = routes.shape[1:]
    queries, keys = (x.shape[1] * x.shape[2] // parts for x in (q, k))
    routes = routes.contiguous()
    # The forward pass reads no inverse lists.
    data = (routes, *(inverse or (routes, routes)), parts, regions[1], q.shape[2], k.shape[2])
    columns = (q.shape[2] // regions[1], k.shape[2] // regions[1])

    def tiling(wanted_queries: int, wanted_keys: int) -> Policy:
        tq = tile_size(wanted_queries, queries * chosen if keys_own else queries)
        tk = tile_size(wanted_keys, keys if keys_own else keys * chosen)
        full = keys * chosen % tk == 0
        return Policy(
            data,
            (tq, tk, queries, keys, *columns, chosen, full),
            parts * -(-queries // tq),
            parts * -(-keys // tk),
            policies.region_own_q,
            policies.region_own_k,
            policies.region_keys_of,
            policies.region_queries_of,
            policies.region_visit_k,
            policies.region_visit_q,
            # In a tile of keys that own, those that do not exist are rows of their own, which nobody keeps.
            None if full or keys_own else policies.dense_allow,
        )

    return tiling


def _inverse(routes: Tensor) -> tuple[Tensor, Tensor]:
    """The regions that chose a region, once for each time: offsets [B, p + 1] and entries [B, p * topk]."""
    batch, parts, chosen = routes.shape
    ordered, order = routes.flatten(1).sort(dim=-1, stable=True)
    edges = torch.arange(parts + 1, device=routes.device).expand(batch, -1).contiguous()
    return torch.searchsorted(ordered, edges), order // chosen
