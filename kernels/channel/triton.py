"""Channel attention in Triton: two passes over the tokens, a map of channels in registers.

The first pass multiplies tokens with tokens, a program for each share of the tokens of an image and head. In
the second each program adds the shares in their order, takes the softmax, and owns a tile of tokens. The
backward pass has the same two steps, with the gradient of the weights in place of the logits. Kept for
backward: the weights, [B, H, D, E].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.configs import Config
from zoo.kernels.tile import launch

PROGRAMS = 512  # that share the first pass
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tokens(p, stride_n, o, m, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Tokens of an image and head as rows, zero where there is nothing. [T, PADDED]"""
    o_d = tl.arange(0, PADDED)
    mask = m[:, None] & (o_d < WIDTH)[None, :]
    return tl.load(p + o.to(tl.int64)[:, None] * stride_n + o_d[None, :], mask=mask, other=0.0)


@triton.jit
def _put_tokens(p, stride_n, o, m, value, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    o_d = tl.arange(0, PADDED)
    mask = m[:, None] & (o_d < WIDTH)[None, :]
    tl.store(p + o.to(tl.int64)[:, None] * stride_n + o_d[None, :], value.to(p.dtype.element_ty), mask=mask)


@triton.jit
def _map(p, D: tl.constexpr, E: tl.constexpr, PD: tl.constexpr, PE: tl.constexpr):
    """Where a map of channels lies and what of it exists. [PD, PE]"""
    o_d, o_e = tl.arange(0, PD), tl.arange(0, PE)
    return p + o_d[:, None] * E + o_e[None, :], (o_d < D)[:, None] & (o_e < E)[None, :]


@triton.jit
def _total(p_shares, i_bh, splits, D: tl.constexpr, E: tl.constexpr, PD: tl.constexpr, PE: tl.constexpr,
           ACC: tl.constexpr):  # fmt: skip
    """The shares of a map, added in their order. [PD, PE]"""
    b_map = tl.zeros([PD, PE], ACC)
    for s in range(0, splits):
        p, m = _map(p_shares + (i_bh * splits + s) * (D * E), D, E, PD, PE)
        b_map += tl.load(p, mask=m, other=0.0)
    return b_map


@triton.jit
def channel_products_kernel(
    p_x, p_y, p_shares, tokens, share, splits, heads, x_b, x_n, x_h, y_b, y_n, y_h,
    T: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PDV: tl.constexpr,
    PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums over a share of the tokens of x_d y_e."""
    i_split = tl.program_id(0) % splits
    i_bh = (tl.program_id(0) // splits).to(tl.int64)
    p_x += i_bh // heads * x_b + i_bh % heads * x_h
    p_y += i_bh // heads * y_b + i_bh % heads * y_h
    b_map = tl.zeros([PD, PDV], ACC)
    for t in range(0, tl.cdiv(share, T)):
        o = i_split * share + t * T + tl.arange(0, T)
        m = (o < tokens) & (o < (i_split + 1) * share)
        b_x = _tokens(p_x, x_n, o, m, D, PD)
        b_y = _tokens(p_y, y_n, o, m, DV, PDV)
        b_map = tl.dot(tl.trans(b_x), b_y, b_map, input_precision=PREC, out_dtype=ACC)
    p, m = _map(p_shares + (i_bh * splits + i_split) * (D * DV), D, DV, PD, PDV)
    tl.store(p, b_map, mask=m)


@triton.jit
def channel_forward_kernel(
    p_v, p_o, p_shares, p_weights, scale_2, rest_2, tokens, tiles, splits, heads,
    v_b, v_n, v_h, o_b, o_n, o_h,
    T: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PDV: tl.constexpr,
    PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Softmax over the channels of k, then the weights times v for a tile of tokens."""
    i_tile = tl.program_id(0) % tiles
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    scale = tl.full([1, 1], scale_2, ACC) + tl.full([1, 1], rest_2, ACC)
    b_s = _total(p_shares, i_bh, splits, D, DV, PD, PDV, ACC) * scale
    b_s = tl.where((tl.arange(0, PDV) < DV)[None, :], b_s, float("-inf"))
    b_w = tl.exp2(b_s - tl.max(b_s, 1)[:, None])
    b_w = b_w / tl.sum(b_w, 1)[:, None]
    if i_tile == 0:
        p, m = _map(p_weights + i_bh * (D * DV), D, DV, PD, PDV)
        tl.store(p, b_w, mask=m)
    o = i_tile * T + tl.arange(0, T)
    b_v = _tokens(p_v + i_bh // heads * v_b + i_bh % heads * v_h, v_n, o, o < tokens, DV, PDV)
    b_o = tl.dot(b_v, tl.trans(b_w.to(b_v.dtype)), input_precision=PREC, out_dtype=ACC)
    _put_tokens(p_o + i_bh // heads * o_b + i_bh % heads * o_h, o_n, o, o < tokens, b_o, D, PD)


@triton.jit
def channel_backward_kernel(
    p_q, p_k, p_do, p_dq, p_dk, p_dv, p_shares, p_weights, scale_1, rest_1, tokens, tiles, splits, heads,
    q_b, q_n, q_h, k_b, k_n, k_h, do_b, do_n, do_h, dq_b, dq_n, dq_h, dk_b, dk_n, dk_h,
    T: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PDV: tl.constexpr,
    PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of tokens; dk and dv lie alike."""
    i_tile = tl.program_id(0) % tiles
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    o = i_tile * T + tl.arange(0, T)
    m = o < tokens
    p, m_map = _map(p_weights + i_bh * (D * DV), D, DV, PD, PDV)
    b_w = tl.load(p, mask=m_map, other=0.0)
    b_do = _tokens(p_do + i_b * do_b + i_h * do_h, do_n, o, m, D, PD)
    b_dv = tl.dot(b_do, b_w.to(b_do.dtype), input_precision=PREC, out_dtype=ACC)
    _put_tokens(p_dv + i_b * dk_b + i_h * dk_h, dk_n, o, m, b_dv, DV, PDV)
    b_dw = _total(p_shares, i_bh, splits, D, DV, PD, PDV, ACC)
    b_ds = b_w * (b_dw - tl.sum(b_w * b_dw, 1)[:, None])
    b_ds = b_ds * (tl.full([1, 1], scale_1, ACC) + tl.full([1, 1], rest_1, ACC))
    b_k = _tokens(p_k + i_b * k_b + i_h * k_h, k_n, o, m, DV, PDV)
    b_ds = b_ds.to(b_k.dtype)
    b_dq = tl.dot(b_k, tl.trans(b_ds), input_precision=PREC, out_dtype=ACC)
    _put_tokens(p_dq + i_b * dq_b + i_h * dq_h, dq_n, o, m, b_dq, D, PD)
    b_q = _tokens(p_q + i_b * q_b + i_h * q_h, q_n, o, m, D, PD)
    b_dk = tl.dot(b_q, b_ds, input_precision=PREC, out_dtype=ACC)
    _put_tokens(p_dk + i_b * dk_b + i_h * dk_h, dk_n, o, m, b_dk, DV, PDV)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output [B, N, H, D] in q's dtype and the weights [B, H, D, E]."""
    q, k, v = (launch.dense_rows(x) for x in (q, k, v))
    batch, tokens, heads, width = q.shape
    out = q.new_empty(q.shape)
    sums = torch.promote_types(q.dtype, torch.float32)
    weights = q.new_empty(batch, heads, width, k.shape[-1], dtype=sums)
    shares = _products(q, k)
    chosen = config(q, k)
    tiles = max(1, -(-tokens // chosen.queries))  # the weights are wanted where there is no token, too
    launch.launch(
        channel_forward_kernel, tiles * batch * heads, chosen, q,
        v, out, shares, weights, *launch.exact(scale * launch.LOG2_E), tokens, tiles, shares.shape[2], heads,
        *v.stride()[:3], *out.stride()[:3], T=chosen.queries, **launch.constants(q, v),
    )  # fmt: skip
    return out, weights


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    q, k, v, grad_out = (launch.dense_rows(x) for x in (q, k, v, grad_out))
    batch, tokens, heads, _ = q.shape
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    shares = _products(grad_out, v)
    chosen = config(q, k)
    tiles = -(-tokens // chosen.queries)
    launch.launch(
        channel_backward_kernel, tiles * batch * heads, chosen, q,
        q, k, grad_out, dq, dk, dv, shares, weights, *launch.exact(scale), tokens, tiles, shares.shape[2],
        heads, *q.stride()[:3], *k.stride()[:3], *grad_out.stride()[:3], *dq.stride()[:3], *dk.stride()[:3],
        T=chosen.queries, **launch.constants(q, k),
    )  # fmt: skip
    return dq, dk, dv


def config(q: Tensor, k: Tensor) -> Config:
    """Tokens of a tile and warps: what the map of channels leaves room for."""
    wide = max(q.shape[-1], k.shape[-1]) > 64
    tokens = 128 >> (wide + (q.element_size() > 2))
    return Config(launch.tile_size(tokens, q.shape[1]), 0, 8 if wide else 4, 2)


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Sums over the tokens of x_d y_e, in shares: [B, H, splits, D, E]."""
    batch, tokens, heads, _ = x.shape
    chosen = config(x, y)
    share, splits = launch.shares(tokens, chosen.queries, PROGRAMS // max(1, batch * heads))
    sums = torch.promote_types(x.dtype, torch.float32)
    shares = x.new_empty(batch, heads, splits, x.shape[-1], y.shape[-1], dtype=sums)
    launch.launch(
        channel_products_kernel, splits * batch * heads, chosen, x,
        x, y, shares, tokens, share, splits, heads, *x.stride()[:3], *y.stride()[:3], T=chosen.queries,
        **launch.constants(x, y),
    )  # fmt: skip
    return shares
