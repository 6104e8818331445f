"""The gated residual in Triton against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from zoo import ops


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Shares of several tiles, tiles of several tokens, and several parts of the channels at small sizes."""
    from zoo.kernels.configs import Config
    from zoo.kernels.gated_residual import triton

    monkeypatch.setattr(triton, "PROGRAMS", 8)
    monkeypatch.setattr(triton, "config", lambda x: Config(16, 32, 4, 1))


def inputs(n=9, width=12, *, batch=2, dtype=torch.float64):
    shapes = {"x": (batch, n, width), "y": (batch, n, width), "gate": (batch, 1, width)}
    return {name: torch.randn(shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}


def everything(leaves, backend, grad):
    out = ops.gated_residual(**leaves, backend=backend)
    return [out, *torch.autograd.grad((out * grad.to(out.dtype)).sum(), list(leaves.values()))]


def compare(leaves):
    grad = torch.randn(leaves["x"].shape)
    found, truth = (everything(leaves, backend, grad) for backend in ("triton", "reference"))
    torch.testing.assert_close(found, truth, rtol=1e-13, atol=1e-14)


def test_images_channels_and_shares_of_tokens():
    compare(inputs(97, 40))


@pytest.mark.slow
@pytest.mark.parametrize(("n", "width"), [(1, 1), (2, 10), (5, 33), (17, 59), (97, 80), (257, 111)])
def test_any_length_and_width_is_exact(n, width):
    compare(inputs(n, width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_as_close_to_truth_as_the_definition(dtype):
    low = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs(40, 48).items()}
    grad = torch.randn(2, 40, 48, dtype=dtype)
    truth = everything(
        {name: x.detach().double().requires_grad_() for name, x in low.items()}, "reference", grad
    )
    ours, theirs = (
        [(a.double() - b).abs().max() for a, b in zip(everything(low, backend, grad), truth, strict=True)]
        for backend in ("triton", "reference")
    )
    for place, (fast, budget) in enumerate(zip(ours, theirs, strict=True)):
        assert fast <= 2 * budget + (1e-5 if place == 0 else 2e-4), place


@pytest.mark.slow
def test_grids_strided_expanded_and_empty_inputs():
    x, y = torch.randn(2, 3, 4, 2, 12).unbind(3)
    gate = torch.randn(2, 12)
    run = lambda *x: ops.gated_residual(*x, backend="triton")  # noqa: E731
    plain = run(x.contiguous(), y.contiguous(), gate)
    torch.testing.assert_close(run(x, y, gate), plain, rtol=0, atol=0)
    turned = y.transpose(1, 3).contiguous().transpose(1, 3)  # channels not in a row
    torch.testing.assert_close(run(x, turned, gate), plain, rtol=0, atol=0)
    one = x[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(run(one, y, gate)[0], plain[0], rtol=0, atol=0)
    for none in ((slice(0), slice(None)), (slice(None), slice(0))):  # no image, no token
        leaves = [part[none] if part is not gate else part[none[:1]] for part in (x, y, gate)]
        leaves = [part.clone().requires_grad_() for part in leaves]
        out = run(*leaves)
        assert out.shape == leaves[0].shape
        for gradient, leaf in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
            assert gradient.shape == leaf.shape


@pytest.mark.slow
def test_the_operator_is_one_to_tracers():
    torch._dynamo.reset()
    leaves = [x.detach().float().requires_grad_() for x in inputs().values()]

    def layer(x, y, gate):
        return ops.gated_residual(x * 1.0, y, gate, backend="triton").sin()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), layer(*leaves))
    found, truth = (torch.autograd.grad(run(*leaves).sum(), leaves) for run in (compiled, layer))
    torch.testing.assert_close(found, truth)


def test_explain():
    told = ops.explain("gated_residual", **inputs(dtype=torch.float32))
    assert (told.backend, told.configuration) == ("triton", "tiles of 16 tokens and 32 channels, 4 warps")
