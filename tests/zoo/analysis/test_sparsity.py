"""The tiles a kernel visits, against counting them one pair of tokens at a time."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zoo
from zoo import ops
from zoo.analysis.sparsity import best_tiles, block_tiles, launched_tiles, neighborhood_tiles


def brute_force(keep: torch.Tensor, query_tile: list, key_tile: list) -> tuple[int, int]:
    """Visited and full pairs of tiles of a dense pattern, given the tile of every token."""
    inside: dict[tuple, list[bool]] = {}
    for (i, q), (j, k) in product(enumerate(query_tile), enumerate(key_tile)):
        inside.setdefault((q, k), []).append(bool(keep[i, j]))
    return sum(map(any, inside.values())), sum(map(all, inside.values()))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_neighborhoods_agree_with_counting_pairs_of_tokens(data):
    rank = data.draw(st.integers(1, 2))
    grid = [data.draw(st.integers(4, 12 if rank == 1 else 6)) for _ in range(rank)]
    dilation = [data.draw(st.integers(1, 2)) for _ in range(rank)]
    kernel = [data.draw(st.integers(2, side // d)) for side, d in zip(grid, dilation, strict=True)]
    stride = [data.draw(st.integers(1, k)) for k in kernel]
    causal = [data.draw(st.booleans()) for _ in range(rank)]
    tiles = [[data.draw(st.integers(1, 4)) for _ in range(rank)] for _ in range(2)]
    options = {"dilation": dilation, "stride": stride, "is_causal": causal}
    keys = ops.neighborhood_indices(grid, kernel, **options)
    tokens = math.prod(grid)
    keep = torch.zeros(tokens, tokens + 1, dtype=torch.bool)
    keep.scatter_(1, torch.where(keys < 0, tokens, keys), True)
    keep = keep[:, :-1]
    names = []
    for tile in tiles:
        places = product(*(range(side) for side in grid))
        names.append(
            [tuple((i % d, i // d // t) for i, d, t in zip(p, dilation, tile, strict=True)) for p in places]
        )
    found = neighborhood_tiles(grid, kernel, query_tile=tiles[0], key_tile=tiles[1], **options)
    assert (found.visited, found.full) == brute_force(keep, *names)
    assert found.kept == keep.sum() and found.tokens == tokens**2


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_blocks_agree_with_counting_pairs_of_tokens(data):
    blocks = [data.draw(st.integers(1, 4)) for _ in range(2)]
    lengths = [data.draw(st.integers(1, 12)) for _ in range(2)]
    tiles = [data.draw(st.integers(1, 5)) for _ in range(2)]
    shape = [-(-length // size) for length, size in zip(lengths, blocks, strict=True)]
    bits = data.draw(st.lists(st.booleans(), min_size=math.prod(shape), max_size=math.prod(shape)))
    mask = torch.tensor(bits).view(shape)
    rows, columns = (torch.arange(n) // size for n, size in zip(lengths, blocks, strict=True))
    keep = mask[rows][:, columns]
    names = [[i // tile for i in range(n)] for n, tile in zip(lengths, tiles, strict=True)]
    found = block_tiles(mask, tuple(blocks), query_tile=tiles[0], key_tile=tiles[1], lengths=tuple(lengths))
    assert (found.visited, found.full) == brute_force(keep, *names)
    assert found.kept == keep.sum()


def test_a_window_of_tiles_with_the_stride_of_a_tile_is_block_sparse():
    """A published setting for a video of 30 x 48 x 80 tokens: 18 x 24 x 24 windows in steps of 16 x 8 x 8."""
    video = {"grid": (30, 48, 80), "kernel_size": (18, 24, 24)}
    found = neighborhood_tiles(**video, stride=(16, 8, 8), query_tile=(2, 8, 8), key_tile=(2, 8, 8))
    assert found.speedup == pytest.approx(found.ideal) and found.masked == 0
    assert found.ideal == pytest.approx(30 * 48 * 80 / (18 * 24 * 24))
    plain = neighborhood_tiles(**video, query_tile=(2, 8, 8), key_tile=(2, 8, 8))
    assert plain.speedup < found.speedup and plain.masked > 0


def test_single_tokens_reach_the_ideal_and_one_tile_gains_nothing():
    tokens = neighborhood_tiles((14, 14), 7, query_tile=1, key_tile=1)
    assert tokens.speedup == tokens.ideal == 4.0
    assert neighborhood_tiles((14, 14), 7, query_tile=14, key_tile=14).speedup == 1.0


def test_the_best_tiles_come_first():
    found = best_tiles((32, 32), 7, query_tokens=16, key_tokens=16)
    assert len(found) == 25 and found[0].query_tile == (4, 4)
    assert all(a.speedup >= b.speedup for a, b in zip(found, found[1:], strict=False))


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_sliding_tiles_agree_with_laying_them_one_by_one(data):
    """Along one axis: each query tile's keys in runs from the first it sees, within its dilation group."""
    length, dilation = data.draw(st.integers(6, 40)), data.draw(st.integers(1, 3))
    kernel = data.draw(st.integers(2, length // dilation))
    options = {"dilation": dilation, "stride": data.draw(st.integers(1, kernel))}
    options["is_causal"] = data.draw(st.booleans())
    query_tile, key_tile = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    keys = ops.neighborhood_indices((length,), kernel, **options)
    visited = full = 0
    for group in range(dilation):
        members = range(group, length, dilation)
        for start in range(0, len(members), query_tile):
            queries = members[start : start + query_tile]
            sees = [{int(key) for key in keys[query] if key >= 0} for query in queries]
            seen = sorted(set().union(*sees))
            place = members.index(seen[0])
            while place < len(members) and members[place] <= seen[-1]:
                tile = members[place : place + key_tile]
                visited += 1
                full += all(key in one for key in tile for one in sees)
                place += key_tile
    sides = {"query_tile": query_tile, "key_tile": key_tile}
    found = neighborhood_tiles((length,), kernel, **sides, **options, sliding=True)
    assert (found.visited, found.full) == (visited, full)
    assert found.visited <= neighborhood_tiles((length,), kernel, **sides, **options).visited


BUDGET = json.loads((Path(__file__).parents[2] / "aot" / "budget.json").read_text())["costs"]
MMA = 16 * 8 * 16  # multiply-adds of the tensor-core instruction of sm_80, by a warp
COMPILED = {  # case of the budget: grid and arguments of the operation, width of a head
    "neighborhood 13x30x52, 128 wide": (
        (13, 30, 52),
        {"kernel_size": (5, 7, 7), "is_causal": (True, False, False)},
        128,
    ),
    "neighborhood 56x56, 32 wide, with bias": ((56, 56), {"kernel_size": 7, "biased": True}, 32),
}


@pytest.mark.parametrize("case", COMPILED)
def test_the_bound_holds_in_compiled_instructions(case):
    """The kernel compiled ahead of time computes, in every round of its loop, the tile counted here."""
    pytest.importorskip("triton")
    grid, options, width = COMPILED[case]
    near = BUDGET["sm_80"][f"{case}: forward"]
    count = launched_tiles(grid, **options, architecture="sm_80", width=width)
    tile = math.prod(count.query_tile) * math.prod(count.key_tile)
    assert near["matrix"] * near["warps"] * MMA == tile * 2 * width  # both products of one pair of tiles
    # So what it multiplies altogether is what the simulator says, and never less than what is kept.
    assert count.visited * tile >= count.kept
    assert count.speedup <= count.ideal


def test_a_round_of_a_sparse_loop_is_no_shorter_than_a_dense_one():
    """With the same tile, so that in instructions too the gain stays below the bound."""
    pytest.importorskip("triton")
    grid, options, width = COMPILED["neighborhood 13x30x52, 128 wide"]
    for architecture in ("sm_80", "sm_90", "sm_100"):
        rows = BUDGET[architecture]
        near = rows["neighborhood 13x30x52, 128 wide: forward"]
        dense = rows["blocks of 128, 128 wide: forward"]
        assert near["matrix"] == dense["matrix"] and near["warps"] == dense["warps"]  # the same tile
        count = launched_tiles(grid, **options, architecture=architecture, width=width)
        gain = count.dense * dense["loop"] / (count.visited * near["loop"])
        assert 1 < gain <= count.speedup <= count.ideal


def test_mistakes_say_what_is_right():
    with pytest.raises(zoo.ConfigError, match="query_tile must be a positive number"):
        neighborhood_tiles((8, 8), 3, query_tile=(4, 4, 4), key_tile=4)
    with pytest.raises(zoo.ConfigError, match="mask must be bool"):
        block_tiles(torch.ones(2, 2), 4, query_tile=4, key_tile=4)
    with pytest.raises(zoo.ConfigError, match="2 blocks of 4 do not hold 9 tokens"):
        block_tiles(torch.ones(2, 2, dtype=torch.bool), 4, query_tile=4, key_tile=4, lengths=(9, 8))
