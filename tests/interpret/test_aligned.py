"""Aligned attention in Triton against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from zoo import ops
from zoo.kernels.aligned import schema

TIGHT = {"rtol": 1e-12, "atol": 1e-13}


def inputs(grid, *, batch=1, heads=1, kv_heads=None, dim=6, v_dim=None, dtype=torch.float64):
    shapes = ((heads, dim), (kv_heads or heads, dim), (kv_heads or heads, v_dim or dim))
    return [torch.randn(batch, *grid, *shape, dtype=dtype, requires_grad=True) for shape in shapes]


def everything(leaves, radius, backend, grads):
    """Output, LSE and every gradient, the LSE's included."""
    out, lse = ops.aligned_attention(*leaves, radius, return_lse=True, backend=backend)
    loss = (out * grads[0].to(out.dtype)).sum() + (lse * grads[1].to(lse.dtype)).sum()
    return [out, lse, *torch.autograd.grad(loss, leaves)]


def compare(leaves, radius):
    q, _, v = leaves
    grads = torch.randn(*q.shape[:-1], v.shape[-1]), torch.randn(q.shape[:-1])
    found, truth = (everything(leaves, radius, b, grads) for b in ("triton", "reference"))
    for fast, slow in zip(found, truth, strict=True):
        torch.testing.assert_close(fast, slow, **TIGHT)


def test_a_window_is_cut_off_at_the_borders(small_tiles):
    compare(inputs((5, 7), v_dim=5), (1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("radius", [(0, 0), (4, 6)])
def test_any_radius_with_shared_keys(radius, small_tiles):
    compare(inputs((3, 7), batch=2, heads=2, kv_heads=1), radius)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "radius", "dim"),
    [
        ((1,), (0,), 10),
        ((2,), (1,), 12),
        ((97,), (5,), 59),
        ((3, 4, 5), (1, 0, 2), 33),
        ((12, 11), (3, 3), 111),
    ],
)
def test_any_grid_and_width_is_exact(grid, radius, dim):
    compare(inputs(grid, dim=dim, v_dim=dim + 2), radius)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_as_close_to_truth_as_the_definition(dtype):
    low = [x.detach().to(dtype).requires_grad_() for x in inputs((12, 11), dim=32)]
    grads = torch.randn(1, 12, 11, 1, 32, dtype=dtype), torch.zeros(1, 12, 11, 1)
    truth = everything([x.detach().double().requires_grad_() for x in low], 2, "reference", grads)
    errors = {
        backend: [
            (a.double() - b).abs().max()
            for a, b in zip(everything(low, 2, backend, grads), truth, strict=True)
        ]
        for backend in ("triton", "reference")
    }
    for place, (fast, budget) in enumerate(zip(errors["triton"], errors["reference"], strict=True)):
        low_products = 0 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps  # p and ds are cast
        assert fast <= 2 * budget + low_products + (1e-5 if place < 2 else 2e-4), place


@pytest.mark.slow
def test_strided_packed_and_empty_inputs():
    q, k, v = torch.randn(2, 4, 6, 3, 1, 8).unbind(3)
    run = lambda *x: ops.aligned_attention(*x, 1, backend="triton")  # noqa: E731
    plain = [x.contiguous() for x in (q, k, v)]
    torch.testing.assert_close(run(q, k, v), run(*plain), rtol=0, atol=0)
    none = [x[:0].requires_grad_() for x in plain]
    out = run(*none)
    assert out.shape == (0, 4, 6, 1, 8)
    assert all(g.shape == out.shape for g in torch.autograd.grad(out.sum(), none))


@pytest.mark.slow
def test_the_operator_is_one_to_tracers():
    torch._dynamo.reset()
    leaves = [x.detach().float().requires_grad_() for x in inputs((4, 4))]
    torch.library.opcheck(
        schema.forward, (*leaves, [1, 1], 0.5, "triton"), test_utils=("test_schema", "test_faketensor")
    )

    def layer(q, k, v):
        return ops.aligned_attention(q * 1.0, k, v, 1, backend="triton").sin()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), layer(*leaves))
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves).sum(), leaves),
        torch.autograd.grad(layer(*leaves).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_explain():
    told = ops.explain("aligned_attention", *inputs((16, 16), dtype=torch.float32), 1)
    assert told.backend == "triton"
    assert told.configuration.startswith("tiles of ")
