"""Block-sparse attention by flex_attention, and segments by xformers: only where they are named."""

from __future__ import annotations

from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from zoo.kernels.block_sparse.blocks import BlockList
from zoo.kernels.peers import attend

SIZE = 128  # tokens of flex_attention's own blocks; all its kernels take this


def flex(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the output [B, N, Hq, Dv] and the natural-log LSE [B, N, Hq]."""
    return attend.with_flex(q, k, v, scale, bias, block_mask(blocks, q.shape[1], k.shape[1]))


def block_mask(blocks: BlockList, queries: int, keys: int) -> BlockMask:
    """The lists in blocks of flex_attention's size; a block that is listed in part is masked inside."""
    listed = blocks.to_mask()
    found, key_blocks = _coarse(listed, blocks.key_size, keys)
    found, query_blocks = _coarse(found.mT, blocks.query_size, queries)
    found = found.mT
    some, full = found > 0, found == query_blocks[:, None] * key_blocks
    if blocks.query_segments is not None:
        full = torch.zeros_like(full)
    per_batch, per_head = (length > 1 for length in listed.shape[:2])

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        place = i // blocks.query_size, j // blocks.key_size
        seen = listed[b if per_batch else 0, h if per_head else 0, *place]
        if blocks.query_segments is not None:
            seen = seen & (blocks.query_segments[i] == blocks.key_segments[j])
        return seen

    return BlockMask.from_kv_blocks(
        *_rows(some & ~full), *_rows(full), BLOCK_SIZE=SIZE, mask_mod=allowed, seq_lengths=(queries, keys)
    )


def _coarse(counts: Tensor, size: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Along the last axis: sums over the blocks of `size` tokens that touch each block of SIZE, and how many
    those are."""
    starts = torch.arange(0, tokens, SIZE, device=counts.device)
    first, end = starts // size, ((starts + SIZE).clamp(max=tokens) - 1) // size + 1
    sums = F.pad(counts.long().cumsum(-1), (1, 0))
    return sums[..., end] - sums[..., first], end - first


def _rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, and their numbers in front."""
    order = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return mask.sum(-1).int(), order.int()


def xformers(q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, scale: float) -> Tensor:
    """Return the output [B, N, Hq, D] of attention inside segments. It waits for the device: their lengths
    must be known."""
    both = blocks.query_segments.long(), blocks.key_segments.long()
    groups = int(torch.cat(both).max()) + 1
    lengths, key_lengths = (torch.bincount(group, minlength=groups) for group in both)
    # Queries of a group without keys are 0; keys of a group without queries are seen by none.
    some = (lengths > 0) & (key_lengths > 0)
    queries, keys = (some[group].nonzero()[:, 0] for group in both)
    mask = import_module("xformers.ops").fmha.BlockDiagonalMask.from_seqlens(
        *(length[some].tolist() * q.shape[0] for length in (lengths, key_lengths))
    )
    packed = [x[:, kept].flatten(0, 1)[None] for x, kept in ((q, queries), (k, keys), (v, keys))]
    out = attend.with_xformers(*packed, scale, mask)[0].unflatten(0, (q.shape[0], -1))
    return out.new_zeros(q.shape[0], q.shape[1], *out.shape[2:]).index_copy(1, queries, out)
