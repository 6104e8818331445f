"""Block-sparse attention in Triton against the definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpret.sanitizer import mend_bfloat16

from zoo import ops
from zoo.kernels.block_sparse import schema
from zoo.ops import BlockList

TIGHT = {"rtol": 1e-12, "atol": 1e-13}


def inputs(n, m=None, *, batch=1, heads=1, kv_heads=None, dim=8, v_dim=None, dtype=torch.float64):
    shape = lambda tokens, h, d: (batch, tokens, h, d)  # noqa: E731
    m, kv_heads = m or n, kv_heads or heads
    shapes = shape(n, heads, dim), shape(m, kv_heads, dim), shape(m, kv_heads, v_dim or dim)
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def random_mask(*shape, keep=0.6):
    mask = torch.rand(shape) < keep
    mask[..., 0, :] = False
    return mask


def everything(leaves, blocks, backend, bias=None, grads=None):
    """Output, LSE and every gradient, the LSE's included."""
    out, lse = ops.block_sparse_attention(*leaves, blocks, bias=bias, return_lse=True, backend=backend)
    wanted = [*leaves, bias] if bias is not None and bias.requires_grad else leaves
    given_out, given_lse = grads
    finite = lse.masked_fill(lse == -math.inf, 0.0)
    loss = (out * given_out.to(out.dtype)).sum() + (finite * given_lse.to(lse.dtype)).sum()
    return [out, lse, *torch.autograd.grad(loss, wanted)]


def compare(leaves, blocks, bias=None, **tolerance):
    q, _, v = leaves
    grads = torch.randn(*q.shape[:3], v.shape[-1]), torch.randn(q.shape[:3])
    found, truth = (everything(leaves, blocks, b, bias, grads) for b in ("triton", "reference"))
    for fast, slow in zip(found, truth, strict=True):
        torch.testing.assert_close(fast, slow, **(tolerance or TIGHT))


@pytest.mark.parametrize(
    ("n", "dim", "block"), [(1, 10, 16), (2, 12, 1), (5, 33, 2), (17, 59, 7), (97, 80, 32), (257, 111, 128)]
)
def test_any_length_and_width_is_exact(n, dim, block):
    count = -(-n // block)
    mask = random_mask(count, count) if count > 1 else torch.ones(1, 1).bool()
    compare(inputs(n, dim=dim, v_dim=dim + 3), BlockList.from_mask(mask, block_size=block))


@pytest.mark.parametrize("lists", [(2,), (2, 1), (2, 2)])
def test_lists_by_image_and_head_with_shared_keys(lists, small_tiles):
    mask = random_mask(*lists, 2, 2)
    compare(inputs(34, 20, batch=2, heads=2, kv_heads=1), BlockList.from_mask(mask, block_size=(20, 17)))


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2)])
def test_a_bias_and_its_gradient_however_it_is_shared(shape, small_tiles):
    bias = torch.randn(*shape, 21, 18, dtype=torch.float64, requires_grad=True)
    blocks = BlockList.from_mask(random_mask(2, 1, 2, 2), block_size=(16, 16))
    compare(inputs(21, 18, batch=2, heads=2), blocks, bias)


def test_segments(small_tiles):
    blocks = BlockList.from_segments([3, 0, 21, 13], [9, 2, 18, 0], block_size=(16, 10))
    compare(inputs(37, 29), blocks)


def test_a_row_that_sees_nothing_is_zero_with_finite_gradients():
    leaves = inputs(40, dtype=torch.float32)
    blocks = BlockList.from_mask(torch.tensor([[0, 0], [1, 0]]).bool(), block_size=20)
    bias = torch.zeros(40, 40)
    bias[25] = -math.inf
    out, lse = ops.block_sparse_attention(*leaves, blocks, bias=bias, return_lse=True, backend="triton")
    for rows in (slice(0, 20), slice(25, 26)):
        assert (out[:, rows] == 0).all() and (lse[:, rows] == -math.inf).all()
    for x in torch.autograd.grad(out.sum() + lse[:, 26:].sum(), leaves):
        assert x.isfinite().all()


def test_large_and_small_logits_do_not_overflow(small_tiles):
    q, k, v = inputs(40)
    blocks = BlockList.from_mask(torch.ones(3, 3).bool(), block_size=16)
    with torch.no_grad():
        q *= 300
    compare([q, k, v], blocks, rtol=1e-9, atol=1e-9)


@settings(
    max_examples=3,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    st.integers(1, 50),
    st.integers(1, 50),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from([1, 2]),
    st.floats(0, 1),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_blocks(small_tiles, n, m, size, kv_heads, keep, biased, seed):
    torch.manual_seed(seed)
    mask = torch.rand(-(-n // size[0]), -(-m // size[1])) < keep
    bias = torch.randn(n, m, dtype=torch.float64, requires_grad=True) if biased else None
    compare(inputs(n, m, heads=kv_heads, kv_heads=1, dim=5), BlockList.from_mask(mask, block_size=size), bias)


def test_gradients_are_those_of_finite_differences():
    q, k, v = inputs(6, 7, batch=1, heads=2, kv_heads=1, dim=3, v_dim=2)
    bias = torch.randn(1, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    blocks = BlockList.from_mask(torch.tensor([[1, 0], [1, 1]]).bool(), block_size=(3, 4))

    def run(q, k, v, bias):
        return ops.block_sparse_attention(
            q, k, v, blocks, bias=bias, return_lse=True, scale=0.7, backend="triton"
        )

    assert torch.autograd.gradcheck(run, (q, k, v, bias), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_as_close_to_truth_as_the_definition(dtype, monkeypatch):
    if dtype == torch.bfloat16:
        mend_bfloat16(monkeypatch)
        monkeypatch.setattr("zoo.kernels.tile.why_not", lambda q, v: None)
    low = [x.detach().to(dtype).requires_grad_() for x in inputs(97, dim=33)]
    blocks = BlockList.from_mask(random_mask(4, 4), block_size=32)
    grads = torch.randn(1, 97, 1, 33, dtype=dtype), torch.zeros(1, 97, 1)
    truth = everything([x.detach().double().requires_grad_() for x in low], blocks, "reference", None, grads)
    errors = {
        backend: [
            (a.double() - b).masked_fill(b.isinf(), 0.0).abs().max()
            for a, b in zip(everything(low, blocks, backend, None, grads), truth, strict=True)
        ]
        for backend in ("triton", "reference")
    }
    # The interpreter cuts float32 to bfloat16 where a GPU rounds: twice the error.
    slack = 4 if dtype == torch.bfloat16 else 1
    for place, (fast, budget) in enumerate(zip(errors["triton"], errors["reference"], strict=True)):
        low_products = 0 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps  # p and ds are cast
        assert fast <= slack * (2 * budget + low_products + (1e-5 if place < 2 else 2e-4)), place


def test_strided_expanded_and_empty_inputs():
    q, k, v = torch.randn(2, 33, 3, 1, 8).unbind(2)
    blocks = BlockList.from_mask(torch.ones(3, 3).bool(), block_size=16)
    run = lambda *x: ops.block_sparse_attention(*x, blocks, backend="triton")  # noqa: E731
    torch.testing.assert_close(run(q, k, v), run(*(x.contiguous() for x in (q, k, v))), rtol=0, atol=0)
    one = q[:1].expand(2, -1, -1, -1)
    assert torch.equal(*run(one, one, one))
    turned = q.transpose(1, 3).contiguous().transpose(1, 3)  # channels not in a row
    torch.testing.assert_close(run(turned, k, v), run(q, k, v), rtol=0, atol=0)
    empty = q[:0].requires_grad_()
    out = run(empty, k[:0], v[:0])
    assert out.shape == (0, 33, 1, 8)
    assert torch.autograd.grad(out.sum(), empty)[0].shape == (0, 33, 1, 8)


def test_the_same_call_gives_the_same_bits_and_any_order_of_a_list_the_same_numbers():
    leaves = inputs(64, dtype=torch.float32)
    rows = BlockList.from_indices(torch.tensor([[0, 2], [3, 1], [2, 3], [1, 0]]), key_blocks=4, block_size=16)
    turned = BlockList.from_indices(
        torch.tensor([[2, 0], [1, 3], [3, 2], [0, 1]]), key_blocks=4, block_size=16
    )
    grads = torch.randn(1, 64, 1, 8), torch.randn(1, 64, 1)
    first, again, other = (
        everything(leaves, blocks, "triton", None, grads) for blocks in (rows, rows, turned)
    )
    assert all(map(torch.equal, first, again))
    for a, b in zip(first, other, strict=True):
        torch.testing.assert_close(a, b)


def test_the_operator_is_one_to_tracers():
    q, k, v = (x.detach().float().requires_grad_() for x in inputs(20, batch=1))
    blocks = BlockList.from_mask(torch.ones(2, 2).bool(), block_size=16)
    lists = (blocks.offsets, blocks.indices, blocks.inverse_offsets, blocks.inverse_indices)
    arguments = (q, k, v, None, *lists, None, None, 16, 16, 0.5, "triton")
    torch.library.opcheck(schema.forward, arguments, test_utils=("test_schema", "test_faketensor"))

    def layer(q, k, v):
        return ops.block_sparse_attention(q * 1.0, k, v, blocks, backend="triton").sin()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), layer(q, k, v))
    for a, b in zip(
        torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v)),
        torch.autograd.grad(layer(q, k, v).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_explain_and_refusals():
    q, k, v = inputs(32, dtype=torch.float32)
    blocks = BlockList.from_mask(torch.ones(2, 2).bool(), block_size=16)
    told = ops.explain("block_sparse_attention", q, k, v, blocks)
    assert told.backend == "triton"
    assert told.configuration.startswith("tiles of 16 queries and 16 keys")
    wide = torch.randn(1, 32, 1, 300)
    with pytest.raises(RuntimeError, match="more than 256 channels, found 300; use cpu or reference"):
        ops.block_sparse_attention(wide, wide, wide, blocks, backend="triton")
    half = [x.bfloat16() for x in (q, k, v)]
    with pytest.raises(RuntimeError, match="bfloat16"):
        ops.block_sparse_attention(*half, blocks, backend="triton")
