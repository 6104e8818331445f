"""Block-sparse attention on a CPU: a few query blocks at a time with the keys they list.

Forward and backward walk the same pieces and keep nothing but inputs, output and LSE in between, so memory is
linear in tokens however many blocks are listed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

GATHERED_TOKENS = 4096  # keys gathered at once, over batch and query blocks: they stay in the cache


class Lists(NamedTuple):
    """A `BlockList` without its inverse, as plain arguments."""

    offsets: Tensor
    indices: Tensor
    query_size: int
    key_size: int
    query_segments: Tensor | None
    key_segments: Tensor | None


class Piece(NamedTuple):
    """Query blocks that list the same number of key blocks: P blocks of t queries and s keys each."""

    batch: slice
    heads: slice  # query heads
    kv_heads: slice
    queries: Tensor  # [P * t] tokens
    keys: Tensor  # [P * s]
    seen: Tensor  # [P, t, s]
    real: Tensor  # [P, t] False past the end, where the last token stands in


def _pieces(q: Tensor, k: Tensor, lists: Lists) -> Iterator[Piece]:
    batch, queries, heads, _ = q.shape
    keys, shared = k.shape[1], q.shape[2] // k.shape[2]
    per_batch, per_head = lists.offsets.shape[:2]
    within_query, within_key = (
        torch.arange(size, device=q.device) for size in (lists.query_size, lists.key_size)
    )
    for b in range(per_batch if batch else 0):
        for h in range(per_head):
            images = slice(None) if per_batch == 1 else slice(b, b + 1)
            some = slice(None) if per_head == 1 else slice(h, h + 1)
            kv = slice(None) if per_head == 1 else slice(h // shared, h // shared + 1)
            offsets, indices = lists.offsets[b, h].long(), lists.indices[b, h].long()
            counts = offsets.diff()
            for count in counts.unique().tolist():
                if count == 0:
                    continue
                tokens = count * lists.key_size * (batch if per_batch == 1 else 1)
                for rows in (counts == count).nonzero()[:, 0].split(max(1, GATHERED_TOKENS // tokens)):
                    listed = torch.arange(count, device=q.device)
                    column = indices[offsets[rows, None] + listed]  # [P, count]
                    key = (column[..., None] * lists.key_size + within_key).flatten(1)  # [P, s]
                    query = rows[:, None] * lists.query_size + within_query  # [P, t]
                    real, there = query < queries, key < keys
                    query, key = query.clamp(max=queries - 1), key.clamp(max=keys - 1)
                    seen = there[:, None].expand(-1, query.shape[1], -1)
                    if lists.query_segments is not None:
                        seen = seen & (
                            lists.query_segments[query][..., None] == lists.key_segments[key][:, None]
                        )
                    yield Piece(images, some, kv, query.flatten(), key.flatten(), seen, real)


def _take(x: Tensor, batch: slice, heads: slice, tokens: Tensor, parts: int) -> Tensor:
    """[B, N, H, D] to [B, P, H, t, D] in at least float32."""
    x = x[batch, :, heads]
    rows = x.index_select(1, tokens).unflatten(1, (parts, tokens.numel() // parts))
    return rows.transpose(2, 3).to(torch.promote_types(x.dtype, torch.float32))


def _logits(q: Tensor, k: Tensor, bias: Tensor | None, piece: Piece, scale: float) -> Tensor:
    """[B, P, Hkv, G, t, s]: query heads beside the key head that they share."""
    parts = len(piece.seen)
    queries = _take(q, piece.batch, piece.heads, piece.queries, parts)
    keys = _take(k, piece.batch, piece.kv_heads, piece.keys, parts)
    queries = queries.unflatten(2, (keys.shape[2], -1))
    logits = (queries * scale) @ keys.unsqueeze(3).transpose(-1, -2)
    if bias is not None:
        logits = logits + _bias_of(bias, piece).to(logits.dtype).unflatten(2, (keys.shape[2], -1))
    return logits.masked_fill(~piece.seen[:, None, None], float("-inf"))


def _bias_of(bias: Tensor, piece: Piece) -> Tensor:
    """[B, H, N, M] to [B, P, H, t, s]; `bias` is expanded to all images and heads."""
    query, key = _pairs(piece)
    return bias[piece.batch, piece.heads][:, :, query, key].movedim(1, 2)


def _pairs(piece: Piece) -> tuple[Tensor, Tensor]:
    parts = len(piece.seen)
    return piece.queries.view(parts, -1, 1), piece.keys.view(parts, 1, -1)


def _put(into: Tensor, piece: Piece, value: Tensor) -> None:
    """Write [B, P, H, t, ..] to the real tokens of [B, N, H, ..]."""
    real = piece.real.flatten()
    value = value.transpose(2, 3).flatten(1, 2)[:, real]
    into[piece.batch, :, piece.heads].index_copy_(1, piece.queries[real], value.to(into.dtype))


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lists: Lists, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output [B, N, Hq, Dv] in q's dtype and the natural-log LSE [B, N, Hq]."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=dtype)
    bias = _expand(bias, q)
    for piece in _pieces(q, k, lists):
        logits = _logits(q, k, bias, piece, scale)
        most = logits.amax(dim=-1, keepdim=True)
        most = most.masked_fill(most == float("-inf"), 0.0)
        weights = (logits - most).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        values = _take(v, piece.batch, piece.kv_heads, piece.keys, len(piece.seen)).unsqueeze(3)
        part = (weights @ values) / total.masked_fill(total == 0, 1.0)
        _put(out, piece, part.flatten(2, 3))
        _put(lse, piece, (most + total.log()).squeeze(-1).flatten(2, 3))
    return out, lse


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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k, v and, with `bias_grad`, of the bias; softmax is computed again."""
    dtype = lse.dtype
    delta = (out.to(dtype) * grad_out.to(dtype)).sum(dim=-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    dq, dk, dv = (x.new_zeros(x.shape, dtype=dtype) for x in (q, k, v))
    wide = _expand(bias, q)
    dbias = bias.new_zeros(bias.shape, dtype=dtype) if bias_grad else None
    filled = lse.masked_fill(lse == float("-inf"), 0.0)
    for piece in _pieces(q, k, lists):
        parts, kv = len(piece.seen), k[:, :, piece.kv_heads].shape[2]
        rows = (piece.batch, piece.heads, piece.queries, parts)
        keys, values = (_take(x, piece.batch, piece.kv_heads, piece.keys, parts).unsqueeze(3) for x in (k, v))
        queries, grads = (_take(x, *rows).unflatten(2, (kv, -1)) for x in (q, grad_out))
        norm, offset = (_take(x[..., None], *rows).unflatten(2, (kv, -1)) for x in (filled, delta))
        weights = (_logits(q, k, wide, piece, scale) - norm).exp_()
        weights = weights * piece.real[:, None, None, :, None]
        dlogits = weights * (grads @ values.transpose(-1, -2) - offset)
        _put(dq, piece, (dlogits @ keys).flatten(2, 3) * scale)
        for gradient, part in (
            (dv, (weights.transpose(-1, -2) @ grads).sum(dim=3)),
            (dk, (dlogits.transpose(-1, -2) @ queries).sum(dim=3) * scale),
        ):
            part = part.transpose(2, 3).flatten(1, 2)  # [B, P * s, Hkv, D]
            gradient[piece.batch, :, piece.kv_heads].index_add_(1, piece.keys, part)
        if dbias is not None:
            part = dlogits.flatten(2, 3).movedim(1, 2)  # [B, H, P, t, s]
            for axis, every in ((0, piece.batch), (1, piece.heads)):
                if bias.shape[axis] == 1 and every == slice(None):
                    part = part.sum(dim=axis, keepdim=True)
            chosen = dbias[piece.batch if bias.shape[0] > 1 else slice(None)]
            chosen = chosen[:, piece.heads if bias.shape[1] > 1 else slice(None)]
            real = piece.seen & piece.real[..., None]
            query, key = (x.expand_as(real)[real] for x in _pairs(piece))
            chosen[:, :, query, key] += part[..., real]
    dbias = None if dbias is None else dbias.to(bias.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias


def _expand(bias: Tensor | None, q: Tensor) -> Tensor | None:
    return None if bias is None else bias.expand(q.shape[0], q.shape[2], -1, -1)
