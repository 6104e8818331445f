"""The gated residual in Triton: a program owns some channels of some tokens.

Backward, it goes through a share of the tokens of an image and adds up the gradient of the gate; the shares
are added afterwards. Nothing is atomic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.configs import Config
from zoo.kernels.tile import launch

PROGRAMS = 1024  # that share the backward pass
CHANNELS = 512  # of a program at most


@triton.jit
def gated_residual_kernel(
    p_x, p_y, p_gate, p_o, tokens, tiles, columns, x_b, x_n, y_b, y_n, gate_b, o_b, o_n,
    T: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) // columns
    i_b = (i // tiles).to(tl.int64)
    o = i % tiles * T + tl.arange(0, T)
    o_c = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < WIDTH
    m = (o < tokens)[:, None] & m_c[None, :]
    o = o.to(tl.int64)[:, None]
    b_gate = tl.load(p_gate + i_b * gate_b + o_c, mask=m_c, other=0.0).to(ACC)
    # [T, BLOCK]
    b_x = tl.load(p_x + i_b * x_b + o * x_n + o_c[None, :], mask=m, other=0.0).to(ACC)
    b_y = tl.load(p_y + i_b * y_b + o * y_n + o_c[None, :], mask=m, other=0.0).to(ACC)
    b_o = b_x + b_gate[None, :] * b_y
    tl.store(p_o + i_b * o_b + o * o_n + o_c[None, :], b_o.to(p_o.dtype.element_ty), mask=m)


@triton.jit
def dgated_residual_kernel(
    p_do, p_y, p_gate, p_dy, p_shares, tokens, share, splits, columns, do_b, do_n, y_b, y_n, gate_b,
    dy_b, dy_n,
    T: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) // columns
    i_split = i % splits
    i_b = (i // splits).to(tl.int64)
    o_c = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < WIDTH
    b_gate = tl.load(p_gate + i_b * gate_b + o_c, mask=m_c, other=0.0).to(ACC)
    b_dgate = tl.zeros([T, BLOCK], ACC)
    for t in range(0, tl.cdiv(share, T)):
        o = i_split * share + t * T + tl.arange(0, T)
        m = ((o < tokens) & (o < (i_split + 1) * share))[:, None] & m_c[None, :]
        o = o.to(tl.int64)[:, None]
        # [T, BLOCK]
        b_do = tl.load(p_do + i_b * do_b + o * do_n + o_c[None, :], mask=m, other=0.0).to(ACC)
        b_y = tl.load(p_y + i_b * y_b + o * y_n + o_c[None, :], mask=m, other=0.0).to(ACC)
        b_dgate += b_do * b_y
        b_dy = b_do * b_gate[None, :]
        tl.store(p_dy + i_b * dy_b + o * dy_n + o_c[None, :], b_dy.to(p_dy.dtype.element_ty), mask=m)
    tl.store(p_shares + (i_b * splits + i_split) * WIDTH + o_c, tl.sum(b_dgate, 0), mask=m_c)


def forward(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Return the output [B, N, C] in x's dtype."""
    x, y, gate = (launch.dense_rows(part) for part in (x, y, gate))
    out, chosen = x.new_empty(x.shape), config(x)
    batch, tokens, _ = x.shape
    tiles, columns = -(-tokens // chosen.queries), -(-x.shape[2] // chosen.keys)
    launch.launch(
        gated_residual_kernel, columns * tiles * batch, chosen, x,
        x, y, gate, out, tokens, tiles, columns, *x.stride()[:2], *y.stride()[:2], gate.stride(0),
        *out.stride()[:2], **_constants(x),
    )  # fmt: skip
    return out


def backward(grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of y and gate."""
    grad, y, rows = (launch.dense_rows(part) for part in (grad, y, gate))
    dy, chosen = y.new_empty(y.shape), config(y)
    batch, tokens, width = y.shape
    columns = -(-width // chosen.keys)
    share, splits = launch.shares(tokens, chosen.queries, PROGRAMS // max(1, batch * columns))
    parts = y.new_empty(batch, splits, width, dtype=torch.promote_types(y.dtype, torch.float32))
    launch.launch(
        dgated_residual_kernel, columns * splits * batch, chosen, y,
        grad, y, rows, dy, parts, tokens, share, splits, columns, *grad.stride()[:2], *y.stride()[:2],
        rows.stride(0), *dy.stride()[:2], **_constants(y),
    )  # fmt: skip
    return dy, parts.sum(1).to(gate.dtype)


def config(x: Tensor) -> Config:
    """Tokens and channels of a program, and warps: sixteen numbers for each thread."""
    channels = min(CHANNELS, triton.next_power_of_2(x.shape[-1]))
    return Config(2048 // channels, channels, 4, 1)


def _constants(x: Tensor) -> dict[str, object]:
    chosen = config(x)
    return {
        "T": chosen.queries,
        "WIDTH": x.shape[-1],
        "BLOCK": chosen.keys,
        "ACC": launch.accumulator(x),
    }
