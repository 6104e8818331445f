"""Deformable sampling and attention in Triton against their definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch

from zoo import ops
from zoo.kernels.deformable import schema

TIGHT = {"rtol": 1e-11, "atol": 1e-12}


def sampled(leaves, backend, grad):
    out = ops.deformable_sample(*leaves, backend=backend)
    return [out, *torch.autograd.grad((out * grad.to(out.dtype)).sum(), leaves)]


def sample_inputs(grid, channels, groups, count, *, batch=1, dtype=torch.float64):
    x = torch.randn(batch, *grid, channels, dtype=dtype, requires_grad=True)
    # Some beyond the map.
    return [x, (2.6 * torch.rand(batch, groups, count, 2, dtype=dtype) - 1.3).requires_grad_()]


def inputs(grid, keys, *, batch=1, heads=1, kv_heads=None, dim=6, v_dim=None, dtype=torch.float64):
    kv_heads = kv_heads or heads
    shapes = (*grid, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, v_dim or dim)
    return [torch.randn(batch, *shape, dtype=dtype, requires_grad=True) for shape in shapes]


def attended(leaves, backend, grads, **options):
    """Output, LSE and every gradient, the LSE's included."""
    out, lse = ops.deformable_attention(*leaves, return_lse=True, backend=backend, **options)
    wanted = [*leaves, *(x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad)]
    loss = (out * grads[0].to(out.dtype)).sum() + (lse * grads[1].to(lse.dtype)).sum()
    return [out, lse, *torch.autograd.grad(loss, wanted)]


def compare(leaves, **options):
    q, _, v = leaves
    grads = torch.randn(*q.shape[:-1], v.shape[-1]), torch.randn(q.shape[:-1])
    found, truth = (attended(leaves, b, grads, **options) for b in ("triton", "reference"))
    for fast, slow in zip(found, truth, strict=True):
        torch.testing.assert_close(fast, slow, **TIGHT)


def read(heads, groups, keys, *size, batch=1, dtype=torch.float64):
    """A table and where it is read."""
    positions = (2.2 * torch.rand(batch, groups, keys, 2, dtype=dtype) - 1.1).requires_grad_()
    return {"positions": positions, "table": torch.randn(heads, *size, dtype=dtype, requires_grad=True)}


@pytest.mark.parametrize(
    ("grid", "channels", "groups", "count"),
    [
        ((5, 7), 6, 2, 20),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (((1, 1), 3, 1, 1), ((2, 9), 111, 1, 5), ((6, 4), 140, 2, 33))
        ),
    ],
)
def test_samples_and_their_gradients(grid, channels, groups, count):
    leaves = sample_inputs(grid, channels, groups, count, batch=2)
    grad = torch.randn(2, count, channels)
    for fast, slow in zip(*(sampled(leaves, b, grad) for b in ("triton", "reference")), strict=True):
        torch.testing.assert_close(fast, slow, **TIGHT)


def test_a_table_read_between_entries_and_its_gradients(small_tiles):
    compare(inputs((3, 6), 5, heads=2, v_dim=5), **read(2, 1, 5, 5, 11))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "keys", "dim", "query_grid"),
    [((1, 1), 1, 10, "corners"), ((2, 5), 17, 33, "centres"), ((5, 6), 17, 111, "corners")],
)
def test_any_map_and_width_is_exact(grid, keys, dim, query_grid):
    size = (2 * grid[0] - 1, 2 * grid[1] - 1)
    table = read(2, 2, keys, *size, batch=2)
    compare(inputs(grid, keys, batch=2, heads=2, kv_heads=1, dim=dim), query_grid=query_grid, **table)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 12, 5), (1, 12, 5), (5,)])
def test_a_bias_and_its_gradient_however_it_is_shared(shape, small_tiles):
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    compare(inputs((3, 4), 5, batch=2, heads=2), bias=bias)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_they_are_as_close_to_truth_as_the_definitions(dtype):
    x, at = sample_inputs((9, 8), 32, 2, 33, dtype=torch.float32)
    low = [x.detach().to(dtype).requires_grad_(), at]
    q, k, v = (y.detach().to(dtype).requires_grad_() for y in inputs((8, 8), 33, dim=32))
    more = read(1, 1, 33, 15, 15, dtype=torch.float32)
    grads = torch.randn(1, 8, 8, 1, 32, dtype=dtype), torch.zeros(1, 8, 8, 1)

    def run(sampling, attending, more, backend):
        return [*sampled(sampling, backend, torch.ones(1)), *attended(attending, backend, grads, **more)]

    exact = lambda x: x.detach().double().requires_grad_()  # noqa: E731
    exact_more = {name: exact(y) for name, y in more.items()}
    truth = run([*map(exact, low)], [*map(exact, (q, k, v))], exact_more, "reference")
    errors = {
        backend: [
            (a.double() - b).abs().max()
            for a, b in zip(run(low, (q, k, v), more, backend), truth, strict=True)
        ]
        for backend in ("triton", "reference")
    }
    for place, (fast, budget) in enumerate(zip(errors["triton"], errors["reference"], strict=True)):
        low_products = 0 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps  # p and ds are cast
        assert fast <= 2 * budget + low_products + 2e-4, place


@pytest.mark.slow
def test_strided_empty_and_odd_inputs():
    x, at = (y.detach() for y in sample_inputs((6, 8), 8, 2, 5, batch=2))
    run = lambda *y: ops.deformable_sample(*y, backend="triton")  # noqa: E731
    cropped = x[:, 1:5, 2:7, :6]
    torch.testing.assert_close(run(cropped, at), run(cropped.contiguous(), at), rtol=0, atol=0)
    none = x[:0].clone().requires_grad_()
    out = run(none, at[:0])
    assert out.shape == (0, 5, 8)
    assert torch.autograd.grad(out.sum(), none)[0].shape == none.shape
    at[0, 0, 0, 0] = math.nan
    torch.testing.assert_close(run(x, at), ops.deformable_sample(x, at, backend="reference"))


@pytest.mark.slow
def test_the_operators_are_one_to_tracers():
    torch._dynamo.reset()
    x, at = sample_inputs((4, 5), 6, 1, 5, dtype=torch.float32)
    q, k, v = inputs((4, 5), 5, dtype=torch.float32)
    more = read(1, 1, 5, 7, 9, dtype=torch.float32)
    tests = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(schema.sample, (x, at, "triton"), **tests)
    arguments = (q, k, v, more["positions"], more["table"], None, True, 0.5, "triton")
    torch.library.opcheck(schema.forward, arguments, **tests)

    def layer(x, at, q, table):
        tokens = ops.deformable_sample(x * 1.0, at, backend="triton")[:, :, None]
        return ops.deformable_attention(q, tokens, tokens, at, table, backend="triton").sin()

    leaves = (x, at, q, more["table"])
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
    x, at = sample_inputs((4, 5), 6, 1, 5, dtype=torch.float32)
    q, k, v = inputs((4, 5), 5, dtype=torch.float32)
    assert ops.explain("deformable_sample", x, at).backend == "triton"
    assert ops.explain("deformable_attention", q, k, v).backend == "triton"
    more = read(1, 1, 5, 7, 9, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="a table and a bias together; use cpu or reference"):
        ops.deformable_attention(q, k, v, **more, bias=torch.zeros(5), backend="triton")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="deterministic algorithms; use cpu or reference"):
            ops.deformable_sample(x, at, backend="triton")
    finally:
        torch.use_deterministic_algorithms(False)
