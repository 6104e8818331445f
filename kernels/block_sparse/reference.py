"""Block-sparse attention by its definition: all pairs of tokens, those not listed masked."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.block_sparse.blocks import BlockList
from zoo.kernels.softmax import softmax


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the output [B, N, Hq, Dv] and the natural-log LSE [B, N, Hq], in at least float32."""
    shared = q.shape[2] // k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    k, v = (x.repeat_interleave(shared, dim=2) for x in (k, v))
    seen = token_mask(blocks, q.shape[1], k.shape[1])

    logits = scale * torch.einsum("bnhd,bmhd->bhnm", q, k)
    if bias is not None:
        logits = logits + bias.to(dtype)
    weights, lse = softmax(logits.masked_fill(~seen, float("-inf")))
    return torch.einsum("bhnm,bmhd->bnhd", weights, v), lse.transpose(1, 2)


def token_mask(blocks: BlockList, queries: int, keys: int) -> Tensor:
    """Which keys every query sees, bool [b, h, N, M]."""
    mask = blocks.to_mask()
    query_block = torch.arange(queries, device=mask.device) // blocks.query_size
    key_block = torch.arange(keys, device=mask.device) // blocks.key_size
    seen = mask[:, :, query_block][..., key_block]
    if blocks.query_segments is not None:
        seen = seen & (blocks.query_segments[:, None] == blocks.key_segments)
    return seen
