"""Deformable sampling and attention in Triton.

A sampling program owns a tile of positions of one image and group, reads the four tokens around each in
channel order, and in the backward pass adds to the map atomically: two positions may share a token.
Attention is the tile template over all pairs of tiles, with a bias that reads the table for each pair.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.configs import Config
from zoo.kernels.tile import kernels, launch, policies
from zoo.kernels.tile.launch import Bias
from zoo.kernels.tile.policies import bilinear_corner

CHANNELS = 64  # of a position that are read at once
# Reading a table between its entries takes four loads and their addresses for each pair of tokens. By bytes
# of a row at most; 99 KB of shared memory, which the smallest architectures have, are enough.
WITH_TABLE = {256: Config(64, 32, 8, 1), 512: Config(32, 32, 8, 1), 1024: Config(16, 16, 8, 1)}
GRADIENTS = Config(32, 16, 8, 1)


@triton.jit
def _places(p_at, at_n, o, m, rows, columns):
    """Positions in tokens: row and column, between tokens."""
    p = p_at + o.to(tl.int64) * at_n
    y = (tl.load(p, mask=m, other=0.0) + 1.0) / 2 * (rows - 1)
    x = (tl.load(p + 1, mask=m, other=0.0) + 1.0) / 2 * (columns - 1)
    return y, x


@triton.jit
def sample_kernel(
    p_x, p_at, p_out, tiles, groups, positions, rows, columns, x_b, x_n, at_b, at_g, at_n, out_b, out_n,
    T: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    i_g = (i // tiles % groups).to(tl.int64)
    i_b = (i // tiles // groups).to(tl.int64)
    o = i % tiles * T + tl.arange(0, T)
    m = o < positions
    y, x = _places(p_at + i_b * at_b + i_g * at_g, at_n, o, m, rows, columns)
    for c in range(0, WIDTH, BLOCK):
        o_c = c + tl.arange(0, BLOCK)
        b_out = tl.zeros([T, BLOCK], ACC)
        for step_y in tl.static_range(2):
            for step_x in tl.static_range(2):
                share_y, share_x, token, inside = bilinear_corner(y, x, rows, columns, step_y, step_x)
                p = p_x + i_b * x_b + i_g * WIDTH + token.to(tl.int64)[:, None] * x_n + o_c[None, :]
                mask = (m & inside)[:, None] & (o_c < WIDTH)[None, :]
                b_x = tl.load(p, mask=mask, other=0.0).to(ACC)
                b_out += (share_y * share_x)[:, None] * b_x
        p = p_out + i_b * out_b + i_g * WIDTH + o.to(tl.int64)[:, None] * out_n + o_c[None, :]
        tl.store(p, b_out.to(p_out.dtype.element_ty), mask=m[:, None] & (o_c < WIDTH)[None, :])


@triton.jit
def dsample_kernel(
    p_x, p_at, p_dout, p_dx, p_dat, tiles, groups, positions, rows, columns, x_b, x_n, at_b, at_g, at_n,
    dout_b, dout_n, dx_b, dx_n,
    T: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    i_g = (i // tiles % groups).to(tl.int64)
    i_b = (i // tiles // groups).to(tl.int64)
    o = i % tiles * T + tl.arange(0, T)
    m = o < positions
    y, x = _places(p_at + i_b * at_b + i_g * at_g, at_n, o, m, rows, columns)
    b_dy = tl.zeros([T], ACC)
    b_dx = tl.zeros([T], ACC)
    for c in range(0, WIDTH, BLOCK):
        o_c = c + tl.arange(0, BLOCK)
        m_c = (o_c < WIDTH)[None, :]
        p = p_dout + i_b * dout_b + i_g * WIDTH + o.to(tl.int64)[:, None] * dout_n + o_c[None, :]
        b_dout = tl.load(p, mask=m[:, None] & m_c, other=0.0).to(ACC)
        for step_y in tl.static_range(2):
            for step_x in tl.static_range(2):
                share_y, share_x, token, inside = bilinear_corner(y, x, rows, columns, step_y, step_x)
                o_x = i_g * WIDTH + o_c[None, :]
                mask = (m & inside)[:, None] & m_c
                b_x = tl.load(p_x + i_b * x_b + token.to(tl.int64)[:, None] * x_n + o_x, mask=mask, other=0.0)
                b_product = tl.sum(b_dout * b_x.to(ACC), 1)
                b_dy += b_product * share_x * (2 * step_y - 1)
                b_dx += b_product * share_y * (2 * step_x - 1)
                p = p_dx + i_b * dx_b + token.to(tl.int64)[:, None] * dx_n + o_x
                tl.atomic_add(p, b_dout * (share_y * share_x)[:, None], mask=mask, sem="relaxed")
    p = p_dat + ((i_b * groups + i_g) * positions + o) * 2
    tl.store(p, b_dy * (rows - 1) / 2, mask=m)
    tl.store(p + 1, b_dx * (columns - 1) / 2, mask=m)


def sample(x: Tensor, positions: Tensor) -> Tensor:
    """Sample [B, Y, X, C] at [B, G, N, 2]: [B, N, C] in x's dtype."""
    tokens, at = _flat(x), _exact_positions(x, positions)
    out = x.new_empty(x.shape[0], positions.shape[2], x.shape[3])
    size = _size(x, positions)
    launch.launch(
        sample_kernel, size["programs"], Config(size["T"], 0, 4, 1), x,
        tokens, at, out, size["tiles"], *at.shape[1:3], *x.shape[1:3], *tokens.stride()[:2],
        *at.stride()[:3], *out.stride()[:2], T=size["T"], **_constants(x, positions),
    )  # fmt: skip
    return out


def sample_backward(grad: Tensor, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and positions."""
    tokens, at, grad = _flat(x), _exact_positions(x, positions), launch.dense_rows(grad)
    dx = torch.zeros(x.shape, dtype=at.dtype, device=x.device).flatten(1, 2)
    dat = at.new_empty(at.shape)
    size = _size(x, positions)
    launch.launch(
        dsample_kernel, size["programs"], Config(size["T"], 0, 4, 1), x,
        tokens, at, grad, dx, dat, size["tiles"], *at.shape[1:3], *x.shape[1:3], *tokens.stride()[:2],
        *at.stride()[:3], *grad.stride()[:2], *dx.stride()[:2], T=size["T"], **_constants(x, positions),
    )  # fmt: skip
    return dx.view(x.shape).to(x.dtype), dat.to(positions.dtype)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    corners: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output [B, Y, X, H, Dv] in q's dtype and the natural-log LSE [B, Y, X, H]."""
    grid, added = q.shape[1:3], _bias(q, v, positions, table, bias, corners)
    q = q.flatten(1, 2)
    out, lse = launch.forward(q, k, v, launch.dense(q, k), scale, added)
    return out.unflatten(1, grid), lse.unflatten(1, grid)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    corners: bool,
    scale: float,
    table_grad: bool,
    bias_grad: bool,
) -> list[Tensor]:
    """Return the gradients of q, k, v, with `table_grad` of positions and table, with `bias_grad` of bias."""
    grid, added = q.shape[1:3], _bias(q, v, positions, table, bias, corners)
    grad_out, q, out, lse = (x.flatten(1, 2) for x in (grad_out, q, out, lse))
    grad_lse = None if grad_lse is None else grad_lse.flatten(1, 2)
    tiling = launch.dense(q, k)
    dq, dk, dv, rows = launch.backward(grad_out, grad_lse, q, k, v, out, lse, tiling, scale, added)
    grads = [dq.unflatten(1, grid), dk, dv]
    if table_grad:
        grads += _bilinear_gradients(grad_out, q, k, v, rows, positions, table, scale, added)
    if bias_grad:
        grads.append(launch.pair_gradient(grad_out, q, k, v, rows, bias, tiling, scale, added))
    return grads


def describe(q: Tensor, v: Tensor, biased: bool, *, with_table: bool) -> str:
    """How a call would be computed, in words."""
    config = _with_table(q, v) if with_table else launch.config_of("forward", q, v, biased)
    return f"tiles of at most {config.queries} queries and {config.keys} keys, {config.warps} warps"


def _bilinear_gradients(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    positions: Tensor,
    table: Tensor,
    scale: float,
    bias: Bias,
) -> list[Tensor]:
    """Of positions and table."""
    q, k, v, grad_out = (launch.dense_rows(x) for x in (q, k, v, grad_out))
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    dtable = torch.zeros(table.shape, dtype=rows.dtype, device=q.device)
    dplaces = rows.new_empty(batch, heads, keys, 2)
    policy = launch.dense(q, k)(GRADIENTS.queries, GRADIENTS.keys)
    launch.launch(
        kernels.dbilinear_kernel, policy.key_tiles * batch * heads, GRADIENTS, q,
        q, k, v, grad_out, rows, dtable, dplaces, bias.data, policy.data,
        *launch.exact(scale * launch.LOG2_E), policy.key_tiles, heads, heads // k.shape[2], queries, keys,
        rows[0].numel(), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3],
        SHAPE=policy.shape, OWN=policy.own_k, QUERIES_OF=policy.queries_of, VISIT=policy.visit_q,
        ALLOW=policy.allow, BIAS=bias.function, PLACE=policies.bilinear_place,
        CORNER=policies.bilinear_corner, TK=policy.shape[1], **launch.constants(q, v),
    )  # fmt: skip
    dpositions = dplaces.unflatten(1, (positions.shape[1], -1)).sum(2)
    return [dpositions.to(positions.dtype), dtable.to(table.dtype)]


def _with_table(q: Tensor, v: Tensor) -> Config:
    """The configuration for heads of such widths."""
    sizes = launch.constants(q, v)
    row = max(sizes["PD"], sizes["PDV"]) * q.element_size()
    return WITH_TABLE[min(max(row, min(WITH_TABLE)), max(WITH_TABLE))]


def _bias(
    q: Tensor,
    v: Tensor,
    positions: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    corners: bool,
) -> Bias:
    if table is None:
        return launch.table(bias)
    table, positions = table.contiguous(), _exact_positions(q, positions)
    places = [_places_of(length, corners) for length in q.shape[1:3]]
    data = (
        table, table.stride(0), *table.shape[1:], positions, *positions.stride()[:3],
        q.shape[3] // positions.shape[1], q.shape[2], *places[0], *places[1],
    )  # fmt: skip
    return Bias(policies.bilinear_bias, data, _with_table(q, v))


def _places_of(length: int, corners: bool) -> tuple[int, int]:
    """The numbers c and d that put token i of an axis at (2 i + c) / d - 1."""
    if not corners:
        return 1, length
    return (0, length - 1) if length > 1 else (1, 1)


def _exact_positions(x: Tensor, positions: Tensor) -> Tensor:
    return launch.dense_rows(positions.to(torch.promote_types(x.dtype, torch.float32)))


def _flat(x: Tensor) -> Tensor:
    """[B, Y, X, C] to [B, Y * X, C]."""
    return launch.dense_rows(x).flatten(1, 2)


def _size(x: Tensor, positions: Tensor) -> dict[str, int]:
    batch, groups, count, _ = positions.shape
    tile = launch.tile_size(32, count)
    tiles = -(-count // tile)
    return {"T": tile, "tiles": tiles, "programs": tiles * groups * batch}


def _constants(x: Tensor, positions: Tensor) -> dict[str, object]:
    width = x.shape[-1] // positions.shape[1]
    return {
        "WIDTH": width,
        "BLOCK": min(CHANNELS, triton.next_power_of_2(width)),
        "ACC": launch.accumulator(x),
    }
