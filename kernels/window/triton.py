"""Window attention in Triton: a whole window in registers, read where it lies in the map.

A program owns a head and goes through a fixed share of the windows of all images, so that the bias is read
once and its gradient is summed in registers, in a fixed order. Windows that a shift cuts at the borders are
windows with tokens missing: nothing is rolled, masked or copied. Kept for backward: output and LSE.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.configs import Config
from zoo.kernels.tile import launch
from zoo.kernels.tile.kernels import LN_2, LOG2_E

PROGRAMS = 2048  # that share the windows: enough for any GPU
SUMS = 512  # of them where each keeps a gradient of the bias


@triton.jit
def _window(i, across, first_y, first_x, rows, columns, WY: tl.constexpr, WX: tl.constexpr, T: tl.constexpr):
    """Row and column of the tokens of the i-th window, and which of them exist."""
    o = tl.arange(0, T)
    y = i // across * WY - first_y + o // WX
    x = i % across * WX - first_x + o % WX
    return y, x, (o < WY * WX) & (y >= 0) & (y < rows) & (x >= 0) & (x < columns)


@triton.jit
def _rows(p, stride_y, stride_x, y, x, m, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Tokens of a window as rows, zero where there is nothing. [T, PADDED]"""
    o_d = tl.arange(0, PADDED)
    o = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    return tl.load(p + o[:, None] + o_d[None, :], mask=m[:, None] & (o_d < WIDTH)[None, :], other=0.0)


@triton.jit
def _whole_rows(o, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Where rows lie in a tensor of our own, where they follow each other. [T, PADDED]"""
    o_d = tl.arange(0, PADDED)
    return o[:, None] * WIDTH + o_d[None, :]


@triton.jit
def _exist(m, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    return m[:, None] & (tl.arange(0, PADDED) < WIDTH)[None, :]


@triton.jit
def _places(T: tl.constexpr):
    """Where pairs of tokens stand in a table of T * T."""
    return tl.arange(0, T)[:, None] * T + tl.arange(0, T)[None, :]


@triton.jit
def window_forward_kernel(
    p_q, p_k, p_v, p_o, p_lse, p_bias, scale_2, rest_2, work, splits, heads, shared, windows, across,
    first_y, first_x, rows, columns, q_b, q_y, q_x, q_h, k_b, k_y, k_x, k_h, v_b, v_y, v_x, v_h,
    WY: tl.constexpr, WX: tl.constexpr, T: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PD: tl.constexpr, PDV: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_split = tl.program_id(0) // heads
    i_h = (tl.program_id(0) % heads).to(tl.int64)
    scale = tl.full([1, 1], scale_2, ACC) + tl.full([1, 1], rest_2, ACC)
    if p_bias is not None:
        b_bias = tl.load(p_bias + i_h * T * T + _places(T))
    for r in range(i_split, work, splits):
        i_b = (r // windows).to(tl.int64)
        y, x, m = _window(r % windows, across, first_y, first_x, rows, columns, WY, WX, T)
        b_q = _rows(p_q + i_b * q_b + i_h * q_h, q_y, q_x, y, x, m, D, PD)
        b_k = _rows(p_k + i_b * k_b + i_h // shared * k_h, k_y, k_x, y, x, m, D, PD)
        # [T, T]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PREC, out_dtype=ACC) * scale
        if p_bias is not None:
            b_s += b_bias
        b_s = tl.where(m[None, :], b_s, float("-inf"))
        # Finite, so that a row from which the bias hides everything does not become inf - inf.
        b_max = tl.maximum(tl.max(b_s, 1), -1e30)
        b_p = tl.exp2(b_s - b_max[:, None])
        b_sum = tl.sum(b_p, 1)
        unseen = b_sum == 0.0
        b_lse = (b_max * tl.full([1], LN_2, ACC)) + tl.log(tl.where(unseen, 1.0, b_sum))
        b_v = _rows(p_v + i_b * v_b + i_h // shared * v_h, v_y, v_x, y, x, m, DV, PDV)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PREC, out_dtype=ACC)
        b_o = b_o / tl.where(unseen, 1.0, b_sum)[:, None]
        o = ((i_b * rows + y) * columns + x) * heads + i_h
        b_o = b_o.to(p_o.dtype.element_ty)
        tl.store(p_o + _whole_rows(o, DV, PDV), b_o, mask=_exist(m, DV, PDV))
        tl.store(p_lse + o, tl.where(unseen, float("-inf"), b_lse), mask=m)


@triton.jit
def window_backward_kernel(
    p_q, p_k, p_v, p_o, p_do, p_dq, p_dk, p_dv, p_lse, p_dlse, p_bias, p_dbias, scale_2, rest_2, scale_1,
    rest_1, work, splits, heads, shared, windows, across, first_y, first_x, rows, columns,
    q_b, q_y, q_x, q_h, k_b, k_y, k_x, k_h, v_b, v_y, v_x, v_h, do_b, do_y, do_x, do_h,
    dlse_b, dlse_y, dlse_x, dlse_h,
    WY: tl.constexpr, WX: tl.constexpr, T: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PD: tl.constexpr, PDV: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_split = tl.program_id(0) // heads
    i_h = (tl.program_id(0) % heads).to(tl.int64)
    scale = tl.full([1, 1], scale_2, ACC) + tl.full([1, 1], rest_2, ACC)
    scale_of_grads = tl.full([1, 1], scale_1, ACC) + tl.full([1, 1], rest_1, ACC)
    if p_dbias is not None:
        b_dbias = tl.zeros([T, T], ACC)
    for r in range(i_split, work, splits):
        i_b = (r // windows).to(tl.int64)
        y, x, m = _window(r % windows, across, first_y, first_x, rows, columns, WY, WX, T)
        b_q = _rows(p_q + i_b * q_b + i_h * q_h, q_y, q_x, y, x, m, D, PD)
        b_k = _rows(p_k + i_b * k_b + i_h // shared * k_h, k_y, k_x, y, x, m, D, PD)
        b_do = _rows(p_do + i_b * do_b + i_h * do_h, do_y, do_x, y, x, m, DV, PDV)
        o = ((i_b * rows + y) * columns + x) * heads + i_h
        m_d, m_dv = _exist(m, D, PD), _exist(m, DV, PDV)
        b_o = tl.load(p_o + _whole_rows(o, DV, PDV), mask=m_dv, other=0.0)
        b_delta = tl.sum(b_o.to(ACC) * b_do.to(ACC), 1)
        if p_dlse is not None:
            o_dlse = y.to(tl.int64) * dlse_y + x.to(tl.int64) * dlse_x
            b_delta -= tl.load(p_dlse + i_b * dlse_b + i_h * dlse_h + o_dlse, mask=m, other=0.0).to(ACC)
        b_lse = tl.load(p_lse + o, mask=m, other=0.0)
        # A row that saw nothing has no logit that is not hidden, so any finite number will do.
        b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse * tl.full([1], LOG2_E, ACC))
        # [T, T]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PREC, out_dtype=ACC) * scale
        if p_bias is not None:
            b_s += tl.load(p_bias + i_h * T * T + _places(T))
        b_p = tl.exp2(tl.where(m[:, None] & m[None, :], b_s, float("-inf")) - b_lse[:, None])
        b_dv = tl.dot(tl.trans(b_p.to(b_do.dtype)), b_do, input_precision=PREC, out_dtype=ACC)
        tl.store(p_dv + _whole_rows(o, DV, PDV), b_dv.to(p_dv.dtype.element_ty), mask=m_dv)
        b_v = _rows(p_v + i_b * v_b + i_h // shared * v_h, v_y, v_x, y, x, m, DV, PDV)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PREC, out_dtype=ACC)
        b_ds = b_p * (b_dp - b_delta[:, None])
        if p_dbias is not None:
            b_dbias += b_ds
        b_ds = b_ds.to(b_k.dtype)
        b_dq = tl.dot(b_ds, b_k, input_precision=PREC, out_dtype=ACC) * scale_of_grads
        tl.store(p_dq + _whole_rows(o, D, PD), b_dq.to(p_dq.dtype.element_ty), mask=m_d)
        b_dk = tl.dot(tl.trans(b_ds), b_q, input_precision=PREC, out_dtype=ACC) * scale_of_grads
        tl.store(p_dk + _whole_rows(o, D, PD), b_dk.to(p_dk.dtype.element_ty), mask=m_d)
    if p_dbias is not None:
        tl.store(p_dbias + (i_split * heads + i_h) * T * T + _places(T), b_dbias)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output [B, Y, X, H, Dv] in q's dtype and the natural-log LSE [B, Y, X, H]."""
    q, k, v = (launch.dense_rows(x) for x in (q, k, v))
    out = q.new_empty(*q.shape[:4], v.shape[-1])
    lse = q.new_empty(q.shape[:4], dtype=torch.promote_types(q.dtype, torch.float32))
    splits, *geometry = _geometry(q, k, window_size, shift, PROGRAMS)
    launch.launch(
        window_forward_kernel, splits * q.shape[3], config(q, v, window_size), q,
        q, k, v, out, lse, _whole(bias, lse, window_size), *launch.exact(scale * launch.LOG2_E), *geometry,
        *q.stride()[:4], *k.stride()[:4], *v.stride()[:4],
        WY=window_size[0], WX=window_size[1], T=_tile(window_size), **launch.constants(q, v),
    )  # fmt: skip
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
    window_size: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
    bias_grad: bool,
) -> list[Tensor]:
    """Return the gradients of q, k, v and, with `bias_grad`, of the bias."""
    q, k, v, grad_out = (launch.dense_rows(x) for x in (q, k, v, grad_out))
    heads, shared = q.shape[3], q.shape[3] // k.shape[3]
    dq = q.new_empty(q.shape)
    # Query heads that share keys write their own gradients, which are added at the end.
    dk, dv = (
        x.new_empty(*q.shape[:4], x.shape[-1], dtype=lse.dtype if shared > 1 else x.dtype) for x in (k, v)
    )
    splits, *geometry = _geometry(q, k, window_size, shift, SUMS if bias_grad else PROGRAMS)
    tile = _tile(window_size)
    sums = lse.new_empty(splits, heads, tile, tile) if bias_grad else None
    launch.launch(
        window_backward_kernel, splits * heads, config(q, v, window_size, backward=True), q,
        q, k, v, out, grad_out, dq, dk, dv, lse, grad_lse, _whole(bias, lse, window_size), sums,
        *launch.exact(scale * launch.LOG2_E), *launch.exact(scale), *geometry, *q.stride()[:4],
        *k.stride()[:4], *v.stride()[:4], *grad_out.stride()[:4],
        *((0, 0, 0, 0) if grad_lse is None else grad_lse.stride()), WY=window_size[0], WX=window_size[1],
        T=_tile(window_size), **launch.constants(q, v),
    )  # fmt: skip
    if shared > 1:
        dk, dv = (x.unflatten(3, (-1, shared)).sum(4).to(like.dtype) for x, like in ((dk, k), (dv, v)))
    if sums is None:
        return [dq, dk, dv]
    tokens = bias.shape[-1]
    # In rows of its own: what a compiled graph was promised.
    return [dq, dk, dv, sums.sum(0)[:, :tokens, :tokens].to(bias.dtype).contiguous()]


def config(q: Tensor, v: Tensor, window_size: tuple[int, int], *, backward: bool = False) -> Config:
    """How a window is computed: its size leaves no choice but that of the warps."""
    tile = _tile(window_size)
    row = max(q.shape[-1], v.shape[-1]) * q.element_size()
    # Chosen by compiling: with fewer warps the backward kernel spills.
    return Config(tile, tile, 8 if backward and row > 64 else 4, 1)


def _tile(window_size: tuple[int, int]) -> int:
    return launch.tile_size(64, window_size[0] * window_size[1])


def _geometry(
    q: Tensor, k: Tensor, window_size: tuple[int, int], shift: tuple[int, int], programs: int
) -> tuple[int, ...]:
    """How many programs share the windows of a head, then what the kernels take: (windows of all images,
    those programs, heads, heads that share keys, windows, windows in a row, tokens that the first window
    lacks at both axes, rows and columns of the map)."""
    batch, rows, columns, heads = q.shape[:4]
    down, across = (
        length // window + (by > 0)
        for length, window, by in zip((rows, columns), window_size, shift, strict=True)
    )
    first = ((window - by) % window for window, by in zip(window_size, shift, strict=True))
    work = batch * down * across
    splits = min(work, max(1, programs // heads))
    return (
        splits, work, splits, heads, heads // k.shape[3], down * across, across, *first, rows, columns,
    )  # fmt: skip


def _whole(bias: Tensor | None, sums: Tensor, window_size: tuple[int, int]) -> Tensor | None:
    """The bias in base 2 as a table of whole tiles, so that a program reads it in long runs."""
    if bias is None:
        return None
    missing = _tile(window_size) - bias.shape[-1]
    return F.pad(bias.to(sums.dtype) * launch.LOG2_E, (0, missing, 0, missing)).contiguous()
