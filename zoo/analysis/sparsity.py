"""How much faster a sparse pattern can be at best when a kernel computes it in whole tiles.

A fused kernel computes every pair of a query tile and a key tile that holds at least one kept pair of tokens,
and skips the others. Counting the tiles bounds the speedup over full attention before any kernel is written;
what a kernel reaches is less by its bookkeeping, and by masks inside tiles that are kept in part. Tests hold
the counts against what this library's own kernels visit, and the bounds against their compiled instructions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo import ops
from zoo.errors import ConfigError, ResourceError

PerAxis = int | Sequence[int]


@dataclass(frozen=True)
class TileCount:
    """What a kernel with these tiles computes of a pattern."""

    query_tile: tuple[int, ...]  # tokens along each axis
    key_tile: tuple[int, ...]
    dense: int  # pairs of tiles, of as many tokens, of full attention
    visited: int  # pairs of tiles with a kept pair of tokens
    full: int  # of these, pairs of tiles where every pair of tokens is kept: no mask is needed
    tokens: int  # pairs of tokens of full attention
    kept: int  # pairs of tokens that the pattern keeps

    @property
    def speedup(self) -> float:
        """The upper bound: full attention in tiles of as many tokens, over what is visited."""
        return self.dense / self.visited if self.visited else math.inf

    @property
    def ideal(self) -> float:
        """The bound for any tiles: pairs of tokens over kept pairs."""
        return self.tokens / self.kept if self.kept else math.inf

    @property
    def masked(self) -> float:
        """Share of the visited tiles that need a mask, 0 to 1; at 0 the pattern is block-sparse in them."""
        return 1 - self.full / self.visited if self.visited else 0.0


def neighborhood_tiles(
    grid: Sequence[int],
    kernel_size: PerAxis,
    *,
    query_tile: PerAxis,
    key_tile: PerAxis,
    dilation: PerAxis = 1,
    stride: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    sliding: bool = False,
) -> TileCount:
    """Count the tiles of neighborhood attention on a grid of one to three axes.

    Tiles are boxes of the grid; with dilation, of the tokens that have the same remainder, which see none of
    the others. A pair of boxes is visited where it is visited along every axis, so each axis is counted alone
    and any grid is quick. Key tiles are cut from the grid once for all, or with `sliding` begin at the first
    key that the query tile sees, as in this library's kernels: then fewer meet.

    Units: everything in tokens; one number stands for every axis.
    Raises: ConfigError for tiles or axes that do not fit; ValueError, as the operation, for its arguments.
    Source: Hassani et al. 2025 (arXiv:2504.16922), where such counts guide the choice of tiles.
    """
    grid = tuple(grid)
    axes = [
        _per_axis(name, value, len(grid))
        for name, value in (
            ("kernel_size", kernel_size),
            ("query_tile", query_tile),
            ("key_tile", key_tile),
            ("dilation", dilation),
            ("stride", stride),
            ("is_causal", is_causal),
        )
    ]
    counts = [_axis(*each, sliding) for each in zip(grid, *axes, strict=True)]
    visited, full, kept = (math.prod(column) for column in zip(*counts, strict=True))
    tokens = math.prod(grid) ** 2
    # Full attention needs neither boxes nor remainders: its tiles are cut from the flat sequence.
    dense = math.prod(-(-math.prod(grid) // math.prod(tile)) for tile in (axes[1], axes[2]))
    return TileCount(axes[1], axes[2], dense, visited, full, tokens, kept)


def launched_tiles(
    grid: Sequence[int],
    kernel_size: PerAxis,
    *,
    architecture: str = "sm_90",
    width: int = 128,
    itemsize: int = 2,
    biased: bool = False,
    dilation: PerAxis = 1,
    stride: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
) -> TileCount:
    """Count the tiles that the Triton kernel of `ops.neighborhood_attention` visits forward on a GPU.

    The shapes of the tiles are those of its launch plan for heads of `width` channels of `itemsize` bytes.
    No GPU is needed. Raises: ResourceError without Triton.
    """
    try:
        from zoo.kernels.neighborhood import triton as kernel
    except ImportError as error:
        raise ResourceError(f"launch plans need Triton: {error}") from error
    from zoo.kernels.configs import choose
    from zoo.kernels.neighborhood.geometry import Axis

    rank = len(tuple(grid))
    options = {"dilation": dilation, "stride": stride, "is_causal": is_causal}
    per_axis = [_per_axis("kernel_size", kernel_size, rank)]
    per_axis += [_per_axis(name, value, rank) for name, value in options.items()]
    axes = tuple(Axis(*each) for each in zip(grid, *per_axis, strict=True))
    config = choose("forward with bias" if biased else "forward", architecture, width, itemsize)
    shape = kernel.tiling_of(axes)(config.queries, config.keys).shape
    sides = {"query_tile": shape[5 - rank : 5], "key_tile": shape[8 - rank : 8]}
    return neighborhood_tiles(grid, kernel_size, **sides, **options, sliding=True)


def block_tiles(
    mask: Tensor,
    block_size: int | tuple[int, int],
    *,
    query_tile: int,
    key_tile: int,
    lengths: tuple[int, int] | None = None,
) -> TileCount:
    """Count the tiles, of any size, of a block-sparse pattern: bool [blocks of queries, blocks of keys].

    Units: `block_size` (queries and keys) and tiles in tokens; `lengths` are the numbers of queries and keys
    where the last block is not whole.
    Raises: ConfigError for a mask that is no matrix of booleans, or sizes that do not fit it.
    """
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ConfigError(
            f"mask must be bool [query blocks, key blocks], found {mask.dtype} {list(mask.shape)}"
        )
    blocks = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    lengths = lengths or tuple(n * size for n, size in zip(mask.shape, blocks, strict=True))
    for count, size, length in zip(mask.shape, blocks, lengths, strict=True):
        if -(-length // size) != count:
            raise ConfigError(f"{count} blocks of {size} do not hold {length} tokens")
    (query_tile,), (key_tile,) = (
        _per_axis(name, tile, 1) for name, tile in (("query_tile", query_tile), ("key_tile", key_tile))
    )
    touched, sizes = [], []
    for length, size, tile in zip(lengths, blocks, (query_tile, key_tile), strict=True):
        token = torch.arange(length)
        held = torch.zeros(-(-length // tile), -(-length // size), dtype=torch.float64)
        touched.append(held.index_put_((token // tile, token // size), torch.ones(1, dtype=torch.float64)))
        sizes.append(torch.bincount(token // size).double())
    mask = mask.cpu().double()
    visited = (touched[0] @ mask @ touched[1].T) > 0
    partial = (touched[0] @ (1 - mask) @ touched[1].T) > 0
    kept = int(sizes[0] @ mask @ sizes[1])
    return TileCount(
        (query_tile,),
        (key_tile,),
        visited.numel(),
        int(visited.sum()),
        int((visited & ~partial).sum()),
        lengths[0] * lengths[1],
        kept,
    )


def best_tiles(
    grid: Sequence[int],
    kernel_size: PerAxis,
    *,
    query_tokens: int = 128,
    key_tokens: int = 128,
    dilation: PerAxis = 1,
    stride: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
) -> list[TileCount]:
    """Every shape of tiles of so many tokens, the highest bound first; of equals, the one with fewer masks.

    Sides of tiles are powers of two where the numbers of tokens are.
    """
    options = {"dilation": dilation, "stride": stride, "is_causal": is_causal}
    found = [
        neighborhood_tiles(grid, kernel_size, query_tile=query, key_tile=key, **options)
        for query in _shapes(query_tokens, len(grid))
        for key in _shapes(key_tokens, len(grid))
    ]
    return sorted(found, key=lambda count: (-count.speedup, count.masked))


def _axis(
    length: int,
    kernel: int,
    query_tile: int,
    key_tile: int,
    dilation: int,
    stride: int,
    is_causal: bool,
    sliding: bool,
) -> tuple[int, int, int]:
    """Visited and full pairs of tiles and kept pairs of tokens along one axis."""
    keys = ops.neighborhood_indices((length,), kernel, dilation=dilation, stride=stride, is_causal=is_causal)
    keep = torch.zeros(length, length + 1, dtype=torch.float64)
    keep.scatter_(1, torch.where(keys < 0, length, keys), 1.0)
    keep = keep[:, :length]
    members = [_tiles(length, tile, dilation) for tile in (query_tile, key_tile)]
    if sliding:
        inside, pairs = _from_first_key(members[0], keep, key_tile, dilation)
    else:
        inside = members[0] @ keep @ members[1].T
        pairs = members[0].sum(1)[:, None] * members[1].sum(1)
    return int((inside > 0).sum()), int((inside == pairs).sum()), int(keep.sum())


def _from_first_key(queries: Tensor, keep: Tensor, key_tile: int, dilation: int) -> tuple[Tensor, Tensor]:
    """Kept and all pairs of tokens of every query tile and its key tiles, laid from the first key it sees."""
    inside, pairs = [], []
    for tile in queries.bool():
        group = int(tile.nonzero()[0]) % dilation
        seen = keep[tile][:, group::dilation].sum(0)  # by how many queries, along the group
        first, last = (int(seen.nonzero()[end]) for end in (0, -1))
        parts = seen[first:].split(key_tile)[: -(-(last + 1 - first) // key_tile)]
        inside += [part.sum() for part in parts]
        pairs += [tile.sum() * len(part) for part in parts]
    return torch.stack(inside), torch.stack(pairs).double()


def _tiles(length: int, tile: int, dilation: int) -> Tensor:
    """Which tokens every tile holds, [tiles, tokens]: tiles are cut from the tokens of one remainder."""
    token = torch.arange(length)
    each = math.ceil(math.ceil(length / dilation) / tile)  # tiles of the longest remainder
    number = token % dilation * each + token // dilation // tile
    members = torch.zeros(dilation * each, length, dtype=torch.float64)
    members[number, token] = 1.0
    return members[members.any(1)]


def _shapes(tokens: int, rank: int) -> Iterator[tuple[int, ...]]:
    """Every way to write a number as a product of `rank` sides."""
    if rank == 1:
        yield (tokens,)
        return
    for side in range(1, tokens + 1):
        if tokens % side == 0:
            for rest in _shapes(tokens // side, rank - 1):
                yield (side, *rest)


def _per_axis(name: str, value: PerAxis | bool | Sequence[bool], rank: int) -> tuple[int, ...]:
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) != rank or (name != "is_causal" and min(values) < 1):
        raise ConfigError(
            f"{name} must be a positive number, or one for each of {rank} axes, found {value!r}"
        )
    return values
