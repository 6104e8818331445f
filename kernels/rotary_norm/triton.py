"""Norm and rotary positions in Triton: a program owns some heads of some tokens and reads them once.

Backward, the gradient is turned back, the norm is computed again from the heads themselves, and a program
adds up the gradient of the weight over its share; the shares are added afterwards. Nothing is atomic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.configs import Config
from zoo.kernels.tile import launch

PROGRAMS = 1024  # that share the backward pass


@triton.jit
def _turned(b_x, p_cos, p_sin, o_n, m_n, sign, WIDTH: tl.constexpr, T: tl.constexpr, PADDED: tl.constexpr):
    """Pairs of channels, turned by the angles of their tokens times `sign`. [T, PADDED]"""
    o_p = tl.arange(0, PADDED // 2)
    m = m_n[:, None] & (o_p < WIDTH // 2)[None, :]
    o = o_n.to(tl.int64)[:, None] * (WIDTH // 2) + o_p[None, :]
    b_cos = tl.load(p_cos + o, mask=m, other=0.0).to(b_x.dtype)
    b_sin = tl.load(p_sin + o, mask=m, other=0.0).to(b_x.dtype) * sign
    b_first, b_second = tl.split(tl.reshape(b_x, [T, PADDED // 2, 2]))
    b_pairs = tl.join(b_first * b_cos - b_second * b_sin, b_first * b_sin + b_second * b_cos)
    return tl.reshape(b_pairs, [T, PADDED])


@triton.jit
def _inverse(b_x, eps_1, rest_1, WIDTH: tl.constexpr):
    """One over the root of the mean square of every head. [T, 1]"""
    eps = tl.full([1, 1], eps_1, b_x.dtype) + tl.full([1, 1], rest_1, b_x.dtype)
    return 1.0 / tl.sqrt(tl.sum(b_x * b_x, 1)[:, None] / WIDTH + eps)


@triton.jit
def rotary_norm_kernel(
    p_x, p_weight, p_cos, p_sin, p_o, eps_1, rest_1, rows, tiles, heads, x_b, x_n, x_h, o_b, o_n, o_h,
    T: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, NORMED: tl.constexpr, TURNED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o = tl.program_id(0) % tiles * T + tl.arange(0, T)
    m_n = o < rows
    i_n, i_h = (o // heads).to(tl.int64)[:, None], (o % heads).to(tl.int64)[:, None]
    o_d = tl.arange(0, PADDED)
    m = m_n[:, None] & (o_d < WIDTH)[None, :]
    # [T, PADDED]
    b_x = tl.load(p_x + i_b * x_b + i_n * x_n + i_h * x_h + o_d[None, :], mask=m, other=0.0).to(ACC)
    if NORMED:
        b_weight = tl.load(p_weight + o_d, mask=o_d < WIDTH, other=0.0).to(ACC)
        b_x = b_x * _inverse(b_x, eps_1, rest_1, WIDTH) * b_weight[None, :]
    if TURNED:
        b_x = _turned(b_x, p_cos, p_sin, o // heads, m_n, 1.0, WIDTH, T, PADDED)
    p = p_o + i_b * o_b + i_n * o_n + i_h * o_h + o_d[None, :]
    tl.store(p, b_x.to(p_o.dtype.element_ty), mask=m)


@triton.jit
def drotary_norm_kernel(
    p_x, p_weight, p_cos, p_sin, p_do, p_dx, p_shares, eps_1, rest_1, rows, share, splits, heads,
    x_b, x_n, x_h, do_b, do_n, do_h, dx_b, dx_n, dx_h,
    T: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, NORMED: tl.constexpr, TURNED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    i_split = tl.program_id(0) % splits
    i_b = (tl.program_id(0) // splits).to(tl.int64)
    o_d = tl.arange(0, PADDED)
    b_dweight = tl.zeros([T, PADDED], ACC)
    for t in range(0, tl.cdiv(share, T)):
        o = i_split * share + t * T + tl.arange(0, T)
        m_n = (o < rows) & (o < (i_split + 1) * share)
        i_n, i_h = (o // heads).to(tl.int64)[:, None], (o % heads).to(tl.int64)[:, None]
        m = m_n[:, None] & (o_d < WIDTH)[None, :]
        # [T, PADDED]
        p = p_do + i_b * do_b + i_n * do_n + i_h * do_h + o_d[None, :]
        b_dx = tl.load(p, mask=m, other=0.0).to(ACC)
        if TURNED:
            b_dx = _turned(b_dx, p_cos, p_sin, o // heads, m_n, -1.0, WIDTH, T, PADDED)
        if NORMED:
            p = p_x + i_b * x_b + i_n * x_n + i_h * x_h + o_d[None, :]
            b_x = tl.load(p, mask=m, other=0.0).to(ACC)
            b_inverse = _inverse(b_x, eps_1, rest_1, WIDTH)
            b_y = b_x * b_inverse
            b_dweight += b_dx * b_y
            b_dx = b_dx * tl.load(p_weight + o_d, mask=o_d < WIDTH, other=0.0).to(ACC)[None, :]
            b_dx = b_inverse * (b_dx - b_y * (tl.sum(b_dx * b_y, 1) / WIDTH)[:, None])
        p = p_dx + i_b * dx_b + i_n * dx_n + i_h * dx_h + o_d[None, :]
        tl.store(p, b_dx.to(p_dx.dtype.element_ty), mask=m)
    if NORMED:
        p = p_shares + (i_b * splits + i_split) * WIDTH + o_d
        tl.store(p, tl.sum(b_dweight, 0), mask=o_d < WIDTH)


def forward(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return the output [B, N, H, D] in `dtype`."""
    x, chosen = launch.dense_rows(x), config(x)
    out = x.new_empty(x.shape, dtype=dtype)
    batch, tokens, heads, _ = x.shape
    tiles = -(-tokens * heads // chosen.queries)
    launch.launch(
        rotary_norm_kernel, tiles * batch, chosen, x,
        x, *_parameters(x, weight, cos, sin), out, *launch.exact(eps), tokens * heads, tiles, heads,
        *x.stride()[:3], *out.stride()[:3], **_constants(x, weight, cos),
    )  # fmt: skip
    return out


def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float
) -> list[Tensor]:
    """Return the gradient of x and, where there is a weight, its gradient."""
    grad, x, chosen = launch.dense_rows(grad), launch.dense_rows(x), config(x)
    dx = x.new_empty(x.shape)
    batch, tokens, heads, width = x.shape
    share, splits = launch.shares(tokens * heads, chosen.queries, PROGRAMS // max(1, batch))
    shares = x.new_empty(batch * splits, width, dtype=torch.promote_types(x.dtype, torch.float32))
    launch.launch(
        drotary_norm_kernel, splits * batch, chosen, x,
        x, *_parameters(x, weight, cos, sin), grad, dx, shares, *launch.exact(eps), tokens * heads, share,
        splits, heads, *x.stride()[:3], *grad.stride()[:3], *dx.stride()[:3], **_constants(x, weight, cos),
    )  # fmt: skip
    return [dx] if weight is None else [dx, shares.sum(0).to(weight.dtype)]


def config(x: Tensor) -> Config:
    """Heads of tokens in a tile, and warps: sixteen numbers for each thread."""
    padded = _padded(x)
    return Config(max(1, 2048 // padded), 0, max(4, padded // 512), 1)


def _parameters(x: Tensor, *given: Tensor | None) -> list[Tensor]:
    """As they are read, in a row; anything in the place of one that is not there, which nobody reads."""
    return [x if part is None else part.contiguous() for part in given]


def _padded(x: Tensor) -> int:
    return max(2, triton.next_power_of_2(x.shape[-1]))


def _constants(x: Tensor, weight: Tensor | None, cos: Tensor | None) -> dict[str, object]:
    return {
        "T": config(x).queries,
        "WIDTH": x.shape[-1],
        "PADDED": _padded(x),
        "NORMED": weight is not None,
        "TURNED": cos is not None,
        "ACC": launch.accumulator(x),
    }
