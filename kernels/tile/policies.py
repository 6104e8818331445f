"""Which tiles meet: the policies of the template, each a handful of jit functions.

A policy is handed to the template as functions in constexpr arguments. All of them take the policy's data P,
a tuple of numbers and pointers, and SHAPE, a tuple of constants:

    own_*(P, SHAPE, i_tile)                tokens, which of them exist, what a mask needs of them
    *_of(P, SHAPE, i_tile, i_b, i_h)       how many tiles of the other side meet this one, and where they are
    visit_*(P, SHAPE, where, t)            tokens, existence and mask facts of the t-th of them
    allow(P, SHAPE, of_q, of_k, m_k, Q)    which pairs see each other; queries run along axis Q of the result
"""

# Triton compiles both branches where a return ends a constant condition, unless the other is an else.
# ruff: noqa: RET505

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def along(x, AXIS: tl.constexpr):
    """A vector as axis AXIS of a tile."""
    return tl.expand_dims(x, 1 - AXIS)


# Dense: P = (N, M), SHAPE = (TQ, TK) -----------------------------------------------------------------------


@triton.jit
def dense_own_q(P, SHAPE: tl.constexpr, i_tile):
    o = i_tile * SHAPE[0] + tl.arange(0, SHAPE[0])
    return o, o < P[0], (o,)


@triton.jit
def dense_own_k(P, SHAPE: tl.constexpr, i_tile):
    o = i_tile * SHAPE[1] + tl.arange(0, SHAPE[1])
    return o, o < P[1], (o,)


@triton.jit
def dense_keys_of(P, SHAPE: tl.constexpr, i_tile, i_b, i_h):
    return tl.cdiv(P[1], SHAPE[1]), (0,)


@triton.jit
def dense_queries_of(P, SHAPE: tl.constexpr, i_tile, i_b, i_h):
    return tl.cdiv(P[0], SHAPE[0]), (0,)


@triton.jit
def dense_visit_k(P, SHAPE: tl.constexpr, where, t):
    return dense_own_k(P, SHAPE, t)


@triton.jit
def dense_visit_q(P, SHAPE: tl.constexpr, where, t):
    return dense_own_q(P, SHAPE, t)


@triton.jit
def dense_allow(P, SHAPE: tl.constexpr, of_q, of_k, m_k, Q: tl.constexpr):
    return along(of_q[0] >= 0, Q) & along(m_k, 1 - Q)


# Block lists -----------------------------------------------------------------------------------------------
# P = (offsets, indices, inverse offsets, inverse indices, query segments, key segments, N, M,
#      strides of the four lists by image and by head)
# SHAPE = (TQ, TK, queries per block, keys per block, every key tile is full, segments)


@triton.jit
def _in_block(block, sub, tokens, T: tl.constexpr, SIZE: tl.constexpr):
    """Tokens of the sub-th tile of a block: a block may need several tiles, and fill the last in part."""
    o = sub * T + tl.arange(0, T)
    return block * SIZE + o, (o < SIZE) & (block * SIZE + o < tokens)


@triton.jit
def _of_list(p_offsets, offsets_b, offsets_h, indices_b, indices_h, row, i_b, i_h, SUB: tl.constexpr):
    """How many tiles row `row` of list (i_b, i_h) names, and where its entries begin."""
    p_row = p_offsets + i_b * offsets_b + i_h * offsets_h + row
    begin = tl.load(p_row)
    return (tl.load(p_row + 1) - begin) * SUB, (i_b * indices_b + i_h * indices_h + begin,)


@triton.jit
def list_query_facts(P, SHAPE: tl.constexpr, o, m):
    if SHAPE[5]:
        return (tl.load(P[4] + o, mask=m, other=-1),)
    else:
        return (o,)


@triton.jit
def list_key_facts(P, SHAPE: tl.constexpr, o, m):
    if SHAPE[5]:
        return (tl.load(P[5] + o, mask=m, other=-2),)
    else:
        return (o,)


@triton.jit
def list_own_q(P, SHAPE: tl.constexpr, i_tile):
    SUB: tl.constexpr = (SHAPE[2] + SHAPE[0] - 1) // SHAPE[0]
    o, m = _in_block(i_tile // SUB, i_tile % SUB, P[6], SHAPE[0], SHAPE[2])
    return o, m, list_query_facts(P, SHAPE, o, m)


@triton.jit
def list_own_k(P, SHAPE: tl.constexpr, i_tile):
    SUB: tl.constexpr = (SHAPE[3] + SHAPE[1] - 1) // SHAPE[1]
    o, m = _in_block(i_tile // SUB, i_tile % SUB, P[7], SHAPE[1], SHAPE[3])
    return o, m, list_key_facts(P, SHAPE, o, m)


@triton.jit
def list_keys_of(P, SHAPE: tl.constexpr, i_tile, i_b, i_h):
    SUB_Q: tl.constexpr = (SHAPE[2] + SHAPE[0] - 1) // SHAPE[0]
    SUB_K: tl.constexpr = (SHAPE[3] + SHAPE[1] - 1) // SHAPE[1]
    return _of_list(P[0], P[8], P[9], P[10], P[11], i_tile // SUB_Q, i_b, i_h, SUB_K)


@triton.jit
def list_queries_of(P, SHAPE: tl.constexpr, i_tile, i_b, i_h):
    SUB_Q: tl.constexpr = (SHAPE[2] + SHAPE[0] - 1) // SHAPE[0]
    SUB_K: tl.constexpr = (SHAPE[3] + SHAPE[1] - 1) // SHAPE[1]
    return _of_list(P[2], P[12], P[13], P[14], P[15], i_tile // SUB_K, i_b, i_h, SUB_Q)


@triton.jit
def list_visit_k(P, SHAPE: tl.constexpr, where, t):
    SUB: tl.constexpr = (SHAPE[3] + SHAPE[1] - 1) // SHAPE[1]
    block = tl.load(P[1] + where[0] + t // SUB)
    o, m = _in_block(block, t % SUB, P[7], SHAPE[1], SHAPE[3])
    if SHAPE[4]:
        m = tl.full([SHAPE[1]], True, tl.int1)
    return o, m, list_key_facts(P, SHAPE, o, m)


@triton.jit
def list_visit_q(P, SHAPE: tl.constexpr, where, t):
    SUB: tl.constexpr = (SHAPE[2] + SHAPE[0] - 1) // SHAPE[0]
    block = tl.load(P[3] + where[0] + t // SUB)
    o, m = _in_block(block, t % SUB, P[6], SHAPE[0], SHAPE[2])
    return o, m, list_query_facts(P, SHAPE, o, m)


@triton.jit
def list_allow(P, SHAPE: tl.constexpr, of_q, of_k, m_k, Q: tl.constexpr):
    if SHAPE[5]:  # a key that does not exist has a segment that no query has
        return along(of_q[0], Q) == along(of_k[0], 1 - Q)
    else:
        return along(of_q[0] >= 0, Q) & along(m_k, 1 - Q)


# Routed regions --------------------------------------------------------------------------------------------
# P = (lists of the regions that query regions chose, offsets and entries of the inverse lists, regions,
#      regions in a row, columns of the query map, columns of the key map)
# SHAPE = (TQ, TK, queries and keys of a region, columns of a query and a key region, regions chosen,
#          every key tile is full)
# A tile that is visited takes the tokens of the listed regions one after the other, so that small regions
# fill it together; a tile that owns lies in one region.


@triton.jit
def _in_region(region, place, P, SIZE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Token of the map at a place of a region."""
    row = region // P[4] * (SIZE // WIDTH) + place // WIDTH
    return row * P[COLUMNS] + region % P[4] * WIDTH + place % WIDTH


@triton.jit
def region_own_q(P, SHAPE: tl.constexpr, i_tile):
    SUB: tl.constexpr = (SHAPE[2] + SHAPE[0] - 1) // SHAPE[0]
    place = i_tile % SUB * SHAPE[0] + tl.arange(0, SHAPE[0])
    return _in_region(i_tile // SUB, place, P, SHAPE[2], SHAPE[4], 5), place < SHAPE[2], (place,)


@triton.jit
def region_own_k(P, SHAPE: tl.constexpr, i_tile):
    SUB: tl.constexpr = (SHAPE[3] + SHAPE[1] - 1) // SHAPE[1]
    place = i_tile % SUB * SHAPE[1] + tl.arange(0, SHAPE[1])
    return _in_region(i_tile // SUB, place, P, SHAPE[3], SHAPE[5], 6), place < SHAPE[3], (place,)


@triton.jit
def region_keys_of(P, SHAPE: tl.constexpr, i_tile, i_b, i_h):
    SUB: tl.constexpr = (SHAPE[2] + SHAPE[0] - 1) // SHAPE[0]
    slots: tl.constexpr = SHAPE[6] * SHAPE[3]
    return tl.cdiv(slots, SHAPE[1]), ((i_b * P[3] + i_tile // SUB) * SHAPE[6],)


@triton.jit
def region_queries_of(P, SHAPE: tl.constexpr, i_tile, i_b, i_h):
    SUB: tl.constexpr = (SHAPE[3] + SHAPE[1] - 1) // SHAPE[1]
    p_row = P[1] + i_b * (P[3] + 1) + i_tile // SUB
    begin = tl.load(p_row)
    slots = (tl.load(p_row + 1) - begin) * SHAPE[2]
    return tl.cdiv(slots, SHAPE[0]), (i_b * P[3] * SHAPE[6] + begin, slots)


@triton.jit
def region_visit_k(P, SHAPE: tl.constexpr, where, t):
    slot = t * SHAPE[1] + tl.arange(0, SHAPE[1])
    m = slot < SHAPE[6] * SHAPE[3]
    if SHAPE[7]:
        m = tl.full([SHAPE[1]], True, tl.int1)
    region = tl.load(P[0] + where[0] + slot // SHAPE[3], mask=m, other=0)
    return _in_region(region, slot % SHAPE[3], P, SHAPE[3], SHAPE[5], 6), m, (slot,)


@triton.jit
def region_visit_q(P, SHAPE: tl.constexpr, where, t):
    slot = t * SHAPE[0] + tl.arange(0, SHAPE[0])
    m = slot < where[1]
    region = tl.load(P[2] + where[0] + slot // SHAPE[2], mask=m, other=0)
    return _in_region(region, slot % SHAPE[2], P, SHAPE[2], SHAPE[4], 5), m, (slot,)


# Neighborhoods ---------------------------------------------------------------------------------------------
# Three axes always; a grid of fewer has axes of length 1 in front, which the compiler folds away.
# P = (length, kernel size, dilation, stride) of every axis
# SHAPE = (TQ, TK, three sides of a query tile, three of a key tile, three times how a window meets a border,
#          rank): 0 shifts inward, CAUSAL ends at the query, CLIPPED is cut off, its kernel size odd
# A tile is a box of one dilation group; positions count inside the group.

CAUSAL = tl.constexpr(1)
CLIPPED = tl.constexpr(2)


@triton.jit
def _first_key(p, K, S, n, BORDER: tl.constexpr):
    """First key position of the window of position p in a group of n."""
    if BORDER == CLIPPED:
        return tl.maximum(p - K // 2, 0)
    elif BORDER == CAUSAL:
        return tl.maximum(tl.minimum(p // S * S + S - 1, n - 1) - K + 1, 0)
    else:
        return tl.minimum(tl.maximum(tl.minimum(p // S * S + S // 2, n - 1) - K // 2, 0), n - K)


@triton.jit
def _last_key(p, K, S, n, BORDER: tl.constexpr):
    """One past the last key position."""
    if BORDER == CLIPPED:
        return tl.minimum(p + K // 2 + 1, n)
    elif BORDER == CAUSAL:
        return p + 1
    else:
        return _first_key(p, K, S, n, BORDER) + K


@triton.jit
def _first_query(c, K, S, n, BORDER: tl.constexpr):
    """First position whose window ends after key position c: windows only move forward."""
    if BORDER == CLIPPED:
        return tl.maximum(c - K // 2, 0)
    elif BORDER == CAUSAL:
        return c
    else:
        # Its leader is at least c - K + 1 + K // 2, unless the window is the first of all.
        leader = tl.maximum(c - K + 1 + K // 2 - S // 2, 0)
        return tl.where(c < K, 0, (leader + S - 1) // S * S)


@triton.jit
def _last_query(c, K, S, n, BORDER: tl.constexpr):
    """One past the last position whose window begins at key position c or before."""
    if BORDER == CLIPPED:
        return tl.minimum(c + K // 2 + 1, n)
    elif BORDER == CAUSAL:
        return tl.where(c + K >= n, n, tl.minimum(n, ((c + K - S) // S + 1) * S))
    else:
        return tl.where(c + K >= n, n, tl.minimum(n, ((c + K // 2 - S // 2) // S + 1) * S))


@triton.jit
def _tiles(P, A: tl.constexpr, SIDE: tl.constexpr):
    """Tiles of a group along an axis; the first group is the longest."""
    return tl.cdiv(tl.cdiv(P[4 * A], P[4 * A + 2]), SIDE)


@triton.jit
def _corner_on_axis(P, i, A: tl.constexpr, SIDE: tl.constexpr):
    """Group, first position and length of the group of the i-th tile along an axis."""
    tiles = _tiles(P, A, SIDE)
    group = i // tiles
    return group, i % tiles * SIDE, tl.cdiv(P[4 * A] - group, P[4 * A + 2])


@triton.jit
def na_corner(P, i_tile, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr):
    """(group, position, length of the group) of a tile on all three axes."""
    n1 = _tiles(P, 1, S1) * P[6]
    n2 = _tiles(P, 2, S2) * P[10]
    g0, p0, l0 = _corner_on_axis(P, i_tile // (n1 * n2), 0, S0)
    g1, p1, l1 = _corner_on_axis(P, i_tile // n2 % n1, 1, S1)
    g2, p2, l2 = _corner_on_axis(P, i_tile % n2, 2, S2)
    return (g0, p0, l0, g1, p1, l1, g2, p2, l2)


@triton.jit
def na_tokens(P, g0, g1, g2, p0, p1, p2):
    return ((p0 * P[2] + g0) * P[4] + p1 * P[6] + g1) * P[8] + p2 * P[10] + g2


@triton.jit
def na_query_facts(P, SHAPE: tl.constexpr, p0, p1, p2, l0, l1, l2):
    """First keys of all axes, then positions."""
    return (
        _first_key(p0, P[1], P[3], l0, SHAPE[8]),
        _first_key(p1, P[5], P[7], l1, SHAPE[9]),
        _first_key(p2, P[9], P[11], l2, SHAPE[10]),
        p0,
        p1,
        p2,
    )


@triton.jit
def na_box(p0, p1, p2, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr):
    """Positions of all tokens of a box with its corner at (p0, p1, p2)."""
    o = tl.arange(0, S0 * S1 * S2)
    return p0 + o // (S1 * S2), p1 + o // S2 % S1, p2 + o % S2


@triton.jit
def na_own_q(P, SHAPE: tl.constexpr, i_tile):
    c = na_corner(P, i_tile, SHAPE[2], SHAPE[3], SHAPE[4])
    p0, p1, p2 = na_box(c[1], c[4], c[7], SHAPE[2], SHAPE[3], SHAPE[4])
    m = (p0 < c[2]) & (p1 < c[5]) & (p2 < c[8])
    facts = na_query_facts(P, SHAPE, p0, p1, p2, c[2], c[5], c[8])
    return na_tokens(P, c[0], c[3], c[6], p0, p1, p2), m, facts


@triton.jit
def na_own_k(P, SHAPE: tl.constexpr, i_tile):
    c = na_corner(P, i_tile, SHAPE[5], SHAPE[6], SHAPE[7])
    p0, p1, p2 = na_box(c[1], c[4], c[7], SHAPE[5], SHAPE[6], SHAPE[7])
    m = (p0 < c[2]) & (p1 < c[5]) & (p2 < c[8])
    return na_tokens(P, c[0], c[3], c[6], p0, p1, p2), m, (p0, p1, p2)


@triton.jit
def na_key_range(P, c, A: tl.constexpr, SIDE: tl.constexpr, BORDER: tl.constexpr):
    """Keys on an axis that some query of the tile sees; none for a tile past the end of its group."""
    n = c[3 * A + 2]
    first = c[3 * A + 1]
    last = tl.minimum(first + SIDE, n) - 1
    low = _first_key(first, P[4 * A + 1], P[4 * A + 3], n, BORDER)
    high = _last_key(last, P[4 * A + 1], P[4 * A + 3], n, BORDER)
    return low, tl.where(first < n, high, low)


@triton.jit
def _query_range(P, c, A: tl.constexpr, SIDE: tl.constexpr, BORDER: tl.constexpr):
    """Queries on an axis that see some key of the tile."""
    n = c[3 * A + 2]
    first = c[3 * A + 1]
    last = tl.minimum(first + SIDE, n) - 1
    low = _first_query(first, P[4 * A + 1], P[4 * A + 3], n, BORDER)
    high = _last_query(last, P[4 * A + 1], P[4 * A + 3], n, BORDER)
    return low, tl.where(first < n, tl.maximum(high, low), low)


@triton.jit
def na_keys_of(P, SHAPE: tl.constexpr, i_tile, i_b, i_h):
    c = na_corner(P, i_tile, SHAPE[2], SHAPE[3], SHAPE[4])
    a0, z0 = na_key_range(P, c, 0, SHAPE[2], SHAPE[8])
    a1, z1 = na_key_range(P, c, 1, SHAPE[3], SHAPE[9])
    a2, z2 = na_key_range(P, c, 2, SHAPE[4], SHAPE[10])
    n1 = tl.cdiv(z1 - a1, SHAPE[6])
    n2 = tl.cdiv(z2 - a2, SHAPE[7])
    count = tl.cdiv(z0 - a0, SHAPE[5]) * n1 * n2
    return count, (a0, a1, a2, z0, z1, z2, n1, n2, c[0], c[3], c[6])


@triton.jit
def na_queries_of(P, SHAPE: tl.constexpr, i_tile, i_b, i_h):
    c = na_corner(P, i_tile, SHAPE[5], SHAPE[6], SHAPE[7])
    a0, z0 = _query_range(P, c, 0, SHAPE[5], SHAPE[8])
    a1, z1 = _query_range(P, c, 1, SHAPE[6], SHAPE[9])
    a2, z2 = _query_range(P, c, 2, SHAPE[7], SHAPE[10])
    n1 = tl.cdiv(z1 - a1, SHAPE[3])
    n2 = tl.cdiv(z2 - a2, SHAPE[4])
    count = tl.cdiv(z0 - a0, SHAPE[2]) * n1 * n2
    return count, (a0, a1, a2, z0, z1, z2, n1, n2, c[0], c[3], c[6], c[2], c[5], c[8])


@triton.jit
def na_visit_k(P, SHAPE: tl.constexpr, where, t):
    n1 = where[6]
    n2 = where[7]
    p0, p1, p2 = na_box(
        where[0] + t // (n1 * n2) * SHAPE[5],
        where[1] + t // n2 % n1 * SHAPE[6],
        where[2] + t % n2 * SHAPE[7],
        SHAPE[5],
        SHAPE[6],
        SHAPE[7],
    )
    m = (p0 < where[3]) & (p1 < where[4]) & (p2 < where[5])
    return na_tokens(P, where[8], where[9], where[10], p0, p1, p2), m, (p0, p1, p2)


@triton.jit
def na_visit_q(P, SHAPE: tl.constexpr, where, t):
    n1 = where[6]
    n2 = where[7]
    p0, p1, p2 = na_box(
        where[0] + t // (n1 * n2) * SHAPE[2],
        where[1] + t // n2 % n1 * SHAPE[3],
        where[2] + t % n2 * SHAPE[4],
        SHAPE[2],
        SHAPE[3],
        SHAPE[4],
    )
    m = (p0 < where[3]) & (p1 < where[4]) & (p2 < where[5])
    facts = na_query_facts(P, SHAPE, p0, p1, p2, where[11], where[12], where[13])
    return na_tokens(P, where[8], where[9], where[10], p0, p1, p2), m, facts


@triton.jit
def _within(P, of_q, of_k, A: tl.constexpr, BORDER: tl.constexpr, Q: tl.constexpr):
    """Is the key in the query's window on this axis: one unsigned comparison for both ends."""
    apart = along(of_k[A], 1 - Q) - along(of_q[A], Q)
    if BORDER == CLIPPED:  # at the far border, keys that do not exist end it
        size = along(of_q[3 + A] + P[4 * A + 1] // 2 + 1 - of_q[A], Q)
    elif BORDER == CAUSAL:
        size = along(of_q[3 + A] + 1 - of_q[A], Q)
    else:
        size = tl.zeros([1, 1], tl.int32) + P[4 * A + 1]
    return apart.to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)


@triton.jit
def na_allow(P, SHAPE: tl.constexpr, of_q, of_k, m_k, Q: tl.constexpr):
    ok = _within(P, of_q, of_k, 2, SHAPE[10], Q)
    if SHAPE[11] > 1:
        ok &= _within(P, of_q, of_k, 1, SHAPE[9], Q)
    if SHAPE[11] > 2:
        ok &= _within(P, of_q, of_k, 0, SHAPE[8], Q)
    if (SHAPE[8] == CLIPPED) | (SHAPE[9] == CLIPPED) | (SHAPE[10] == CLIPPED):
        ok &= along(m_k, 1 - Q)
    return ok


# Biases: what is added to the logits of a tile -------------------------------------------------------------
# bias(B, P, SHAPE, o_q, o_k, m_q, m_k, of_q, of_k, ok, i_b, i_h, Q) with B the bias's own data


@triton.jit
def table_bias(B, P, SHAPE: tl.constexpr, o_q, o_k, m_q, m_k, of_q, of_k, ok, i_b, i_h, Q: tl.constexpr):
    """A number for each pair of tokens. B = (table, its four strides)."""
    o = along(o_q.to(tl.int64) * B[3], Q) + along(o_k.to(tl.int64) * B[4], 1 - Q)
    return tl.load(B[0] + i_b * B[1] + i_h * B[2] + o, mask=along(m_q, Q) & along(m_k, 1 - Q), other=0.0)


@triton.jit
def key_bias(B, P, SHAPE: tl.constexpr, o_q, o_k, m_q, m_k, of_q, of_k, ok, i_b, i_h, Q: tl.constexpr):
    """A number for each key of an image. B = (numbers, their strides of an image and a key)."""
    b = along(tl.load(B[0] + i_b * B[1] + o_k.to(tl.int64) * B[2], mask=m_k, other=0.0), 1 - Q)
    if Q == 1:  # dk and dv sum over queries: those past the end must keep a logit of 0
        b = tl.where(along(m_q, Q), b, 0.0)
    return b


@triton.jit
def relative_bias(B, P, SHAPE: tl.constexpr, o_q, o_k, m_q, m_k, of_q, of_k, ok, i_b, i_h, Q: tl.constexpr):
    """A number for each offset between key and query on the grid. B = (table, stride of a head)."""
    r2 = along(of_k[2], 1 - Q) - along(of_q[5], Q) + P[9] - 1
    if SHAPE[11] > 1:
        r2 += (along(of_k[1], 1 - Q) - along(of_q[4], Q) + P[5] - 1) * (2 * P[9] - 1)
    if SHAPE[11] > 2:
        r2 += (along(of_k[0], 1 - Q) - along(of_q[3], Q) + P[1] - 1) * ((2 * P[5] - 1) * (2 * P[9] - 1))
    return tl.load(B[0] + i_h * B[1] + r2, mask=ok & along(m_q, Q), other=0.0)


@triton.jit
def bilinear_bias(B, P, SHAPE: tl.constexpr, o_q, o_k, m_q, m_k, of_q, of_k, ok, i_b, i_h, Q: tl.constexpr):
    """A table read between its entries at half of query minus key.

    B = (table, stride of a head, rows and columns of the table, positions [B, G, N, 2], their strides of an
    image, a group and a key, heads of a group, columns of the query map, and for rows and columns the two
    numbers c and d that put token i at (2 i + c) / d - 1).
    """
    y, x = bilinear_place(B, o_q, o_k, m_k, i_b, i_h, Q)
    m = along(m_q, Q) & along(m_k, 1 - Q)
    bias = tl.zeros_like(y)
    for step_y in tl.static_range(2):
        for step_x in tl.static_range(2):
            share_y, share_x, o, inside = bilinear_corner(y, x, B[2], B[3], step_y, step_x)
            value = tl.load(B[0] + i_h * B[1] + o, mask=m & inside, other=0.0)
            bias += share_y * share_x * value
    return bias


@triton.jit
def bilinear_place(B, o_q, o_k, m_k, i_b, i_h, Q: tl.constexpr):
    """Where in the table the bias of a query and a key is read: row and column, between entries."""
    p_k = B[4] + i_b * B[5] + i_h // B[8] * B[6] + o_k.to(tl.int64) * B[7]
    y_k = tl.load(p_k, mask=m_k, other=0.0)
    x_k = tl.load(p_k + 1, mask=m_k, other=0.0)
    y_q = (2 * (o_q // B[9]) + B[10]).to(y_k.dtype) / B[11] - 1.0
    x_q = (2 * (o_q % B[9]) + B[12]).to(x_k.dtype) / B[13] - 1.0
    y = ((along(y_q, Q) - along(y_k, 1 - Q)) / 2 + 1.0) / 2 * (B[2] - 1)
    x = ((along(x_q, Q) - along(x_k, 1 - Q)) / 2 + 1.0) / 2 * (B[3] - 1)
    return y, x


@triton.jit
def bilinear_corner(y, x, rows, columns, STEP_Y: tl.constexpr, STEP_X: tl.constexpr):
    """One of the four entries around a place: its shares along both axes, where it is, whether it exists."""
    low_y = tl.floor(y)
    low_x = tl.floor(x)
    share_y = y - low_y if STEP_Y else 1.0 - (y - low_y)
    share_x = x - low_x if STEP_X else 1.0 - (x - low_x)
    at_y = low_y + STEP_Y
    at_x = low_x + STEP_X
    inside = (at_y >= 0) & (at_y < rows) & (at_x >= 0) & (at_x < columns)
    # A place that is no number is in no map, and its shares are none.
    o = tl.where(inside, at_y, 0.0).to(tl.int32) * columns + tl.where(inside, at_x, 0.0).to(tl.int32)
    return tl.where(inside, share_y, 0.0), tl.where(inside, share_x, 0.0), o, inside
