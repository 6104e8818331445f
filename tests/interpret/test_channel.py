"""Channel attention in Triton against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from zoo import ops
from zoo.kernels.channel import schema

TIGHT = {"rtol": 1e-12, "atol": 1e-13}


@pytest.fixture(autouse=True)
def few_shares(monkeypatch):
    """Two or three shares of the tokens."""
    from zoo.kernels.channel import triton
    from zoo.kernels.configs import Config

    monkeypatch.setattr(triton, "PROGRAMS", 12)
    monkeypatch.setattr(triton, "config", lambda q, k: Config(16, 0, 4, 1))


def inputs(n, *, batch=1, heads=1, dim=6, other=None, dtype=torch.float64):
    return [
        torch.randn(batch, n, heads, d, dtype=dtype, requires_grad=True)
        for d in (dim, other or dim, other or dim)
    ]


def everything(leaves, backend, grad, scale=None):
    """Output and every gradient."""
    out = ops.channel_attention(*leaves, scale=scale, backend=backend)
    return [out, *torch.autograd.grad((out * grad.to(out.dtype)).sum(), leaves)]


def compare(leaves, **options):
    grad = torch.randn(leaves[0].shape)
    found, truth = (everything(leaves, b, grad, **options) for b in ("triton", "reference"))
    for fast, slow in zip(found, truth, strict=True):
        torch.testing.assert_close(fast, slow, **TIGHT)


def test_images_heads_and_shares_of_tokens():
    compare(inputs(70, batch=2, heads=2, dim=12, other=10), scale=0.3)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "dim"), [(1, 10), (2, 12), (5, 33), (17, 59), (97, 80), (257, 111)])
def test_any_length_and_width_is_exact(n, dim):
    compare(inputs(n, dim=dim, other=dim + 3))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_as_close_to_truth_as_the_definition(dtype):
    low = [x.detach().to(dtype).requires_grad_() for x in inputs(97, dim=32)]
    grad = torch.randn(1, 97, 1, 32, dtype=dtype)
    truth = everything([x.detach().double().requires_grad_() for x in low], "reference", grad)
    errors = {
        backend: [
            (a.double() - b).abs().max() for a, b in zip(everything(low, backend, grad), truth, strict=True)
        ]
        for backend in ("triton", "reference")
    }
    for place, (fast, budget) in enumerate(zip(errors["triton"], errors["reference"], strict=True)):
        # Weights and their gradient are cast for their products, which sum 32 of them.
        low_products = 0 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
        assert fast <= 2 * budget + low_products + (1e-5 if place < 1 else 2e-4), place


@pytest.mark.slow
def test_large_logits_do_not_overflow():
    compare([(x * 30).detach().requires_grad_() for x in inputs(40)])


@pytest.mark.slow
def test_strided_packed_and_empty_inputs():
    q, k, v = torch.randn(2, 33, 3, 2, 8).unbind(2)
    run = lambda *x: ops.channel_attention(*x, backend="triton")  # noqa: E731
    torch.testing.assert_close(run(q, k, v), run(*(x.contiguous() for x in (q, k, v))), rtol=0, atol=0)
    turned = q.transpose(1, 3).contiguous().transpose(1, 3)  # channels not in a row
    torch.testing.assert_close(run(turned, k, v), run(q, k, v), rtol=0, atol=0)
    for none in ((slice(0), slice(None)), (slice(None), slice(0))):  # no image, no token
        leaves = [x[none].clone().requires_grad_() for x in (q, k, v)]
        out = run(*leaves)
        assert out.shape == leaves[0].shape
        assert all(g.shape == out.shape for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.slow
def test_the_operator_is_one_to_tracers():
    torch._dynamo.reset()
    leaves = [x.detach().float().requires_grad_() for x in inputs(20)]
    torch.library.opcheck(
        schema.forward, (*leaves, 0.5, "triton"), test_utils=("test_schema", "test_faketensor")
    )

    def layer(q, k, v):
        return ops.channel_attention(q * 1.0, k, v, backend="triton").sin()

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
    told = ops.explain("channel_attention", *inputs(20, dtype=torch.float32))
    assert (told.backend, told.configuration) == ("triton", "tiles of 16 tokens, 4 warps, 1 stages")
    wide = inputs(4, dim=130)
    with pytest.raises(
        RuntimeError, match="more than 128 channels in torch.float64, found 130; use cpu or reference"
    ):
        ops.channel_attention(*wide, backend="triton")
