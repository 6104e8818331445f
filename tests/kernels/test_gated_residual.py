"""The gated residual: a sum and a product, in one pass, with its gradients and the residual's precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo import ops

BACKENDS = ("cpu", "reference")


def arguments(tokens=(5,), channels=6, batch=2, dtype=torch.float64):
    x, y = torch.randn(2, batch, *tokens, channels, dtype=dtype).unbind()
    return x, y, torch.randn(batch, *(1,) * len(tokens), channels, dtype=dtype)


@settings(deadline=None, max_examples=25)
@given(
    tokens=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    channels=st.integers(1, 9),
    batch=st.integers(0, 3),
)
def test_it_is_a_sum_and_a_product(tokens, channels, batch):
    x, y, gate = arguments(tokens, channels, batch)
    for backend in ("auto", *BACKENDS):
        torch.testing.assert_close(ops.gated_residual(x, y, gate, backend=backend), x + gate * y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_right_twice(backend):
    inputs = tuple(x.requires_grad_() for x in arguments((2, 2), 4))
    run = lambda *x: ops.gated_residual(*x, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast_the_residual_keeps_its_precision(backend):
    x, y, gate = (part.requires_grad_() for part in arguments(dtype=torch.float32))
    low = y.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.gated_residual(x, low, gate, backend=backend)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, x + gate * low.float())
    assert [g.dtype for g in torch.autograd.grad(out.sum(), (x, y, gate))] == [torch.float32] * 3


def test_compile_and_export_with_any_batch_and_length():
    torch._dynamo.reset()
    inputs = arguments((5,), dtype=torch.float32)

    class Model(torch.nn.Module):
        def forward(self, x, y, gate):
            return ops.gated_residual(x, y, gate)

    compiled = torch.compile(Model(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), Model()(*inputs))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = ({0: batch, 1: length}, {0: batch, 1: length}, {0: batch})
    program = torch.export.export(Model(), inputs, dynamic_shapes=shapes)
    more = arguments((9,), batch=3, dtype=torch.float32)
    torch.testing.assert_close(program.module()(*more), Model()(*more))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 6)}, r"x must be \[B, \*tokens, C\]"),
        ({"y": torch.zeros(2, 4, 6)}, r"y must have x's shape \(2, 5, 6\), found \(2, 4, 6\)"),
        ({"gate": torch.zeros(6)}, r"gate must be \[2, 6\], .* found \(6,\)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    given = dict(zip(("x", "y", "gate"), arguments(dtype=torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        ops.gated_residual(**{**given, **change})


def test_explain():
    assert ops.explain("gated_residual", *arguments()).backend == "cpu"
    assert ops.explain("gated_residual", *arguments(), backend="reference").reason == "asked for by name"
