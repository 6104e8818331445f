"""Calls of flex_attention and of xformers with heads last, for the operations that offer them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention


def with_flex(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, mask: BlockMask | None = None
) -> tuple[Tensor, Tensor]:
    """Return the output [B, N, Hq, Dv] and the natural-log LSE [B, N, Hq] of q [B, N, Hq, D], k and v.

    On a CPU the compiled form gives no LSE: there it runs uncompiled, over all pairs, which compares
    numbers and no speed.
    Shapes: bias [B or 1, Hq or 1, N, M], added to the logits.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attend = compiled_flex() if q.is_cuda else flex_attention
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        out, more = attend(
            q, k, v, score_mod=None if bias is None else _adds(bias), block_mask=mask, scale=scale,
            enable_gqa=q.shape[1] != k.shape[1], return_aux=AuxRequest(lse=True),
        )  # fmt: skip
    return out.transpose(1, 2), more.lse.transpose(1, 2)


@cache
def compiled_flex() -> Callable[..., Any]:
    """flex_attention through torch.compile, 10 to 60 seconds for each kind of call; without, it computes all
    pairs of tokens, and so it does behind eight kinds (torch._dynamo.config.recompile_limit)."""
    return torch.compile(flex_attention, dynamic=False)


def _adds(bias: Tensor) -> Callable[..., Tensor]:
    per_batch, per_head = (length > 1 for length in bias.shape[:2])

    def add(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[b if per_batch else 0, h if per_head else 0, i, j]

    return add


def with_xformers(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Any = None) -> Tensor:
    """Return the output [B, N, Hq, D]; key heads are repeated where queries share them."""
    shared = q.shape[2] // k.shape[2]
    if shared > 1:
        k, v = (x.repeat_interleave(shared, 2) for x in (k, v))
    return import_module("xformers.ops").memory_efficient_attention(q, k, v, attn_bias=mask, scale=scale)
