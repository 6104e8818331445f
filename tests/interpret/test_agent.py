"""Agent attention in Triton against the definition in float64."""

from __future__ import annotations

import math

import pytest
import torch

from zoo import ops
from zoo.kernels.dense import schema

TIGHT = {"rtol": 1e-11, "atol": 1e-12}  # two softmaxes in a row


def inputs(n, agents, m=None, *, batch=1, heads=1, kv_heads=None, dim=6, v_dim=None, dtype=torch.float64):
    m, kv_heads = m or n, kv_heads or heads
    shapes = (n, heads, dim), (m, kv_heads, dim), (m, kv_heads, v_dim or dim), (agents, heads, dim)
    return [torch.randn(batch, *shape, dtype=dtype, requires_grad=True) for shape in shapes]


def bias(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def everything(leaves, backend, grad, bias_in=None, bias_out=None):
    """Output and every gradient."""
    out = ops.agent_attention(*leaves, bias_in=bias_in, bias_out=bias_out, backend=backend)
    wanted = [*leaves, *(x for x in (bias_in, bias_out) if x is not None)]
    return [out, *torch.autograd.grad((out * grad.to(out.dtype)).sum(), wanted)]


def compare(leaves, *biases):
    grad = torch.randn(*leaves[0].shape[:3], leaves[2].shape[-1])
    found, truth = (everything(leaves, b, grad, *biases) for b in ("triton", "reference"))
    for fast, slow in zip(found, truth, strict=True):
        torch.testing.assert_close(fast, slow, **TIGHT)


def test_biases_shared_by_images_and_their_gradients(small_tiles):
    compare(inputs(21, 4, batch=2, heads=2, v_dim=5), bias(1, 2, 4, 21), bias(2, 21, 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("into", "out_of"), [((2, 2, 5, 18), (1, 1, 21, 5)), ((5, 18), (21, 1)), ((2, 1, 1, 18), (2, 1, 5))]
)
def test_however_a_bias_is_shared(into, out_of, small_tiles):
    compare(inputs(21, 5, 18, batch=2, heads=2, kv_heads=1), bias(*into), bias(*out_of))


def test_a_large_bias_of_keys_stays_out_of_the_rows_past_the_end():
    # One agent is one row of a tile; e to the power of 12 is more than half precision holds.
    leaves = [x.detach().half().requires_grad_() for x in inputs(8, 1)]
    out = ops.agent_attention(*leaves, bias_in=torch.full((1, 8), 12.0), backend="triton")
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(("n", "agents", "dim"), [(1, 1, 10), (2, 3, 12), (17, 9, 59), (97, 49, 111)])
def test_any_length_and_width_is_exact(n, agents, dim):
    compare(inputs(n, agents, dim=dim, v_dim=dim + 3))


@pytest.mark.slow
def test_a_row_that_sees_nothing_is_zero_with_finite_gradients():
    leaves = inputs(20, 4, dtype=torch.float32)
    out_of = torch.zeros(20, 4)
    out_of[3] = -math.inf
    out = ops.agent_attention(*leaves, bias_out=out_of, backend="triton")
    assert (out[:, 3] == 0).all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_as_close_to_truth_as_the_definition(dtype):
    low = [x.detach().to(dtype).requires_grad_() for x in inputs(97, 9, dim=32)]
    biases = bias(9, 97, dtype=torch.float32), bias(97, 9, dtype=torch.float32)
    grad = torch.randn(1, 97, 1, 32, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in (*low, *biases)]
    truth = everything(exact[:4], "reference", grad, *exact[4:])
    errors = {
        backend: [
            (a.double() - b).abs().max()
            for a, b in zip(everything(low, backend, grad, *biases), truth, strict=True)
        ]
        for backend in ("triton", "reference")
    }
    for place, (fast, budget) in enumerate(zip(errors["triton"], errors["reference"], strict=True)):
        # Weights are cast for both products, and what the agents gather between them.
        low_products = 0 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
        assert fast <= 2 * budget + low_products + (1e-5 if place < 1 else 2e-4), place


@pytest.mark.slow
def test_strided_and_empty_inputs():
    q, k, v = torch.randn(2, 33, 3, 2, 8).unbind(2)
    agents = q[:, ::5]
    run = lambda *x: ops.agent_attention(*x, backend="triton")  # noqa: E731
    plain = [x.contiguous() for x in (q, k, v, agents)]
    torch.testing.assert_close(run(q, k, v, agents), run(*plain), rtol=0, atol=0)
    none = [x[:0].clone().requires_grad_() for x in plain]
    added = bias(7, 33, dtype=torch.float32)
    out = ops.agent_attention(*none, bias_in=added, backend="triton")
    assert out.shape == (0, 33, 2, 8)
    assert (torch.autograd.grad(out.sum(), [*none, added])[-1] == 0).all()


@pytest.mark.slow
def test_the_operator_is_one_to_tracers():
    torch._dynamo.reset()
    leaves = [x.detach().float().requires_grad_() for x in inputs(20, 4)]
    added = bias(4, 20, dtype=torch.float32)
    q, k, v, _ = leaves
    torch.library.opcheck(
        schema.forward, (q, k, v, None, 0.5, "triton"), test_utils=("test_schema", "test_faketensor")
    )

    def layer(q, k, v, agents, added):
        return ops.agent_attention(q * 1.0, k, v, agents, bias_in=added, backend="triton").sin()

    compiled, wanted = torch.compile(layer, fullgraph=True, backend="aot_eager"), [*leaves, added]
    torch.testing.assert_close(compiled(*wanted), layer(*wanted))
    for a, b in zip(
        torch.autograd.grad(compiled(*wanted).sum(), wanted),
        torch.autograd.grad(layer(*wanted).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_explain():
    told = ops.explain("agent_attention", *inputs(20, 4, dtype=torch.float32))
    assert told.backend == "triton"
    assert told.configuration.startswith("twice in tiles of at most")
