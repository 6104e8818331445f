"""Window attention: the operation is attention under Swin's rolled mask, with every gradient."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo import ops
from zoo.kernels.window import windows
from zoo.kernels.window.windows import runs

BACKENDS = ("sdpa", "reference")


def rolled_and_masked(
    q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int], shift: tuple[int, int], bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The published way: roll the map, mask what the roll brought together, roll back."""
    batch, rows, columns, heads, width = q.shape
    shared = heads // k.shape[3]
    k, v = k.repeat_interleave(shared, 3), v.repeat_interleave(shared, 3)

    def region(length: int, size: int, by: int) -> Tensor:
        token = torch.arange(length)
        return (token >= length - by).long() + (token >= length - size).long() if by else token * 0

    def cut(x: Tensor) -> Tensor:
        x = x.roll((-shift[0], -shift[1]), (1, 2))
        x = x.unflatten(1, (-1, window[0])).unflatten(3, (-1, window[1])).transpose(2, 3)
        return x.flatten(3, 4).flatten(0, 2)

    def join(x: Tensor) -> Tensor:
        x = x.unflatten(0, (batch, rows // window[0], columns // window[1])).unflatten(3, window)
        return x.transpose(2, 3).reshape(batch, rows, columns, *x.shape[5:]).roll(shift, (1, 2))

    here = 3 * region(rows, window[0], shift[0])[:, None] + region(columns, window[1], shift[1])
    here = cut(here.roll(shift, (0, 1))[None, ..., None].expand(batch, -1, -1, 1))[..., 0]
    logits = width**-0.5 * torch.einsum("wqhd,wkhd->whqk", cut(q), cut(k))
    logits = logits if bias is None else logits + bias
    logits = logits.masked_fill((here[:, :, None] != here[:, None])[:, None], float("-inf"))
    out = torch.einsum("whqk,wkhd->wqhd", logits.softmax(-1), cut(v))
    return join(out), join(logits.logsumexp(-1).transpose(1, 2))


def arguments(rows=6, columns=10, heads=4, kv_heads=2, width=3, v_width=None, dtype=torch.float64):
    q = torch.randn(2, rows, columns, heads, width, dtype=dtype)
    k = torch.randn(2, rows, columns, kv_heads, width, dtype=dtype)
    return q, k, torch.randn(2, rows, columns, kv_heads, v_width or width, dtype=dtype)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_it_is_attention_under_the_rolled_mask(data):
    window = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    shift = tuple(data.draw(st.integers(0, size - 1)) for size in window)
    rows, columns = (size * data.draw(st.integers(1, 3)) for size in window)
    v_width = data.draw(st.sampled_from([3, 5]))
    q, k, v = arguments(rows, columns, v_width=v_width)
    tokens = window[0] * window[1]
    bias = torch.randn(4, tokens, tokens, dtype=q.dtype) if data.draw(st.booleans()) else None
    expected, expected_lse = rolled_and_masked(q, k, v, window, shift, bias)
    for backend in BACKENDS:
        out, lse = ops.window_attention(
            q, k, v, window, shift=shift, bias=bias, return_lse=True, backend=backend
        )
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(lse, expected_lse)
        alone = ops.window_attention(q, k, v, window, shift=shift, bias=bias, backend=backend)
        torch.testing.assert_close(alone, expected)
    at_once = data.draw(st.sampled_from([1, 2000, 1 << 20]))
    with torch.no_grad(), mock.patch.object(windows, "BYTES_AT_ONCE", at_once):
        in_parts = ops.window_attention(q, k, v, window, shift=shift, bias=bias, backend="sdpa")
    torch.testing.assert_close(in_parts, expected)


def test_a_bias_that_is_a_parameter_takes_the_fused_path_where_no_gradient_is_taken():
    (q, k, v), bias = arguments(), torch.randn(4, 4, 4, dtype=torch.float64, requires_grad=True)
    expected = ops.window_attention(q, k, v, 2, bias=bias, backend="reference")
    name = "torch.nn.functional.scaled_dot_product_attention"
    with torch.no_grad(), mock.patch(name, wraps=F.scaled_dot_product_attention) as fused:
        torch.testing.assert_close(ops.window_attention(q, k, v, 2, bias=bias), expected.detach())
    assert fused.called and not any(call.kwargs["attn_mask"].requires_grad for call in fused.mock_calls)


@pytest.mark.parametrize(("length", "window", "shift"), [(14, 7, 0), (14, 7, 3), (7, 7, 4), (5, 1, 0)])
def test_runs_cut_an_axis_into_every_token_once(length, window, shift):
    cut = runs(length, window, shift)
    tokens = [token for run in cut for token in range(run.start, run.end)]
    assert tokens == list(range(length))
    for run in cut:
        assert (run.end - run.start) % run.length == 0
        assert (run.start - shift) % window == run.place % window


def test_a_window_of_the_whole_map_is_dense_attention_and_one_token_sees_itself():
    q, k, v = arguments(kv_heads=4)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    )
    whole = ops.window_attention(q, k, v, (6, 10))
    torch.testing.assert_close(whole, dense.transpose(1, 2).unflatten(1, (6, 10)))
    torch.testing.assert_close(ops.window_attention(q, k, v, 1), v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_right_bias_included(backend):
    q, k, v = (x.requires_grad_() for x in arguments(4, 4, width=2))
    bias = torch.randn(4, 4, 4, dtype=q.dtype, requires_grad=True)

    def function(q, k, v, bias):
        return ops.window_attention(
            q, k, v, 2, shift=(1, 0), bias=bias, return_lse=True, scale=0.7, backend=backend
        )

    assert torch.autograd.gradcheck(function, (q, k, v, bias), fast_mode=True)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, (q, k, v, bias), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_it_errs_at_most_twice_as_much_as_the_definition_in_the_same_dtype(dtype, biased):
    inputs = [x.to(dtype) for x in arguments(14, 14, kv_heads=4, width=16)]
    bias = torch.randn(4, 49, 49) if biased else None
    results = {}
    for backend, tensors in (
        ("float64", [x.double() for x in inputs]),
        *((name, inputs) for name in BACKENDS),
    ):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = ops.window_attention(
            *leaves, 7, shift=3, bias=bias, backend="reference" if backend == "float64" else backend
        )
        out.double().square().sum().backward()
        results[backend] = [out.detach(), *(leaf.grad for leaf in leaves)]
        assert out.dtype == tensors[0].dtype
    for exact, fast, plain in zip(*(results[name] for name in ("float64", *BACKENDS)), strict=True):
        error, allowed = ((x.double() - exact).norm() / exact.norm() for x in (fast, plain))
        assert error <= 2 * allowed + 1e-5


def test_tokens_beyond_the_borders_of_a_shifted_window_do_not_leak():
    q, k, v = arguments(4, 8)
    k[:, :, 0], v[:, :, 0] = float("nan"), float("inf")  # the roll would put this column beside the last
    for backend in BACKENDS:
        out = ops.window_attention(q, k, v, 4, shift=(0, 1), backend=backend)
        assert out[:, :, 1:].isfinite().all() and not out[:, :, 0].isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("return_lse", [False, True])
def test_a_query_that_sees_nothing_is_zero_with_finite_gradients(backend, return_lse):
    inputs = [x.requires_grad_() for x in arguments(4, 4, kv_heads=4)]
    bias = torch.randn(4, 4, 4, dtype=torch.float64)
    bias[1, 2], bias[0, 0, 1] = float("-inf"), float("-inf")
    bias.requires_grad_()
    result = ops.window_attention(*inputs, 2, bias=bias, return_lse=return_lse, backend=backend)
    out = result[0] if return_lse else result
    assert not out[:, 1::2, ::2, 1].any() and out[:, ::2].all()
    if return_lse:
        assert (result[1][:, 1::2, ::2, 1] == float("-inf")).all()
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (*inputs, bias))


def test_it_takes_what_tensors_come_as():
    q, k, v = arguments(kv_heads=4, dtype=torch.float32)
    expected = ops.window_attention(q, k, v, 2, shift=1)
    packed = torch.stack([q, k, v], dim=3).unbind(3)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for views in (packed, transposed):
        torch.testing.assert_close(ops.window_attention(*views, 2, shift=1), expected)
    empty = [x[:0].requires_grad_() for x in (q, k, v)]
    out, lse = ops.window_attention(*empty, 2, shift=1, return_lse=True)
    assert out.shape == (0, 6, 10, 4, 3) and lse.shape == (0, 6, 10, 4)
    out.sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = ops.window_attention(q, k.bfloat16(), v, 2, shift=1)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backend", ["sdpa", pytest.param("reference", marks=pytest.mark.slow)])
def test_it_compiles_and_exports_with_any_batch(backend):
    torch._dynamo.reset()
    inputs = tuple(arguments(kv_heads=4, dtype=torch.float32))
    bias = torch.randn(4, 4, 4)

    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return ops.window_attention(q, k, v, 2, shift=(1, 0), bias=bias, backend=backend)

    model = Model()
    expected = model(*inputs)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), expected)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, inputs, dynamic_shapes=({0: batch},) * 3)
    torch.testing.assert_close(program.module()(*(x[:1] for x in inputs)), expected[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_size": 4}, "6 rows must be a multiple of window_size 4; pad them to 8"),
        ({"window_size": 0}, "window_size must be at least 1, found 0 rows"),
        ({"window_size": 2.0}, "window_size must be a whole number"),
        ({"window_size": (2, 2, 2)}, r"window_size must be a whole number or \(rows, columns\)"),
        ({"shift": 2}, "shift must be from 0 to 1, less than the window, found 2 rows"),
        ({"shift": (0, -1)}, "found -1 columns"),
        ({"bias": torch.zeros(4, 2, 2)}, r"bias must be \[H, T, T\] = \(4, 4, 4\)"),
        ({"bias": torch.zeros(4, 4, 4, dtype=torch.long)}, "bias must be float64"),
        ({"k": torch.zeros(2, 6, 10, 3, 3)}, "q's 4 heads must be a multiple of k's 3 heads"),
        ({"k": torch.zeros(2, 6, 9, 2, 3)}, "k must have q's batch, map and width"),
        ({"v": torch.zeros(2, 6, 10, 4, 3)}, "v must have k's batch, map and heads"),
        ({"q": torch.zeros(2, 60, 4, 3)}, r"q must be \[B, Y, X, H, D\]"),
        ({"scale": torch.ones(())}, "scale must be a number"),
        ({"backend": "sdp"}, "has no backend 'sdp'; use auto, .*sdpa, .*reference"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    q, k, v = arguments(dtype=torch.float32)
    given = {"q": q, "k": k, "v": v, "window_size": 2, **change}
    with pytest.raises(ValueError, match=message):
        ops.window_attention(**given)


def test_explain_names_the_backend():
    q, k, v = arguments()
    assert ops.explain("window_attention", q, k, v, 2, shift=1, backend="reference").backend == "reference"
    assert ops.explain("window_attention", q, k, v, 2).backend in ("sdpa", "triton")
