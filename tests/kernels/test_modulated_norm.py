"""The modulated norm: what PyTorch's norm and two more passes compute, with its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo import ops

BACKENDS = ("cpu", "reference")


def arguments(tokens=(5,), channels=6, batch=2, dtype=torch.float64):
    x = 3 * torch.randn(batch, *tokens, channels, dtype=dtype) + 1
    scale, shift = torch.randn(2, batch, *(1,) * len(tokens), channels, dtype=dtype).unbind()
    return x, scale, shift


@settings(deadline=None, max_examples=25)
@given(
    tokens=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    channels=st.integers(1, 9),
    batch=st.integers(0, 3),
    eps=st.sampled_from([1e-6, 0.5]),
)
def test_it_is_what_the_layers_compute(tokens, channels, batch, eps):
    x, scale, shift = arguments(tokens, channels, batch)
    for norm, layer in (("layer", F.layer_norm), ("rms", F.rms_norm)):
        expected = layer(x, (channels,), eps=eps) * (1 + scale) + shift
        for backend in ("auto", "reference"):
            out = ops.modulated_norm(x, scale, shift, norm=norm, eps=eps, backend=backend)
            torch.testing.assert_close(out, expected)
    one = ops.modulated_norm(x[:1], scale[:1], shift[:1], eps=eps)
    torch.testing.assert_close(one, ops.modulated_norm(x, scale, shift, eps=eps)[:1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_are_right_twice(backend, batch):
    inputs = tuple(x.requires_grad_() for x in arguments((2, 2), 4, batch))
    run = lambda *x: ops.modulated_norm(*x, eps=0.1, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_the_condition_may_have_axes_of_one_token_or_none():
    x, scale, shift = arguments((2, 3))
    flat = ops.modulated_norm(x, scale[:, 0, 0], shift[:, 0])
    assert torch.equal(ops.modulated_norm(x, scale, shift), flat)


def test_compile_and_export_with_any_batch_and_length():
    torch._dynamo.reset()
    inputs = arguments((5,), dtype=torch.float32)

    class Model(torch.nn.Module):
        def forward(self, x, scale, shift):
            return ops.modulated_norm(x, scale, shift)

    compiled = torch.compile(Model(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), Model()(*inputs))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = ({0: batch, 1: length}, {0: batch}, {0: batch})
    program = torch.export.export(Model(), inputs, dynamic_shapes=shapes)
    more = arguments((9,), batch=3, dtype=torch.float32)
    torch.testing.assert_close(program.module()(*more), Model()(*more))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 6)}, r"x must be \[B, \*tokens, C\]"),
        ({"x": torch.zeros(2, 5, 0)}, r"x must be \[B, \*tokens, C\]"),
        ({"scale": torch.zeros(2, 5, 6)}, r"scale must be \[2, 6\], also with axes of one token"),
        ({"shift": torch.zeros(1, 6)}, r"shift must be \[2, 6\], .* found \(1, 6\)"),
        ({"norm": "batch"}, "norm must be layer or rms, found 'batch'"),
        ({"eps": None}, "eps must be a number that is not negative, found None"),
        ({"eps": -1.0}, "eps must be a number that is not negative, found -1.0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    given = dict(zip(("x", "scale", "shift"), arguments(dtype=torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        ops.modulated_norm(**{**given, **change})


def test_explain_and_refusal():
    inputs = arguments()
    assert ops.explain("modulated_norm", *inputs).backend == "cpu"
    told = ops.explain("modulated_norm", *inputs, norm="rms")
    assert told.backend == "reference" and "RMS norm of one pass" in told.reason
    with pytest.raises(RuntimeError, match="triton.*use cpu or reference"):
        ops.modulated_norm(*inputs, backend="triton")
