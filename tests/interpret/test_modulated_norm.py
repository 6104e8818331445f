"""The modulated norm in Triton against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from zoo import ops

TIGHT = {"rtol": 1e-12, "atol": 1e-13}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Shares of several tiles, and tiles of several tokens, at small sizes."""
    from zoo.kernels.configs import Config
    from zoo.kernels.modulated_norm import triton

    monkeypatch.setattr(triton, "PROGRAMS", 6)
    monkeypatch.setattr(triton, "config", lambda x: Config(16, 0, 4, 1))


def inputs(n=9, width=12, *, batch=2, dtype=torch.float64):
    shapes = {"x": (batch, n, width), "scale": (batch, 1, width), "shift": (batch, width)}
    return {name: torch.randn(shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}


def everything(leaves, backend, grad, **options):
    out = ops.modulated_norm(**leaves, **options, backend=backend)
    return [out, *torch.autograd.grad((out * grad.to(out.dtype)).sum(), list(leaves.values()))]


def compare(leaves, **options):
    grad = torch.randn(leaves["x"].shape)
    found, truth = (everything(leaves, backend, grad, **options) for backend in ("triton", "reference"))
    torch.testing.assert_close(found, truth, **TIGHT)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_images_and_shares_of_tokens(norm):
    compare(inputs(97, 20), norm=norm, eps=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(("n", "width"), [(1, 1), (2, 10), (5, 33), (17, 59), (97, 80), (257, 111)])
def test_any_length_and_width_is_exact(n, width, norm):
    compare(inputs(n, width), norm=norm)


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
    x = torch.randn(2, 3, 4, 2, 12).unbind(3)[0]
    scale, shift = torch.randn(2, 2, 1, 1, 12).unbind()
    run = lambda *x: ops.modulated_norm(*x, backend="triton")  # noqa: E731
    plain = run(x.contiguous(), scale, shift)
    torch.testing.assert_close(run(x, scale, shift), plain, rtol=0, atol=0)
    turned = x.transpose(1, 3).contiguous().transpose(1, 3)  # channels not in a row
    torch.testing.assert_close(run(turned, scale, shift), plain, rtol=0, atol=0)
    one = x[:1].expand(2, -1, -1, -1).requires_grad_()
    torch.testing.assert_close(run(one, scale, shift)[0], plain[0], rtol=0, atol=0)
    for none in ((slice(0), slice(None)), (slice(None), slice(0))):  # no image, no token
        leaves = [part[none] if part is x else part[none[:1]] for part in (x, scale, shift)]
        leaves = [part.clone().requires_grad_() for part in leaves]
        out = run(*leaves)
        assert out.shape == leaves[0].shape
        for gradient, leaf in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
            assert gradient.shape == leaf.shape and not gradient.any()


@pytest.mark.slow
def test_a_token_without_numbers_stays_alone():
    leaves = inputs(9, 12)
    damaged = {**leaves, "x": leaves["x"].detach().clone()}
    damaged["x"][0, 3] = torch.nan
    found, expected = (ops.modulated_norm(**some, backend="triton") for some in (damaged, leaves))
    assert found[0, 3].isnan().all()
    kept = torch.ones(2, 9, dtype=torch.bool)
    kept[0, 3] = False
    torch.testing.assert_close(found[kept], expected[kept], rtol=0, atol=0)


@pytest.mark.slow
def test_the_operator_is_one_to_tracers():
    torch._dynamo.reset()
    leaves = [x.detach().float().requires_grad_() for x in inputs().values()]

    def layer(x, scale, shift):
        return ops.modulated_norm(x * 1.0, scale, shift, backend="triton").sin()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), layer(*leaves))
    found, truth = (torch.autograd.grad(run(*leaves).sum(), leaves) for run in (compiled, layer))
    torch.testing.assert_close(found, truth)


def test_explain_and_refusals():
    told = ops.explain("modulated_norm", **inputs(dtype=torch.float32))
    assert (told.backend, told.configuration) == ("triton", "tiles of 16 tokens, 4 warps")
    with pytest.raises(RuntimeError, match="more than 8192 channels, found 9000; use cpu or reference"):
        ops.modulated_norm(**inputs(1, 9000), backend="triton")
