"""Window attention in Triton against the definition in float64."""

from __future__ import annotations

import math

import pytest
import torch

from zoo import ops
from zoo.kernels.window import schema

TIGHT = {"rtol": 1e-12, "atol": 1e-13}


@pytest.fixture(autouse=True)
def few_windows_at_once(monkeypatch):
    """Several windows for each program."""
    from zoo.kernels.window import triton

    monkeypatch.setattr(triton, "PROGRAMS", 6)
    monkeypatch.setattr(triton, "SUMS", 4)


def inputs(grid, *, batch=1, heads=1, kv_heads=None, dim=6, v_dim=None, dtype=torch.float64):
    shapes = ((heads, dim), (kv_heads or heads, dim), (kv_heads or heads, v_dim or dim))
    return [torch.randn(batch, *grid, *shape, dtype=dtype, requires_grad=True) for shape in shapes]


def everything(leaves, window, backend, grads, *, bias=None, shift=0):
    """Output, LSE and every gradient, the LSE's included."""
    out, lse = ops.window_attention(*leaves, window, shift=shift, bias=bias, return_lse=True, backend=backend)
    wanted = [*leaves, *([] if bias is None else [bias])]
    finite = lse.masked_fill(lse == -math.inf, 0.0)
    loss = (out * grads[0].to(out.dtype)).sum() + (finite * grads[1].to(lse.dtype)).sum()
    return [out, lse, *torch.autograd.grad(loss, wanted)]


def compare(leaves, window, **options):
    q, _, v = leaves
    grads = torch.randn(*q.shape[:-1], v.shape[-1]), torch.randn(q.shape[:-1])
    found, truth = (everything(leaves, window, b, grads, **options) for b in ("triton", "reference"))
    for fast, slow in zip(found, truth, strict=True):
        torch.testing.assert_close(fast, slow, **TIGHT)


def bias_of(heads, tokens, dtype=torch.float64):
    return torch.randn(heads, tokens, tokens, dtype=dtype, requires_grad=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "window", "dim"),
    [((1, 1), 1, 10), ((2, 6), (2, 3), 33), ((5, 17), (5, 1), 59), ((8, 16), 8, 80), ((7, 7), 7, 111)],
)
def test_any_window_and_width_is_exact(grid, window, dim):
    compare(inputs(grid, dim=dim, v_dim=dim + 3), window)


@pytest.mark.parametrize(
    "shift", [(1, 1), *(pytest.param(x, marks=pytest.mark.slow) for x in ((0, 0), (0, 1), (2, 0)))]
)
def test_shifted_windows_with_a_bias_and_its_gradient(shift):
    compare(inputs((6, 4), batch=2, heads=2), (3, 2), shift=shift, bias=bias_of(2, 6))


@pytest.mark.slow
def test_keys_shared_by_heads():
    compare(inputs((4, 6), heads=4, kv_heads=2, v_dim=5), 2, shift=1, bias=bias_of(4, 4))


@pytest.mark.slow
def test_a_row_from_which_the_bias_hides_everything_is_zero_with_finite_gradients():
    leaves = inputs((4, 4), dtype=torch.float32)
    bias = torch.zeros(1, 4, 4)
    bias[:, 2] = -math.inf
    bias.requires_grad_()
    out, lse = ops.window_attention(*leaves, 2, bias=bias, return_lse=True, backend="triton")
    assert (out[:, 1::2, ::2] == 0).all() and (lse[:, 1::2, ::2] == -math.inf).all()
    for x in torch.autograd.grad(out.sum() + lse[:, ::2].sum(), [*leaves, bias]):
        assert x.isfinite().all()


@pytest.mark.slow
def test_large_logits_do_not_overflow():
    q, k, v = inputs((4, 4))
    grads = torch.randn(1, 4, 4, 1, 6), torch.randn(1, 4, 4, 1)
    with torch.no_grad():
        q *= 300
    found, truth = (everything([q, k, v], 4, b, grads) for b in ("triton", "reference"))
    for fast, slow in zip(found, truth, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_as_close_to_truth_as_the_definition(dtype):
    low = [x.detach().to(dtype).requires_grad_() for x in inputs((14, 7), dim=32)]
    bias = bias_of(1, 49, torch.float32)
    grads = torch.randn(1, 14, 7, 1, 32, dtype=dtype), torch.zeros(1, 14, 7, 1)
    run = lambda x, backend, bias: everything(x, 7, backend, grads, bias=bias, shift=3)  # noqa: E731
    exact = [x.detach().double().requires_grad_() for x in (*low, bias)]
    truth = run(exact[:3], "reference", exact[3])
    errors = {
        backend: [(a.double() - b).abs().max() for a, b in zip(run(low, backend, bias), truth, strict=True)]
        for backend in ("triton", "reference")
    }
    for place, (fast, budget) in enumerate(zip(errors["triton"], errors["reference"], strict=True)):
        low_products = 0 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps  # p and ds are cast
        assert fast <= 2 * budget + low_products + (1e-5 if place < 2 else 2e-4), place


@pytest.mark.slow
def test_strided_packed_and_empty_inputs():
    q, k, v = torch.randn(2, 8, 8, 3, 1, 8).unbind(3)
    run = lambda *x: ops.window_attention(*x, 2, shift=1, backend="triton")  # noqa: E731
    torch.testing.assert_close(run(q, k, v), run(*(x.contiguous() for x in (q, k, v))), rtol=0, atol=0)
    cropped = [x[:, 1:5, 2:8] for x in (q, k, v)]  # rows that do not follow each other
    torch.testing.assert_close(run(*cropped), run(*(x.contiguous() for x in cropped)), rtol=0, atol=0)
    empty, bias = q[:0].clone().requires_grad_(), bias_of(1, 4, torch.float32)
    out = ops.window_attention(empty, k[:0], v[:0], 2, bias=bias, backend="triton")
    assert out.shape == (0, 8, 8, 1, 8)
    grads = torch.autograd.grad(out.sum(), (empty, bias))
    assert grads[0].shape == empty.shape and (grads[1] == 0).all()


@pytest.mark.slow
def test_a_token_of_another_window_shows_nowhere():
    q, k, v = (x.detach() for x in inputs((4, 6)))
    for x in (q, k, v):
        x[:, 0, 0] = math.nan
    out = ops.window_attention(q, k, v, 2, shift=1, backend="triton")
    assert out[:, 0, 0].isnan().all()
    assert out[:, 1:].isfinite().all() and out[:, 0, 1:].isfinite().all()


@pytest.mark.slow
def test_the_operator_is_one_to_tracers():
    torch._dynamo.reset()
    q, k, v = (x.detach().float().requires_grad_() for x in inputs((4, 4)))
    bias = bias_of(1, 4, torch.float32)
    arguments = (q, k, v, bias, [2, 2], [1, 0], 0.5, "triton")
    torch.library.opcheck(schema.forward, arguments, test_utils=("test_schema", "test_faketensor"))

    def layer(q, k, v, bias):
        return ops.window_attention(q * 1.0, k, v, 2, shift=1, bias=bias, backend="triton").sin()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaves = (q, k, v, bias)
    torch.testing.assert_close(compiled(*leaves), layer(*leaves))
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves).sum(), leaves),
        torch.autograd.grad(layer(*leaves).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_explain_and_refusals():
    q, k, v = inputs((9, 9), dtype=torch.float32)
    told = ops.explain("window_attention", q, k, v, 3)
    assert (told.backend, told.configuration) == ("triton", "a window of at most 16 tokens at once, 4 warps")
    with pytest.raises(RuntimeError, match="windows of more than 64 tokens, found 81; use sdpa or reference"):
        ops.window_attention(q, k, v, 9, backend="triton")
    wide = torch.randn(1, 2, 2, 1, 33)
    with pytest.raises(RuntimeError, match="more than 32 channels in torch.float32, found 33"):
        ops.window_attention(wide, wide, wide, 2, backend="triton")
