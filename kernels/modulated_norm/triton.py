"""The modulated norm in Triton: a program has whole tokens in registers and reads them once.

Backward, a program goes through a share of the tokens of an image, has mean and deviation again from the
tokens themselves, and adds up the gradients of scale and shift; the shares are added afterwards. Nothing is
kept for it but the inputs, and nothing is atomic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.configs import Config
from zoo.kernels.tile import launch

PROGRAMS = 512  # that share the backward pass


@triton.jit
def _normed(b_x, m_c, eps, WIDTH: tl.constexpr, CENTERED: tl.constexpr):
    """Tokens of mean 0, where centered, and mean square 1, and what they were multiplied by. [T, PADDED]"""
    if CENTERED:
        b_x = tl.where(m_c[None, :], b_x - (tl.sum(b_x, 1) / WIDTH)[:, None], 0.0)
    b_inverse = 1.0 / tl.sqrt(tl.sum(b_x * b_x, 1)[:, None] / WIDTH + eps)
    return b_x * b_inverse, b_inverse


@triton.jit
def modulated_norm_kernel(
    p_x, p_scale, p_shift, p_o, eps_1, rest_1, tokens, tiles, x_b, x_n, scale_b, shift_b, o_b, o_n,
    T: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, CENTERED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o = tl.program_id(0) % tiles * T + tl.arange(0, T)
    o_c = tl.arange(0, PADDED)
    m_c = o_c < WIDTH
    m = (o < tokens)[:, None] & m_c[None, :]
    b_factor = 1.0 + tl.load(p_scale + i_b * scale_b + o_c, mask=m_c, other=0.0).to(ACC)
    b_shift = tl.load(p_shift + i_b * shift_b + o_c, mask=m_c, other=0.0).to(ACC)
    eps = tl.full([1, 1], eps_1, ACC) + tl.full([1, 1], rest_1, ACC)
    # [T, PADDED]
    b_x = tl.load(p_x + i_b * x_b + o.to(tl.int64)[:, None] * x_n + o_c[None, :], mask=m, other=0.0).to(ACC)
    b_y, _ = _normed(b_x, m_c, eps, WIDTH, CENTERED)
    b_o = b_y * b_factor[None, :] + b_shift[None, :]
    p = p_o + i_b * o_b + o.to(tl.int64)[:, None] * o_n + o_c[None, :]
    tl.store(p, b_o.to(p_o.dtype.element_ty), mask=m)


@triton.jit
def dmodulated_norm_kernel(
    p_x, p_scale, p_do, p_dx, p_shares, eps_1, rest_1, tokens, share, splits, x_b, x_n, scale_b, do_b, do_n,
    dx_b, dx_n,
    T: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, CENTERED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_split = tl.program_id(0) % splits
    i_b = (tl.program_id(0) // splits).to(tl.int64)
    o_c = tl.arange(0, PADDED)
    m_c = o_c < WIDTH
    b_factor = 1.0 + tl.load(p_scale + i_b * scale_b + o_c, mask=m_c, other=0.0).to(ACC)
    eps = tl.full([1, 1], eps_1, ACC) + tl.full([1, 1], rest_1, ACC)
    b_dscale = tl.zeros([T, PADDED], ACC)
    b_dshift = tl.zeros([T, PADDED], ACC)
    for t in range(0, tl.cdiv(share, T)):
        o = i_split * share + t * T + tl.arange(0, T)
        m = ((o < tokens) & (o < (i_split + 1) * share))[:, None] & m_c[None, :]
        o = o.to(tl.int64)[:, None]
        # [T, PADDED]
        b_x = tl.load(p_x + i_b * x_b + o * x_n + o_c[None, :], mask=m, other=0.0).to(ACC)
        b_do = tl.load(p_do + i_b * do_b + o * do_n + o_c[None, :], mask=m, other=0.0).to(ACC)
        b_y, b_inverse = _normed(b_x, m_c, eps, WIDTH, CENTERED)
        b_dshift += b_do
        b_dscale += b_do * b_y
        b_dy = b_do * b_factor[None, :]
        b_dx = b_dy - b_y * (tl.sum(b_dy * b_y, 1) / WIDTH)[:, None]
        if CENTERED:
            b_dx = b_dx - (tl.sum(b_dy, 1) / WIDTH)[:, None]
        p = p_dx + i_b * dx_b + o * dx_n + o_c[None, :]
        tl.store(p, (b_dx * b_inverse).to(p_dx.dtype.element_ty), mask=m)
    p = p_shares + (i_b * splits + i_split) * (2 * WIDTH) + o_c
    tl.store(p, tl.sum(b_dscale, 0), mask=m_c)
    tl.store(p + WIDTH, tl.sum(b_dshift, 0), mask=m_c)


def forward(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, centered: bool, dtype: torch.dtype
) -> Tensor:
    """Return the output [B, N, C] in `dtype`."""
    x, scale, shift = (launch.dense_rows(part) for part in (x, scale, shift))
    batch, tokens, _ = x.shape
    out = x.new_empty(x.shape, dtype=dtype)
    chosen = config(x)
    tiles = -(-tokens // chosen.queries)
    launch.launch(
        modulated_norm_kernel, tiles * batch, chosen, x,
        x, scale, shift, out, *launch.exact(eps), tokens, tiles, *x.stride()[:2], scale.stride(0),
        shift.stride(0), *out.stride()[:2], **_constants(x, centered),
    )  # fmt: skip
    return out


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, eps: float, centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, scale and shift."""
    grad, x, rows = (launch.dense_rows(part) for part in (grad, x, scale))
    batch, tokens, width = x.shape
    dx, chosen = x.new_empty(x.shape), config(x)
    share, splits = launch.shares(tokens, chosen.queries, PROGRAMS // max(1, batch))
    sums = torch.promote_types(x.dtype, torch.float32)
    parts = x.new_empty(batch, splits, 2, width, dtype=sums)
    launch.launch(
        dmodulated_norm_kernel, splits * batch, chosen, x,
        x, rows, grad, dx, parts, *launch.exact(eps), tokens, share, splits, *x.stride()[:2], rows.stride(0),
        *grad.stride()[:2], *dx.stride()[:2], **_constants(x, centered),
    )  # fmt: skip
    dscale, dshift = (part.sum(1) for part in parts.unbind(2))  # an operator's results may not share memory
    return dx, dscale.to(scale.dtype), dshift.to(shift.dtype)


def config(x: Tensor) -> Config:
    """Tokens of a tile and warps: sixteen numbers for each thread."""
    padded = triton.next_power_of_2(x.shape[-1])
    return Config(max(1, 2048 // padded), 0, max(4, padded // 512), 1)


def _constants(x: Tensor, centered: bool) -> dict[str, object]:
    return {
        "T": config(x).queries,
        "WIDTH": x.shape[-1],
        "PADDED": triton.next_power_of_2(x.shape[-1]),
        "CENTERED": centered,
        "ACC": launch.accumulator(x),
    }
