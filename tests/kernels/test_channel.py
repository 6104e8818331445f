"""Channel attention: both published forms are one operation, exact in half precision, with its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo import ops

BACKENDS = ("cpu", "reference")


def arguments(tokens=(7,), heads=2, width=3, k_width=None, batch=2, dtype=torch.float64):
    q = torch.randn(batch, *tokens, heads, width, dtype=dtype)
    k, v = torch.randn(2, batch, *tokens, heads, k_width or width, dtype=dtype).unbind(0)
    return q, k, v


def by_hand(q, k, v, scale):
    """Per image and head, with tokens as rows: softmax(scale q^T k) times every token's v."""
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[-2]):
            weights = (scale * q[b, :, h].T @ k[b, :, h]).softmax(dim=1)
            for n in range(q.shape[1]):
                out[b, n, h] = weights @ v[b, n, h]
    return out


@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(1, 9),
    heads=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    batch=st.integers(0, 3),
    scale=st.sampled_from([None, 0.3]),
)
def test_it_is_what_the_definition_says(tokens, heads, widths, batch, scale):
    q, k, v = arguments((tokens,), heads, *widths, batch=batch)
    expected = by_hand(q, k, v, widths[0] ** -0.5 if scale is None else scale)
    for backend in ("auto", "reference"):
        torch.testing.assert_close(ops.channel_attention(q, k, v, scale=scale, backend=backend), expected)
    if batch:
        torch.testing.assert_close(ops.channel_attention(q, k, v, scale=scale, backend="cpu"), expected)


def test_the_published_forms_are_this_operation_with_other_arguments():
    q, k, v = arguments((12,), heads=3, width=4)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    davit = (heads_first[1] * 4**-0.5).mT @ heads_first[2]
    davit = (davit.softmax(-1) @ heads_first[0].mT).mT.transpose(1, 2)
    torch.testing.assert_close(ops.channel_attention(k, v, q, scale=4**-0.5), davit)
    florence = ((heads_first[0] * 12**-0.5).mT @ heads_first[1]).softmax(-1)
    florence = (florence @ heads_first[2].mT).mT.transpose(1, 2)
    torch.testing.assert_close(ops.channel_attention(q, k, v, scale=12**-0.5), florence)


def test_tokens_may_lie_on_any_grid_in_any_order():
    q, k, v = arguments((3, 4))
    flat = ops.channel_attention(*(x.flatten(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(ops.channel_attention(q, k, v), flat.unflatten(1, (3, 4)))
    order = torch.randperm(12)
    moved = ops.channel_attention(*(x.flatten(1, 2)[:, order] for x in (q, k, v)))
    torch.testing.assert_close(moved, flat[:, order])
    views = [x.transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(ops.channel_attention(*views), flat.unflatten(1, (3, 4)).transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_on_a_cpu_no_weight_is_subnormal(dtype, training):
    """Products with such numbers are ten times slower; logits of many tokens make them."""
    tiny = torch.finfo(dtype).tiny
    width = 32
    # One token for each channel: k and v pick channels out, so that the output is the matrix of weights.
    logits = torch.linspace(0.0, 1.04 * math.log(tiny), width, dtype=dtype)
    one_hot = torch.eye(width, dtype=dtype)[None, :, None]  # [B, N, H, D]
    q = logits[None, :, None, None].repeat(1, 1, 1, width).requires_grad_(training)
    out = ops.channel_attention(q, one_hot, one_hot, scale=1.0, backend="cpu")
    assert not ((out > 0) & (out < tiny)).any()
    slow = ops.channel_attention(q, one_hot, one_hot, scale=1.0, backend="reference")
    assert ((slow > 0) & (slow < tiny)).any(), "these logits make subnormal weights"
    torch.testing.assert_close(out, slow, atol=tiny, rtol=1e-6)
    if training:
        assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_right_twice(backend):
    inputs = tuple(x.requires_grad_() for x in arguments((2, 3), k_width=2))

    def function(*inputs):
        return ops.channel_attention(*inputs, backend=backend)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_sums_over_tokens_in_float32(dtype, backend):
    """The logits of a whole map exceed half precision's range and resolution; the result must not."""
    q, k, v = (x.to(dtype) for x in arguments((3136,), width=16, dtype=torch.float32))
    q[..., 0] = k[..., 0] = 6
    exact = ops.channel_attention(*(x.double() for x in (q, k, v)))
    error = (ops.channel_attention(q, k, v, backend=backend).double() - exact).norm() / exact.norm()
    assert (q[..., 0].double() * k[..., 0].double()).sum(1).max() > 65504
    assert error < {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]


def test_autocast_compile_and_export():
    torch._dynamo.reset()
    inputs = tuple(arguments((5,), dtype=torch.float32))
    expected = ops.channel_attention(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = ops.channel_attention(inputs[0].bfloat16(), *inputs[1:])
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.03, atol=0.03)

    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return ops.channel_attention(q, k, v)

    compiled = torch.compile(Model(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), expected)
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = torch.export.export(Model(), inputs, dynamic_shapes=(free,) * 3)
    more = arguments((8,), batch=6, dtype=torch.float32)
    torch.testing.assert_close(program.module()(*more), ops.channel_attention(*more))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, r"q must be \[B, \*tokens, H, D\]"),
        ({"k": torch.zeros(2, 6, 2, 3)}, "k must have q's batch, tokens and heads"),
        ({"v": torch.zeros(2, 7, 2, 4)}, "v must have k's shape"),
        ({"v": torch.zeros(2, 7, 2, 3, dtype=torch.float64)}, "v must have q's dtype torch.float32"),
        ({"q": torch.zeros(2, 7, 2, 3, dtype=torch.long)}, "q must be float64"),
        ({"scale": torch.ones(())}, "scale must be a number"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    q, k, v = arguments(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        ops.channel_attention(**{"q": q, "k": k, "v": v, **change})


def test_explain_and_refusal():
    q, k, v = arguments()
    assert ops.explain("channel_attention", q, k, v).backend == "cpu"
    assert ops.explain("channel_attention", q, k, v, backend="reference").reason == "asked for by name"
    with pytest.raises(RuntimeError, match="cannot run channel_attention: there is no image"):
        ops.channel_attention(q[:0], k[:0], v[:0], backend="cpu")
