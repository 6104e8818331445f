"""Attention of all to all in Triton against the definition in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo import ops
from zoo.kernels.tile import launch

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def inputs(n, m, *, batch=1, heads=1, kv_heads=None, dim=6, v_dim=None, dtype=torch.float64):
    shapes = (n, heads, dim), (m, kv_heads or heads, dim), (m, kv_heads or heads, v_dim or dim)
    return [torch.randn(batch, *shape).to(dtype).requires_grad_() for shape in shapes]


def everything(leaves, backend, grads, key_mask=None):
    """Output, LSE and every gradient."""
    found = ops.attention(*leaves, key_mask=key_mask, return_lse=True, backend=backend)
    loss = sum((x.where(x.isfinite(), 0.0) * grad).sum() for x, grad in zip(found, grads, strict=True))
    return [*found, *torch.autograd.grad(loss, leaves)]


def compare(leaves, key_mask=None):
    q, _, v = leaves
    grads = torch.randn(*q.shape[:3], v.shape[-1]), torch.randn(q.shape[:3])
    both = [everything(leaves, backend, grads, key_mask) for backend in ("triton", "reference")]
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, **TIGHT)


def test_keys_behind_a_mask_by_image_with_shared_heads(small_tiles):
    mask = torch.arange(21) < torch.tensor([[17], [0]])
    compare(inputs(19, 21, batch=2, heads=2, kv_heads=1, v_dim=5), mask)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "m", "dim", "v_dim"),
    [
        (1, 257, 10, 10),
        (2, 97, 12, 33),
        (5, 17, 33, 12),
        (17, 5, 59, 59),
        (97, 2, 80, 111),
        (257, 1, 111, 80),
    ],
)
def test_any_length_and_width_is_exact(n, m, dim, v_dim):
    compare(inputs(n, m, dim=dim, v_dim=v_dim))


@pytest.mark.slow
@given(
    n=st.integers(0, 40),
    m=st.integers(0, 40),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    widths=st.sampled_from([(1, 1), (4, 4), (8, 3), (5, 20)]),
    masked=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_any_call_is_exact(n, m, heads, widths, masked):
    torch.manual_seed(n + 41 * m)
    mask = torch.rand(2, m) < 0.5 if masked else None
    compare(inputs(n, m, batch=2, heads=heads[0], kv_heads=heads[1], dim=widths[0], v_dim=widths[1]), mask)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_as_close_to_truth_as_the_definition(dtype):
    leaves = inputs(33, 97, dim=32, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    grads = torch.randn(1, 33, 1, 32).to(dtype), torch.randn(1, 33, 1)
    truth = everything(exact, "reference", grads)
    errors = {
        backend: [
            (a.double() - b).abs().max()
            for a, b in zip(everything(leaves, backend, grads), truth, strict=True)
        ]
        for backend in ("triton", "reference")
    }
    for place, (ours, theirs) in enumerate(zip(errors["triton"], errors["reference"], strict=True)):
        # Weights are cast for both products.
        low_products = 0 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
        assert ours <= 2 * theirs + low_products + (1e-5 if place < 2 else 2e-4), place


@pytest.mark.slow
def test_what_a_mask_hides_stays_hidden_and_strided_and_empty_inputs():
    q, k, v = torch.randn(2, 33, 3, 2, 8).unbind(2)
    run = lambda *x, **options: ops.attention(*x, backend="triton", **options)  # noqa: E731
    torch.testing.assert_close(run(q, k, v), run(*(x.contiguous() for x in (q, k, v))), rtol=0, atol=0)
    one = k[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(run(q, one, one), run(q, *[one.contiguous()] * 2), rtol=0, atol=0)
    mask = torch.arange(33) < 20
    hidden = [x.masked_fill(~mask[:, None, None], math.nan) for x in (k, v)]
    torch.testing.assert_close(run(q, *hidden, key_mask=mask.expand(2, -1)), run(q, k[:, :20], v[:, :20]))
    none = [x[:0].clone().requires_grad_() for x in (q, k, v)]
    out = run(*none)
    assert out.shape == (0, 33, 2, 8) and torch.autograd.grad(out.sum(), none)[1].shape == (0, 33, 2, 8)


@pytest.mark.slow
def test_the_operator_is_one_to_tracers():
    torch._dynamo.reset()
    leaves, mask = inputs(20, 17, dtype=torch.float32), torch.arange(17)[None] < 12

    def layer(q, k, v):
        out, lse = ops.attention(q * 1.0, k, v, key_mask=mask, return_lse=True, backend="triton")
        return out.sin().sum() + lse.sum()

    compiled, results = torch.compile(layer, fullgraph=True, backend="aot_eager"), []
    for run in (compiled, layer):
        out = run(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_pytorchs_newer_switch_of_precision_is_understood(precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=precision))
    q, k, v = inputs(5, 5, dtype=torch.float32)
    assert launch.constants(q, v)["PREC"] == {"tf32": "tf32", "ieee": "tf32x3"}[precision]


@pytest.mark.slow
def test_explain():
    told = ops.explain("attention", *inputs(20, 4, dtype=torch.float32), return_lse=True)
    assert told.backend == "triton" and told.configuration.startswith("tiles of at most")
