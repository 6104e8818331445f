"""The sparsity simulator counts the tiles that the kernels visit: asked of the kernels' own policies."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from zoo import ops
from zoo.analysis import block_tiles, launched_tiles, neighborhood_tiles
from zoo.kernels.configs import choose
from zoo.kernels.neighborhood.geometry import Axis
from zoo.kernels.neighborhood.triton import tiling_of
from zoo.kernels.tile.launch import tile_size

# grid, and the arguments of the operation: borders, rests, dilation, strides and causal axes.
PATTERNS = [
    ((56, 56), {"kernel_size": 7}),
    ((30, 41), {"kernel_size": (7, 5), "dilation": (4, 3)}),
    ((13, 30, 52), {"kernel_size": (5, 7, 7), "is_causal": (True, False, False)}),
    ((9, 20, 26), {"kernel_size": (5, 12, 12)}),
    ((64, 64), {"kernel_size": 20, "stride": 8}),
    ((4096,), {"kernel_size": 255, "is_causal": True}),
    ((33,), {"kernel_size": 33}),
]


@triton.jit
def counting_kernel(p_counts, P, SHAPE: tl.constexpr, KEYS_OF: tl.constexpr):
    i_tile = tl.program_id(0)
    count, _ = KEYS_OF(P, SHAPE, i_tile, 0, 0)
    tl.store(p_counts + i_tile, count)


def visited(policy) -> int:
    counts = torch.zeros(policy.query_tiles, dtype=torch.int64)
    counting_kernel[(policy.query_tiles,)](counts, policy.data, SHAPE=policy.shape, KEYS_OF=policy.keys_of)
    return int(counts.sum())


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("grid", "options"), PATTERNS)
def test_neighborhoods_visit_as_many_tiles_as_the_simulator_says(grid, options, architecture):
    per_axis = {"dilation": 1, "stride": 1, "is_causal": False} | options
    each = [value if isinstance(value, tuple) else (value,) * len(grid) for value in per_axis.values()]
    axes = tuple(
        Axis(n, **dict(zip(per_axis, values, strict=True)))
        for n, values in zip(grid, zip(*each, strict=True), strict=True)
    )
    config = choose("forward", architecture, 128, 2)
    policy = tiling_of(axes)(config.queries, config.keys)
    count = launched_tiles(grid, **options, architecture=architecture)
    assert visited(policy) == count.visited
    # Where its tiles may slide, a kernel visits no more than where they are cut once for all.
    sides = {"query_tile": count.query_tile, "key_tile": count.key_tile}
    assert count.visited <= neighborhood_tiles(grid, **options, **sides).visited


@pytest.mark.parametrize(("block", "tile"), [(128, 64), (128, 128), (64, 128), (48, 64)])
def test_block_lists_visit_as_many_tiles_as_the_simulator_says(block, tile):
    from zoo.kernels.block_sparse.cpu import Lists
    from zoo.kernels.block_sparse.triton import _tiling

    torch.manual_seed(0)
    mask = torch.rand(9, 9) < 0.3
    blocks = ops.BlockList.from_mask(mask, block_size=block)
    q = torch.zeros(1, 9 * block, 1, 16)
    lists = Lists(blocks.offsets, blocks.indices, block, block, None, None)
    policy = _tiling(q, q, lists, None)(tile, tile)
    side = min(tile_size(tile, block), block)
    assert visited(policy) == block_tiles(mask, block, query_tile=side, key_tile=side).visited
