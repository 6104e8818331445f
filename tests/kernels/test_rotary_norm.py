"""Norm and rotary positions: PyTorch's norm, points of a plane turned, and products that see distances."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo import ops

BACKENDS = ("cpu", "reference")


def arguments(tokens=(5,), width=6, heads=2, batch=2, dtype=torch.float64):
    x = torch.randn(batch, *tokens, heads, width, dtype=dtype)
    angles = 5 * torch.randn(*tokens, width // 2, dtype=dtype)
    return {"x": x, "weight": torch.randn(width, dtype=dtype), "cos": angles.cos(), "sin": angles.sin()}


@settings(deadline=None, max_examples=25)
@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    pairs=st.integers(1, 4),
    heads=st.integers(1, 3),
    batch=st.integers(0, 3),
    normed=st.booleans(),
    turned=st.booleans(),
)
def test_it_is_a_norm_and_a_turn_of_points(tokens, pairs, heads, batch, normed, turned):
    given = arguments(tokens, 2 * pairs, heads, batch)
    expected = given["x"]
    if normed:
        expected = F.rms_norm(expected, (2 * pairs,), given["weight"], 1e-6)
    if turned:
        turn = torch.stack([given["cos"], -given["sin"], given["sin"], given["cos"]], -1).unflatten(
            -1, (2, 2)
        )
        points = expected.unflatten(-1, (-1, 2))
        expected = (turn[..., None, :, :, :] @ points[..., None]).flatten(-3)
    kept = ["x", *["weight"] * normed, *["cos", "sin"] * turned]
    for backend in ("auto", *BACKENDS):
        out = ops.rotary_norm(**{name: given[name] for name in kept}, backend=backend)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_tensors_may_begin_at_any_place_of_their_memory(backend):
    x = torch.randn(1 + 2 * 4 * 2 * 8)[1:].view(2, 4, 2, 8)
    cos, sin = torch.randn(2, 4, 4)
    out = ops.rotary_norm(x, None, cos, sin, backend=backend)
    torch.testing.assert_close(out, ops.rotary_norm(x.clone(), None, cos, sin, backend=backend))


def test_products_of_queries_and_keys_see_distances_alone():
    q, k = (torch.randn(8, dtype=torch.float64).expand(1, 20, 1, -1) for _ in range(2))
    angles = torch.arange(20.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
    q, k = (ops.rotary_norm(x, cos=angles.cos(), sin=angles.sin())[0, :, 0] for x in (q, k))
    products = q @ k.T
    torch.testing.assert_close(products[:-3, :-3], products[3:, 3:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_right_twice(backend):
    inputs = tuple(x.requires_grad_() for x in arguments((2, 2), 4).values())
    run = lambda *x: ops.rotary_norm(*x, eps=0.1, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    given = {name: x.to(dtype) for name, x in arguments((50,), 32).items()}
    exact = ops.rotary_norm(**{name: x.double() for name, x in given.items()})
    for backend in BACKENDS:
        out = ops.rotary_norm(**given, backend=backend)
        assert out.dtype == dtype
        assert ((out.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-5).all()


def test_compile_and_export_with_any_batch_and_length():
    torch._dynamo.reset()
    given = arguments((5,), dtype=torch.float32)

    class Model(torch.nn.Module):
        def forward(self, x, weight, cos, sin):
            return ops.rotary_norm(x, weight, cos, sin)

    compiled = torch.compile(Model(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**given), Model()(**given))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = ({0: batch, 1: length}, None, {0: length}, {0: length})
    program = torch.export.export(Model(), tuple(given.values()), dynamic_shapes=shapes)
    more = arguments((8,), batch=3, dtype=torch.float32)
    torch.testing.assert_close(program.module()(*more.values()), Model()(**more))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 6)}, r"x must be \[B, \*tokens, H, D\]"),
        ({"weight": torch.zeros(5)}, r"weight must be \[6\], found \(5,\)"),
        ({"cos": torch.zeros(4, 3)}, r"cos must be \[\*tokens, D / 2\] = \(5, 3\), found \(4, 3\)"),
        ({"sin": torch.zeros(5, 6)}, r"sin must be \[\*tokens, D / 2\] = \(5, 3\), found \(5, 6\)"),
        ({"sin": None}, "sin must come with the other"),
        ({"cos": torch.zeros(5, 3).long()}, "cos must be float64"),
        ({"sin": torch.zeros(5, 3, device="meta")}, "sin must be on x's device cpu"),
        ({"x": torch.zeros(2, 5, 2, 5), "weight": None}, "x must have pairs of channels .* found 5 channels"),
        ({"eps": None}, "eps must be a number that is not negative, found None"),
        ({"eps": -1.0}, "eps must be a number that is not negative"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ops.rotary_norm(**{**arguments(dtype=torch.float32), **change})


def test_explain():
    given = arguments()
    assert ops.explain("rotary_norm", **given).backend == "cpu"
    assert ops.explain("rotary_norm", **given, backend="reference").reason == "asked for by name"
