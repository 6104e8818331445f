"""Norm and rotary positions in Triton against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from zoo import ops

KINDS = pytest.mark.parametrize("kind", ["both", "norm", "turn"])


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Shares of several tiles, and tiles of several heads, at small sizes."""
    from zoo.kernels.configs import Config
    from zoo.kernels.rotary_norm import triton

    monkeypatch.setattr(triton, "PROGRAMS", 6)
    monkeypatch.setattr(triton, "config", lambda x: Config(16, 0, 4, 1))


def inputs(kind="both", n=5, width=12, *, heads=3, batch=2, dtype=torch.float64):
    """Leaves, and the angles of the tokens."""
    leaves = {"x": torch.randn(batch, n, heads, width, dtype=dtype).requires_grad_()}
    if kind != "turn":
        leaves["weight"] = torch.randn(width, dtype=dtype).requires_grad_()
    if kind == "norm":
        return leaves, {}
    angles = 9 * torch.randn(n, width // 2, dtype=dtype)
    return leaves, {"cos": angles.cos(), "sin": angles.sin()}


def everything(leaves, angles, backend, grad):
    out = ops.rotary_norm(**leaves, **angles, eps=1e-3, backend=backend)
    return [out, *torch.autograd.grad((out * grad.to(out.dtype)).sum(), list(leaves.values()))]


def compare(leaves, angles):
    grad = torch.randn(leaves["x"].shape)
    found, truth = (everything(leaves, angles, backend, grad) for backend in ("triton", "reference"))
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-13)


@KINDS
def test_images_heads_and_shares_of_tokens(kind):
    compare(*inputs(kind, 37, 20))


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize(("n", "width"), [(1, 2), (2, 10), (5, 34), (17, 58), (97, 80), (257, 112)])
def test_any_length_and_even_width_is_exact(n, width, kind):
    compare(*inputs(kind, n, width, heads=2, batch=1))


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 33, 111])
def test_a_norm_takes_any_width(width):
    compare(*inputs("norm", 7, width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_as_close_to_truth_as_the_definition(dtype):
    exact, angles = inputs("both", 20, 32)
    low = {name: x.detach().to(dtype).requires_grad_() for name, x in exact.items()}
    angles = {name: x.float() for name, x in angles.items()}
    grad = torch.randn(2, 20, 3, 32, dtype=dtype)
    leaves = {name: x.detach().double().requires_grad_() for name, x in low.items()}
    truth = everything(leaves, angles, "reference", grad)
    ours, theirs = (
        [
            (a.double() - b).abs().max()
            for a, b in zip(everything(low, angles, backend, grad), truth, strict=True)
        ]
        for backend in ("triton", "reference")
    )
    for place, (fast, budget) in enumerate(zip(ours, theirs, strict=True)):
        assert fast <= 2 * budget + (1e-5 if place == 0 else 2e-4), place


@pytest.mark.slow
def test_grids_packed_strided_expanded_and_empty_inputs():
    x = torch.randn(2, 3, 4, 3, 2, 12).unbind(3)[1]  # of a projection to queries, keys and values
    weight, angles = torch.randn(12), torch.randn(3, 4, 6)
    run = lambda x: ops.rotary_norm(x, weight, angles.cos(), angles.sin(), backend="triton")  # noqa: E731
    plain = run(x.contiguous())
    torch.testing.assert_close(run(x), plain, rtol=0, atol=0)
    turned = x.transpose(2, 4).contiguous().transpose(2, 4)  # channels not in a row
    torch.testing.assert_close(run(turned), plain, rtol=0, atol=0)
    torch.testing.assert_close(run(x[:1].expand(2, -1, -1, -1, -1))[1], plain[0], rtol=0, atol=0)
    some = x[:0].clone().requires_grad_()
    assert torch.autograd.grad(run(some).sum(), some)[0].shape == some.shape


@pytest.mark.slow
def test_the_operator_is_one_to_tracers():
    torch._dynamo.reset()
    leaves, angles = inputs(dtype=torch.float32)
    leaves = list(leaves.values())

    def layer(x, weight):
        return ops.rotary_norm(x * 1.0, weight, **angles, backend="triton").sin()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), layer(*leaves))
    found, truth = (torch.autograd.grad(run(*leaves).sum(), leaves) for run in (compiled, layer))
    torch.testing.assert_close(found, truth)


def test_explain_and_refusals():
    leaves, angles = inputs(dtype=torch.float32)
    told = ops.explain("rotary_norm", **leaves, **angles)
    assert (told.backend, told.configuration) == ("triton", "tiles of 16 heads, 4 warps")
    with pytest.raises(RuntimeError, match="cos and sin want gradients; use cpu or reference"):
        ops.rotary_norm(**leaves, cos=angles["cos"].requires_grad_(), sin=angles["sin"], backend="triton")
