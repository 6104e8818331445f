"""What is compiled: the launchers on CPU tensors, forward and backward, in the shapes models have."""

from __future__ import annotations

import torch

from zoo.kernels.block_sparse import triton as block_sparse
from zoo.kernels.block_sparse.cpu import Lists
from zoo.ops import BlockList


def _inputs(n, heads, dim, dtype, kv_heads=None):
    make = lambda h: torch.zeros(1, n, h, dim, dtype=dtype)  # noqa: E731
    return make(heads), make(kv_heads or heads), make(kv_heads or heads)


def _blocks(dim, size, dtype=torch.bfloat16, segments=False, biased=False, tokens=1024):
    def run():
        q, k, v = _inputs(tokens, 2, dim, dtype)
        if segments:
            blocks = BlockList.from_segments([tokens // 2, tokens // 2], block_size=size)
        else:
            blocks = BlockList.from_mask(
                torch.ones(-(-tokens // size), -(-tokens // size)).bool(), block_size=size
            )
        lists = Lists(blocks.offsets, blocks.indices, size, size, blocks.query_segments, blocks.key_segments)
        bias = torch.zeros(1, 2, tokens, tokens) if biased else None
        out, lse = block_sparse.forward(q, k, v, bias, lists, 0.1)
        inverse = (blocks.inverse_offsets, blocks.inverse_indices)
        block_sparse.backward(out, lse, q, k, v, bias, out, lse, lists, 0.1, biased, *inverse)

    return run


CASES = {
    "blocks of 128, 32 wide": _blocks(32, 128),
    "blocks of 128, 64 wide": _blocks(64, 128),
    "blocks of 128, 128 wide": _blocks(128, 128),
    "blocks of 128, 256 wide": _blocks(256, 128),
    "blocks of 49, 32 wide": _blocks(32, 49, tokens=49 * 49),
    "blocks of 64, 80 wide, float16": _blocks(80, 64, torch.float16),
    "blocks of 64, 64 wide, float32": _blocks(64, 64, torch.float32),
    "segments, 64 wide": _blocks(64, 64, segments=True),
    "blocks of 64 with bias, 64 wide": _blocks(64, 64, biased=True),
}
