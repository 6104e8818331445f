"""Bi-level routing attention in Triton against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from zoo import ops
from zoo.kernels.bilevel import schema

TIGHT = {"rtol": 1e-12, "atol": 1e-13}


def inputs(grid, *, coarser=1, batch=1, heads=1, kv_heads=None, dim=6, v_dim=None, dtype=torch.float64):
    keys, kv_heads = tuple(n // coarser for n in grid), kv_heads or heads
    shapes = (*grid, heads, dim), (*keys, kv_heads, dim), (*keys, kv_heads, v_dim or dim)
    return [torch.randn(batch, *shape, dtype=dtype, requires_grad=True) for shape in shapes]


def routes_of(batch, parts, topk):
    return torch.stack([torch.randperm(parts)[:topk] for _ in range(batch * parts)]).view(batch, parts, topk)


def everything(leaves, routes, regions, backend, grads):
    """Output, LSE and every gradient, the LSE's included."""
    out, lse = ops.bilevel_routing_attention(*leaves, routes, regions, return_lse=True, backend=backend)
    loss = (out * grads[0].to(out.dtype)).sum() + (lse * grads[1].to(lse.dtype)).sum()
    return [out, lse, *torch.autograd.grad(loss, leaves)]


def compare(leaves, routes, regions):
    q, _, v = leaves
    grads = torch.randn(*q.shape[:-1], v.shape[-1]), torch.randn(q.shape[:-1])
    found, truth = (everything(leaves, routes, regions, b, grads) for b in ("triton", "reference"))
    for fast, slow in zip(found, truth, strict=True):
        torch.testing.assert_close(fast, slow, **TIGHT)


def test_small_regions_fill_a_tile_together(small_tiles):
    compare(inputs((4, 6), batch=2, v_dim=5), routes_of(2, 6, 5), (2, 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "regions", "topk", "dim"),
    [((1, 1), (1, 1), 1, 10), ((14, 7), (2, 1), 1, 33), ((6, 6), (3, 3), 9, 59), ((4, 12), (2, 3), 2, 111)],
)
def test_any_region_and_width_is_exact(grid, regions, topk, dim):
    compare(inputs(grid, dim=dim, v_dim=dim + 2), routes_of(1, regions[0] * regions[1], topk), regions)


@pytest.mark.slow
def test_large_regions_of_shared_and_coarser_keys(small_tiles):
    compare(inputs((12, 16), coarser=2, heads=2, kv_heads=1), routes_of(1, 4, 3), 2)


@pytest.mark.slow
def test_a_region_listed_twice_counts_twice_and_one_never_chosen_gets_no_gradient(small_tiles):
    routes = torch.tensor([[[0, 0], [2, 0], [2, 2], [0, 1]]])
    leaves = inputs((6, 6))
    compare(leaves, routes, 2)
    out = ops.bilevel_routing_attention(*leaves, routes, 2, backend="triton")
    grads = torch.autograd.grad(out.sum(), leaves[1:])
    assert all((g[:, 3:, 3:] == 0).all() for g in grads)


@pytest.mark.slow
def test_all_regions_chosen_is_dense_attention():
    leaves = inputs((4, 4))
    found = ops.bilevel_routing_attention(*leaves, routes_of(1, 4, 4), 2, backend="triton")
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in leaves)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(found.flatten(1, 2).transpose(1, 2), dense, **TIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_as_close_to_truth_as_the_definition(dtype):
    low = [x.detach().to(dtype).requires_grad_() for x in inputs((14, 14), dim=32)]
    routes = routes_of(1, 49, 16)
    grads = torch.randn(1, 14, 14, 1, 32, dtype=dtype), torch.zeros(1, 14, 14, 1)
    run = lambda x, backend: everything(x, routes, 7, backend, grads)  # noqa: E731
    truth = run([x.detach().double().requires_grad_() for x in low], "reference")
    errors = {
        backend: [(a.double() - b).abs().max() for a, b in zip(run(low, backend), truth, strict=True)]
        for backend in ("triton", "reference")
    }
    for place, (fast, budget) in enumerate(zip(errors["triton"], errors["reference"], strict=True)):
        low_products = 0 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps  # p and ds are cast
        assert fast <= 2 * budget + low_products + (1e-5 if place < 2 else 2e-4), place


@pytest.mark.slow
def test_a_region_that_was_not_chosen_shows_nowhere(small_tiles):
    q, k, v = (x.detach() for x in inputs((4, 4)))
    k[:, 0, 0], v[:, 1, 1] = float("nan"), float("inf")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    routes = torch.tensor([[[1, 2], [1, 3], [2, 3], [3, 2]]])
    out = ops.bilevel_routing_attention(*leaves, routes, 2, backend="triton")
    assert out.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.slow
def test_strided_packed_and_empty_inputs():
    q, k, v = torch.randn(2, 4, 6, 3, 1, 8).unbind(3)
    routes = routes_of(2, 4, 2)
    run = lambda r, *x: ops.bilevel_routing_attention(*x, r, 2, backend="triton")  # noqa: E731
    plain = [x.contiguous() for x in (q, k, v)]
    torch.testing.assert_close(run(routes, q, k, v), run(routes, *plain), rtol=0, atol=0)
    none = [x[:0].requires_grad_() for x in plain]
    out = run(routes[:0], *none)
    assert out.shape == (0, 4, 6, 1, 8)
    assert all(g.shape == out.shape for g in torch.autograd.grad(out.sum(), none))


@pytest.mark.slow
def test_the_operator_is_one_to_tracers():
    torch._dynamo.reset()
    leaves = [x.detach().float().requires_grad_() for x in inputs((4, 4))]
    routes = routes_of(1, 4, 2)
    arguments = (*leaves, routes, [2, 2], 0.5, "triton")
    torch.library.opcheck(schema.forward, arguments, test_utils=("test_schema", "test_faketensor"))

    def layer(q, k, v):
        return ops.bilevel_routing_attention(q * 1.0, k, v, routes, 2, backend="triton").sin()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), layer(*leaves))
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves).sum(), leaves),
        torch.autograd.grad(layer(*leaves).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_explain_and_refusals():
    q, k, v = inputs((8, 8), dtype=torch.float32)
    routes = routes_of(1, 16, 5)
    told = ops.explain("bilevel_routing_attention", q, k, v, routes, 4)
    assert told.backend == "triton"
    assert told.configuration.startswith("tiles of 16 queries and 32 keys")
    with pytest.raises(RuntimeError, match="route_weights; use cpu or reference"):
        weights = torch.ones(routes.shape)
        ops.bilevel_routing_attention(q, k, v, routes, 4, route_weights=weights, backend="triton")
