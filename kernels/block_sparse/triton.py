"""Block-sparse attention in Triton: the tile template over lists of blocks.

A block is cut into as many tiles as it needs; the backward pass of keys and values walks the inverse lists.
"""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.block_sparse.cpu import Lists
from zoo.kernels.tile import launch, policies
from zoo.kernels.tile.launch import Policy, Tiling, tile_size


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lists: Lists, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output [B, N, Hq, Dv] in q's dtype and the natural-log LSE [B, N, Hq]."""
    return launch.forward(q, k, v, _tiling(q, k, lists, None), scale, launch.table(bias))


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lists: Lists,
    scale: float,
    bias_grad: bool,
    inverse_offsets: Tensor,
    inverse_indices: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k, v and, with `bias_grad`, of the bias."""
    tiling = _tiling(q, k, lists, (inverse_offsets, inverse_indices))
    *grads, rows = launch.backward(grad_out, grad_lse, q, k, v, out, lse, tiling, scale, launch.table(bias))
    dbias = None
    if bias_grad:
        dbias = launch.table_gradient(grad_out, q, k, v, rows, bias, tiling, scale, launch.table(bias))
    return (*grads, dbias)


def describe(q: Tensor, v: Tensor, query_size: int, key_size: int, biased: bool) -> str:
    """How a call would be computed, in words."""
    config = launch.config_of("forward", q, v, biased)
    queries, keys = tile_size(config.queries, query_size), tile_size(config.keys, key_size)
    return f"tiles of {queries} queries and {keys} keys, {config.warps} warps, {config.stages} stages"


def _tiling(q: Tensor, k: Tensor, lists: Lists, inverse: tuple[Tensor, Tensor] | None) -> Tiling:
    queries, keys = q.shape[1], k.shape[1]
    # The forward pass reads no inverse lists.
    tables = (lists.offsets, lists.indices, *(inverse or (lists.offsets, lists.indices)))
    strides = [table.stride(axis) if table.shape[axis] > 1 else 0 for table in tables for axis in (0, 1)]
    segments = lists.query_segments is not None
    data = (
        *tables, lists.query_segments if segments else 0, lists.key_segments if segments else 0,
        queries, keys, *strides,
    )  # fmt: skip

    def tiling(wanted_queries: int, wanted_keys: int) -> Policy:
        tq, tk = tile_size(wanted_queries, lists.query_size), tile_size(wanted_keys, lists.key_size)
        full = lists.key_size % tk == 0 and keys % lists.key_size == 0
        return Policy(
            data,
            (tq, tk, lists.query_size, lists.key_size, full, segments),
            -(-queries // lists.query_size) * -(-lists.query_size // tq),
            -(-keys // lists.key_size) * -(-lists.key_size // tk),
            policies.list_own_q,
            policies.list_own_k,
            policies.list_keys_of,
            policies.list_queries_of,
            policies.list_visit_k,
            policies.list_visit_q,
            None if full and not segments else policies.list_allow,
        )

    return tiling
