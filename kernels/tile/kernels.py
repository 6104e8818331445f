"""The template: flash attention over the tiles that a policy names, forward and backward.

One program owns a tile of queries (forward, dq, bias gradients) or of keys (dk and dv) of one image and head
and loops over the tiles of the other side. Logits are kept in base 2. The backward needs output and LSE;
dq comes first and leaves each row's LSE and delta = out.dout - dlse in an order that dk and dv read well.

Names: p_ pointer, i_ program index, o_ tokens, m_ which exist, b_ tile in registers. ACC is the dtype of all
sums; addresses are int64. Sums have a fixed order, without atomics, but for `dbilinear_kernel`.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _rows(p, stride_n, o, m, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Tokens of one image and head as rows, zero where there is nothing. [T, PADDED]"""
    o_d = tl.arange(0, PADDED)
    mask = m[:, None]
    if WIDTH != PADDED:
        mask = mask & (o_d < WIDTH)[None, :]
    return tl.load(p + o.to(tl.int64)[:, None] * stride_n + o_d[None, :], mask=mask, other=0.0)


@triton.jit
def _put_rows(p, stride_n, o, m, value, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    o_d = tl.arange(0, PADDED)
    mask = m[:, None]
    if WIDTH != PADDED:
        mask = mask & (o_d < WIDTH)[None, :]
    tl.store(p + o.to(tl.int64)[:, None] * stride_n + o_d[None, :], value.to(p.dtype.element_ty), mask=mask)


@triton.jit
def _exact(high, low, ACC: tl.constexpr):
    """A number passed as the sum of two float32, which is what a float argument becomes."""
    return tl.full([1, 1], high, ACC) + tl.full([1, 1], low, ACC)


@triton.jit
def _logits(
    b_x, b_y, scale, B, P, SHAPE: tl.constexpr, o_q, o_k, m_q, m_k, of_q, of_k, i_b, i_h,
    Q: tl.constexpr, ALLOW: tl.constexpr, BIAS: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Scaled, biased, masked products of the rows of b_x and b_y in base 2; queries along axis Q."""
    b_s = tl.dot(b_x, tl.trans(b_y), input_precision=PREC, out_dtype=ACC) * scale
    ok = None
    if ALLOW is not None:
        ok = ALLOW(P, SHAPE, of_q, of_k, m_k, Q)
    if BIAS is not None:
        b_bias = BIAS(B, P, SHAPE, o_q, o_k, m_q, m_k, of_q, of_k, ok, i_b, i_h, Q)
        b_s += b_bias.to(ACC) * tl.full([1, 1], LOG2_E, ACC)
    if ALLOW is not None:
        b_s = tl.where(ok, b_s, float("-inf"))
    return b_s


@triton.jit
def forward_kernel(
    p_q, p_k, p_v, p_o, p_lse, B, P, scale_2, rest_2, tiles, heads, shared,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, lse_b, lse_n,
    SHAPE: tl.constexpr, OWN: tl.constexpr, KEYS_OF: tl.constexpr, VISIT: tl.constexpr,
    ALLOW: tl.constexpr, BIAS: tl.constexpr, TQ: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PD: tl.constexpr, PDV: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    i_tile = i % tiles
    i_h = (i // tiles % heads).to(tl.int64)
    i_b = (i // tiles // heads).to(tl.int64)
    o_q, m_q, of_q = OWN(P, SHAPE, i_tile)
    b_q = _rows(p_q + i_b * q_b + i_h * q_h, q_n, o_q, m_q, D, PD)
    p_k += i_b * k_b + i_h // shared * k_h
    p_v += i_b * v_b + i_h // shared * v_h

    scale = _exact(scale_2, rest_2, ACC)
    # Finite, so that a row of nothing but masked logits does not become inf - inf.
    b_max = tl.full([TQ], -1e30, ACC)
    b_sum = tl.zeros([TQ], ACC)
    b_o = tl.zeros([TQ, PDV], ACC)
    count, where = KEYS_OF(P, SHAPE, i_tile, i_b, i_h)
    for t in range(0, count):
        o_k, m_k, of_k = VISIT(P, SHAPE, where, t)
        b_k = _rows(p_k, k_n, o_k, m_k, D, PD)
        # [TQ, TK]
        b_s = _logits(
            b_q, b_k, scale, B, P, SHAPE, o_q, o_k, m_q, m_k, of_q, of_k, i_b, i_h, 0, ALLOW, BIAS, PREC, ACC
        )  # fmt: skip
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_shrink = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_v = _rows(p_v, v_n, o_k, m_k, DV, PDV)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_shrink[:, None], input_precision=PREC, out_dtype=ACC)
        b_max = b_new

    # A row that saw nothing: 0 with LSE -inf.
    some = b_sum > 0.0
    unseen = b_sum == 0.0
    b_o = b_o / tl.where(unseen, 1.0, b_sum)[:, None]
    b_lse = b_max * tl.full([1], LN_2, ACC) + tl.log(tl.where(some, b_sum, 1.0))
    b_lse = tl.where(unseen, float("-inf"), tl.where(some, b_lse, b_sum))
    _put_rows(p_o + i_b * o_b + i_h * o_h, o_n, o_q, m_q, b_o, DV, PDV)
    tl.store(p_lse + i_b * lse_b + i_h + o_q.to(tl.int64) * lse_n, b_lse, mask=m_q)


@triton.jit
def dq_kernel(
    p_q, p_k, p_v, p_o, p_do, p_dq, p_lse, p_dlse, p_rows, B, P, scale_2, rest_2, scale_1, rest_1,
    tiles, heads, shared, queries, rows_size, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h,
    do_b, do_n, do_h, dq_b, dq_n, dq_h, lse_b, lse_n, dlse_b, dlse_n, dlse_h,
    SHAPE: tl.constexpr, OWN: tl.constexpr, KEYS_OF: tl.constexpr, VISIT: tl.constexpr,
    ALLOW: tl.constexpr, BIAS: tl.constexpr, TQ: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PD: tl.constexpr, PDV: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    i_tile = i % tiles
    i_h = (i // tiles % heads).to(tl.int64)
    i_b = (i // tiles // heads).to(tl.int64)
    o_q, m_q, of_q = OWN(P, SHAPE, i_tile)
    b_q = _rows(p_q + i_b * q_b + i_h * q_h, q_n, o_q, m_q, D, PD)
    b_do = _rows(p_do + i_b * do_b + i_h * do_h, do_n, o_q, m_q, DV, PDV)
    b_o = _rows(p_o + i_b * o_b + i_h * o_h, o_n, o_q, m_q, DV, PDV)
    b_lse = tl.load(p_lse + i_b * lse_b + i_h + o_q.to(tl.int64) * lse_n, mask=m_q, other=0.0)
    # A row that saw nothing has no logit that is not masked, so any finite number will do.
    b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse * tl.full([1], LOG2_E, ACC))
    b_delta = tl.sum(b_o.to(ACC) * b_do.to(ACC), 1)
    if p_dlse is not None:
        p_dlse += i_b * dlse_b + i_h * dlse_h
        b_delta -= tl.load(p_dlse + o_q.to(tl.int64) * dlse_n, mask=m_q, other=0.0).to(ACC)
    p_rows += (i_b * heads + i_h) * queries
    tl.store(p_rows + o_q, b_lse, mask=m_q)
    tl.store(p_rows + rows_size + o_q, b_delta, mask=m_q)
    p_k += i_b * k_b + i_h // shared * k_h
    p_v += i_b * v_b + i_h // shared * v_h

    scale = _exact(scale_2, rest_2, ACC)
    b_dq = tl.zeros([TQ, PD], ACC)
    count, where = KEYS_OF(P, SHAPE, i_tile, i_b, i_h)
    for t in range(0, count):
        o_k, m_k, of_k = VISIT(P, SHAPE, where, t)
        b_k = _rows(p_k, k_n, o_k, m_k, D, PD)
        b_v = _rows(p_v, v_n, o_k, m_k, DV, PDV)
        # [TQ, TK]
        b_s = _logits(
            b_q, b_k, scale, B, P, SHAPE, o_q, o_k, m_q, m_k, of_q, of_k, i_b, i_h, 0, ALLOW, BIAS, PREC, ACC
        )  # fmt: skip
        b_p = tl.exp2(b_s - b_lse[:, None])
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PREC, out_dtype=ACC)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PREC, out_dtype=ACC)
    _put_rows(p_dq + i_b * dq_b + i_h * dq_h, dq_n, o_q, m_q, b_dq * _exact(scale_1, rest_1, ACC), D, PD)


@triton.jit
def dkv_kernel(
    p_q, p_k, p_v, p_do, p_dk, p_dv, p_rows, B, P, scale_2, rest_2, scale_1, rest_1,
    tiles, heads, shared, queries, rows_size, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h,
    dk_b, dk_n, dk_h, dv_b, dv_n, dv_h,
    SHAPE: tl.constexpr, OWN: tl.constexpr, QUERIES_OF: tl.constexpr, VISIT: tl.constexpr,
    ALLOW: tl.constexpr, BIAS: tl.constexpr, TK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PD: tl.constexpr, PDV: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    i_tile = i % tiles
    kv_heads = heads // shared
    i_kv = (i // tiles % kv_heads).to(tl.int64)
    i_b = (i // tiles // kv_heads).to(tl.int64)
    o_k, m_k, of_k = OWN(P, SHAPE, i_tile)
    b_k = _rows(p_k + i_b * k_b + i_kv * k_h, k_n, o_k, m_k, D, PD)
    b_v = _rows(p_v + i_b * v_b + i_kv * v_h, v_n, o_k, m_k, DV, PDV)

    scale = _exact(scale_2, rest_2, ACC)
    b_dk = tl.zeros([TK, PD], ACC)
    b_dv = tl.zeros([TK, PDV], ACC)
    for g in range(0, shared):
        i_h = i_kv * shared + g
        p_q_h = p_q + i_b * q_b + i_h * q_h
        p_do_h = p_do + i_b * do_b + i_h * do_h
        p_rows_h = p_rows + (i_b * heads + i_h) * queries
        count, where = QUERIES_OF(P, SHAPE, i_tile, i_b, i_h)
        for t in range(0, count):
            o_q, m_q, of_q = VISIT(P, SHAPE, where, t)
            b_q = _rows(p_q_h, q_n, o_q, m_q, D, PD)
            b_do = _rows(p_do_h, do_n, o_q, m_q, DV, PDV)
            # Transposed, so that p and ds are left operands as they are. [TK, TQ]
            b_s = _logits(
                b_k, b_q, scale, B, P, SHAPE, o_q, o_k, m_q, m_k, of_q, of_k, i_b, i_h, 1, ALLOW, BIAS,
                PREC, ACC,
            )  # fmt: skip
            b_lse = tl.load(p_rows_h + o_q, mask=m_q, other=0.0)
            b_delta = tl.load(p_rows_h + rows_size + o_q, mask=m_q, other=0.0)
            # Queries past the end: a logit and LSE of 0, but dout = 0.
            b_p = tl.exp2(b_s - b_lse[None, :])
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PREC, out_dtype=ACC)
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PREC, out_dtype=ACC)
            b_ds = b_p * (b_dp - b_delta[None, :])
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PREC, out_dtype=ACC)
    _put_rows(p_dk + i_b * dk_b + i_kv * dk_h, dk_n, o_k, m_k, b_dk * _exact(scale_1, rest_1, ACC), D, PD)
    _put_rows(p_dv + i_b * dv_b + i_kv * dv_h, dv_n, o_k, m_k, b_dv, DV, PDV)


@triton.jit
def dtable_kernel(
    p_q, p_k, p_v, p_do, p_rows, p_dtable, B, P, scale_2, rest_2, tiles, batch, heads, shared, queries,
    rows_size,
    table_b, table_h, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h,
    dt_b, dt_h, dt_n, dt_m,
    SHAPE: tl.constexpr, OWN: tl.constexpr, KEYS_OF: tl.constexpr, VISIT: tl.constexpr,
    ALLOW: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PD: tl.constexpr, PDV: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of a table bias. A program owns the rows of a query tile and adds over the images and heads
    that share them, reading back what it wrote: table_b and table_h are how many of them there are."""
    i = tl.program_id(0)
    i_tile = i % tiles
    first_h = i // tiles % table_h
    first_b = i // tiles // table_h
    o_q, m_q, of_q = OWN(P, SHAPE, i_tile)
    p_dtable += first_b.to(tl.int64) * dt_b + first_h.to(tl.int64) * dt_h
    scale = _exact(scale_2, rest_2, ACC)
    for r in range(0, batch // table_b * (heads // table_h)):
        i_h = (first_h + r % (heads // table_h)).to(tl.int64)
        i_b = (first_b + r // (heads // table_h)).to(tl.int64)
        b_q = _rows(p_q + i_b * q_b + i_h * q_h, q_n, o_q, m_q, D, PD)
        b_do = _rows(p_do + i_b * do_b + i_h * do_h, do_n, o_q, m_q, DV, PDV)
        p_rows_h = p_rows + (i_b * heads + i_h) * queries
        b_lse = tl.load(p_rows_h + o_q, mask=m_q, other=0.0)
        b_delta = tl.load(p_rows_h + rows_size + o_q, mask=m_q, other=0.0)
        count, where = KEYS_OF(P, SHAPE, i_tile, i_b, i_h)
        for t in range(0, count):
            o_k, m_k, of_k = VISIT(P, SHAPE, where, t)
            b_k = _rows(p_k + i_b * k_b + i_h // shared * k_h, k_n, o_k, m_k, D, PD)
            b_v = _rows(p_v + i_b * v_b + i_h // shared * v_h, v_n, o_k, m_k, DV, PDV)
            b_s = _logits(
                b_q, b_k, scale, B, P, SHAPE, o_q, o_k, m_q, m_k, of_q, of_k, i_b, i_h, 0, ALLOW, BIAS,
                PREC, ACC,
            )  # fmt: skip
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PREC, out_dtype=ACC)
            b_ds = tl.exp2(b_s - b_lse[:, None]) * (b_dp - b_delta[:, None])
            p_tile = p_dtable + o_q.to(tl.int64)[:, None] * dt_n + o_k.to(tl.int64)[None, :] * dt_m
            m = m_q[:, None] & m_k[None, :]
            # Another thread may have written an entry for the image or head before.
            tl.debug_barrier()
            tl.store(p_tile, tl.load(p_tile, mask=m, other=0.0) + b_ds, mask=m)


@triton.jit
def dpairs_kernel(
    p_q, p_k, p_v, p_do, p_rows, p_dtable, B, P, scale_2, rest_2, query_tiles, key_tiles, batch, heads,
    shared, queries, rows_size, table_b, table_h,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h, dt_b, dt_h, dt_n, dt_m,
    SHAPE: tl.constexpr, OWN_Q: tl.constexpr, OWN_K: tl.constexpr, ALLOW: tl.constexpr, BIAS: tl.constexpr,
    TQ: tl.constexpr, TK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr,
    PDV: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of a table bias where all tiles meet. A program owns a tile of the table and adds over the
    images and heads that share it in registers: few queries leave few rows to go by."""
    i = tl.program_id(0)
    o_q, m_q, of_q = OWN_Q(P, SHAPE, i % query_tiles)
    o_k, m_k, of_k = OWN_K(P, SHAPE, i // query_tiles % key_tiles)
    first = i // query_tiles // key_tiles
    first_h = first % table_h
    first_b = first // table_h
    scale = _exact(scale_2, rest_2, ACC)
    b_sum = tl.zeros([TQ, TK], ACC)
    for r in range(0, batch // table_b * (heads // table_h)):
        i_h = (first_h + r % (heads // table_h)).to(tl.int64)
        i_b = (first_b + r // (heads // table_h)).to(tl.int64)
        b_q = _rows(p_q + i_b * q_b + i_h * q_h, q_n, o_q, m_q, D, PD)
        b_do = _rows(p_do + i_b * do_b + i_h * do_h, do_n, o_q, m_q, DV, PDV)
        b_k = _rows(p_k + i_b * k_b + i_h // shared * k_h, k_n, o_k, m_k, D, PD)
        b_v = _rows(p_v + i_b * v_b + i_h // shared * v_h, v_n, o_k, m_k, DV, PDV)
        p_rows_h = p_rows + (i_b * heads + i_h) * queries
        b_lse = tl.load(p_rows_h + o_q, mask=m_q, other=0.0)
        b_delta = tl.load(p_rows_h + rows_size + o_q, mask=m_q, other=0.0)
        b_s = _logits(
            b_q, b_k, scale, B, P, SHAPE, o_q, o_k, m_q, m_k, of_q, of_k, i_b, i_h, 0, ALLOW, BIAS, PREC, ACC
        )  # fmt: skip
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PREC, out_dtype=ACC)
        b_sum += tl.exp2(b_s - b_lse[:, None]) * (b_dp - b_delta[:, None])
    p_dtable += first_b.to(tl.int64) * dt_b + first_h.to(tl.int64) * dt_h
    p_tile = p_dtable + o_q.to(tl.int64)[:, None] * dt_n + o_k.to(tl.int64)[None, :] * dt_m
    tl.store(p_tile, b_sum, mask=m_q[:, None] & m_k[None, :])


@triton.jit
def drelative_kernel(
    p_q, p_k, p_v, p_do, p_rows, p_sums, B, P, scale_2, rest_2, tiles, batch, heads, shared, queries,
    rows_size,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h, splits, n0, n1, n2, low0, low1, low2,
    SHAPE: tl.constexpr, OWN: tl.constexpr, CORNER: tl.constexpr, RANGE: tl.constexpr, BOX: tl.constexpr,
    TOKENS: tl.constexpr, ALLOW: tl.constexpr, BIAS: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PDV: tl.constexpr, PREC: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of a relative bias, still by pairs of tokens in a tile.

    A program owns one place of the key tile beside the query tile, so that every entry of its tile is one
    offset, and adds over images and query tiles in registers. The host sums entries of equal offset.
    """
    i = tl.program_id(0)
    i_split = i % splits
    i_place = i // splits % (n0 * n1 * n2)
    i_h = (i // splits // (n0 * n1 * n2)).to(tl.int64)
    d0 = low0 + i_place // (n1 * n2) * SHAPE[5]
    d1 = low1 + i_place // n2 % n1 * SHAPE[6]
    d2 = low2 + i_place % n2 * SHAPE[7]
    scale = _exact(scale_2, rest_2, ACC)
    b_sum = tl.zeros([TQ, TK], ACC)
    for r in range(i_split, batch * tiles, splits):
        i_tile = r % tiles
        i_b = (r // tiles).to(tl.int64)
        c = CORNER(P, i_tile, SHAPE[2], SHAPE[3], SHAPE[4])
        a0, z0 = RANGE(P, c, 0, SHAPE[2], SHAPE[8])
        a1, z1 = RANGE(P, c, 1, SHAPE[3], SHAPE[9])
        a2, z2 = RANGE(P, c, 2, SHAPE[4], SHAPE[10])
        k0 = c[1] + d0
        k1 = c[4] + d1
        k2 = c[7] + d2
        meet = (k0 < z0) & (k0 + SHAPE[5] > a0) & (k1 < z1) & (k1 + SHAPE[6] > a1)
        if meet & (k2 < z2) & (k2 + SHAPE[7] > a2):
            o_q, m_q, of_q = OWN(P, SHAPE, i_tile)
            x0, x1, x2 = BOX(k0, k1, k2, SHAPE[5], SHAPE[6], SHAPE[7])
            m_k = (x0 >= 0) & (x0 < c[2]) & (x1 >= 0) & (x1 < c[5]) & (x2 >= 0) & (x2 < c[8])
            o_k = TOKENS(P, c[0], c[3], c[6], x0, x1, x2)
            b_q = _rows(p_q + i_b * q_b + i_h * q_h, q_n, o_q, m_q, D, PD)
            b_do = _rows(p_do + i_b * do_b + i_h * do_h, do_n, o_q, m_q, DV, PDV)
            b_k = _rows(p_k + i_b * k_b + i_h // shared * k_h, k_n, o_k, m_k, D, PD)
            b_v = _rows(p_v + i_b * v_b + i_h // shared * v_h, v_n, o_k, m_k, DV, PDV)
            p_rows_h = p_rows + (i_b * heads + i_h) * queries
            b_lse = tl.load(p_rows_h + o_q, mask=m_q, other=0.0)
            b_delta = tl.load(p_rows_h + rows_size + o_q, mask=m_q, other=0.0)
            b_s = _logits(
                b_q, b_k, scale, B, P, SHAPE, o_q, o_k, m_q, m_k, of_q, (x0, x1, x2), i_b, i_h, 0, ALLOW,
                BIAS, PREC, ACC,
            )  # fmt: skip
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PREC, out_dtype=ACC)
            b_ds = tl.exp2(b_s - b_lse[:, None]) * (b_dp - b_delta[:, None])
            b_sum += tl.where(m_q[:, None], b_ds, 0.0)
    o = tl.arange(0, TQ)[:, None] * TK + tl.arange(0, TK)[None, :]
    p_sums += ((i_split * heads + i_h) * (n0 * n1 * n2) + i_place) * (TQ * TK)
    tl.store(p_sums + o, b_sum)


@triton.jit
def dbilinear_kernel(
    p_q, p_k, p_v, p_do, p_rows, p_dtable, p_dplaces, B, P, scale_2, rest_2, tiles, heads, shared, queries,
    keys, rows_size, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h,
    SHAPE: tl.constexpr, OWN: tl.constexpr, QUERIES_OF: tl.constexpr, VISIT: tl.constexpr,
    ALLOW: tl.constexpr, BIAS: tl.constexpr, PLACE: tl.constexpr, CORNER: tl.constexpr, TK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PDV: tl.constexpr, PREC: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of a table read between its entries, and of where it is read, by key and head.

    The one kernel that adds in no fixed order: which entry a pair reads, its data say.
    """
    i = tl.program_id(0)
    i_tile = i % tiles
    i_h = (i // tiles % heads).to(tl.int64)
    i_b = (i // tiles // heads).to(tl.int64)
    o_k, m_k, of_k = OWN(P, SHAPE, i_tile)
    b_k = _rows(p_k + i_b * k_b + i_h // shared * k_h, k_n, o_k, m_k, D, PD)
    b_v = _rows(p_v + i_b * v_b + i_h // shared * v_h, v_n, o_k, m_k, DV, PDV)
    scale = _exact(scale_2, rest_2, ACC)
    b_dy = tl.zeros([TK], ACC)
    b_dx = tl.zeros([TK], ACC)
    p_rows_h = p_rows + (i_b * heads + i_h) * queries
    count, where = QUERIES_OF(P, SHAPE, i_tile, i_b, i_h)
    for t in range(0, count):
        o_q, m_q, of_q = VISIT(P, SHAPE, where, t)
        b_q = _rows(p_q + i_b * q_b + i_h * q_h, q_n, o_q, m_q, D, PD)
        b_do = _rows(p_do + i_b * do_b + i_h * do_h, do_n, o_q, m_q, DV, PDV)
        b_lse = tl.load(p_rows_h + o_q, mask=m_q, other=0.0)
        b_delta = tl.load(p_rows_h + rows_size + o_q, mask=m_q, other=0.0)
        # [TQ, TK]
        b_s = _logits(
            b_q, b_k, scale, B, P, SHAPE, o_q, o_k, m_q, m_k, of_q, of_k, i_b, i_h, 0, ALLOW, BIAS, PREC, ACC
        )  # fmt: skip
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PREC, out_dtype=ACC)
        b_ds = tl.exp2(b_s - b_lse[:, None]) * (b_dp - b_delta[:, None])
        m = m_q[:, None] & m_k[None, :]
        b_ds = tl.where(m, b_ds, 0.0)
        y, x = PLACE(B, o_q, o_k, m_k, i_b, i_h, 0)
        for step_y in tl.static_range(2):
            for step_x in tl.static_range(2):
                share_y, share_x, o, inside = CORNER(y, x, B[2], B[3], step_y, step_x)
                value = b_ds * tl.load(B[0] + i_h * B[1] + o, mask=m & inside, other=0.0)
                b_dy += tl.sum(value * share_x, 0) * (2 * step_y - 1)
                b_dx += tl.sum(value * share_y, 0) * (2 * step_x - 1)
                p_entry = p_dtable + i_h * B[2] * B[3] + o
                tl.atomic_add(p_entry, b_ds * share_y * share_x, mask=m & inside, sem="relaxed")
    # Rows of the table for a step of the key's position.
    p_dplaces += ((i_b * heads + i_h) * keys + o_k.to(tl.int64)) * 2
    tl.store(p_dplaces, b_dy * (1 - B[2]) / 4, mask=m_k)
    tl.store(p_dplaces + 1, b_dx * (1 - B[3]) / 4, mask=m_k)
