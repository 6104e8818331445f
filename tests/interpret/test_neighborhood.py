"""Neighborhood attention in Triton against the definition in float64 and stored outputs."""

from __future__ import annotations

import pytest
import torch
from goldens import cases, golden
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from zoo import ops

TIGHT = {"rtol": 1e-12, "atol": 1e-13}


def inputs(grid, *, batch=1, heads=1, kv_heads=None, dim=6, v_dim=None, dtype=torch.float64):
    shapes = ((heads, dim), (kv_heads or heads, dim), (kv_heads or heads, v_dim or dim))
    return [torch.randn(batch, *grid, *shape, dtype=dtype, requires_grad=True) for shape in shapes]


def everything(leaves, kernel_size, backend, grads, *, rpb=None, extra=None, **options):
    """Output, LSE and every gradient, the LSE's included."""
    more = {} if extra is None else {"extra_k": extra[0], "extra_v": extra[1]}
    out, lse = ops.neighborhood_attention(
        *leaves, kernel_size, rpb=rpb, return_lse=True, backend=backend, **more, **options
    )
    wanted = [*leaves, *([] if rpb is None else [rpb]), *(extra or [])]
    loss = (out * grads[0].to(out.dtype)).sum() + (lse * grads[1].to(lse.dtype)).sum()
    return [out, lse, *torch.autograd.grad(loss, wanted)]


def compare(leaves, kernel_size, **options):
    q, _, v = leaves
    grads = torch.randn(*q.shape[:-1], v.shape[-1]), torch.randn(q.shape[:-1])
    found, truth = (everything(leaves, kernel_size, b, grads, **options) for b in ("triton", "reference"))
    for fast, slow in zip(found, truth, strict=True):
        torch.testing.assert_close(fast, slow, **TIGHT)


def table(heads, kernel_size):
    return torch.randn(heads, *(2 * n - 1 for n in kernel_size), dtype=torch.float64, requires_grad=True)


# The most work for the interpreter; the rest of the stored cases run always.
LONG = ("na2d_rpb_k5_dil2", "na3d_causal_dil_stride", "na2d_even_stride_k6x5", "na2d_k3_gqa")
STORED = [
    pytest.param(*case.values, id=case.id, marks=[*case.marks, *[pytest.mark.slow] * (case.id in LONG)])
    for case in cases("neighborhood_attention")
]


@pytest.mark.parametrize("case", STORED)
def test_stored_outputs_and_gradients(case):
    facts, stored = golden().load_case(case)
    made = facts["constructor"]
    given_ = {
        name: golden().seeded_normal(name, shape, facts["seed"]) for name, shape in facts["inputs"].items()
    }
    grad = given_.pop("grad")
    leaves = {name: x.requires_grad_() for name, x in given_.items()}
    out, lse = ops.neighborhood_attention(
        *(leaves[name] for name in "qkv"),
        made["kernel_size"],
        **{name: made[name] for name in ("dilation", "stride", "is_causal", "scale")},
        rpb=leaves.get("rpb"),
        extra_k=leaves.get("k_extra"),
        extra_v=leaves.get("v_extra"),
        return_lse=True,
        backend="triton",
    )
    (out * grad).sum().backward()
    error, tolerance = golden().relative_error, facts["tolerance"]
    assert error(out, stored["out"]) <= tolerance["outputs"]
    assert error(lse, stored["lse"]) <= tolerance["outputs"]
    for name, leaf in leaves.items():
        assert error(leaf.grad, stored[f"d{name}"]) <= tolerance["gradients"], name


@pytest.mark.parametrize(
    ("grid", "kernel", "dim"), [((2,), (2,), 10), ((5,), (3,), 33), ((17,), (6,), 59), ((97,), (31,), 111)]
)
def test_any_length_and_width_is_exact(grid, kernel, dim):
    compare(inputs(grid, dim=dim, v_dim=dim + 2), kernel)


@pytest.mark.slow
def test_a_large_map():
    compare(inputs((20, 19), dim=12), (7, 7))


@pytest.mark.parametrize("dilation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_relative_bias_and_its_gradient(dilation, small_tiles):
    compare(inputs((5, 6)), (2, 3), dilation=dilation, rpb=table(1, (2, 3)))


@pytest.mark.slow
def test_a_relative_bias_of_several_heads_and_images(small_tiles):
    leaves = inputs((7, 8), batch=2, heads=2, kv_heads=1)
    compare(leaves, (3, 4), dilation=(1, 2), rpb=table(2, (3, 4)))


@pytest.mark.slow
def test_relative_biases_of_one_and_three_axes():
    compare(inputs((19,)), (5,), rpb=table(1, (5,)))
    compare(inputs((4, 5, 4)), (2, 3, 4), is_causal=(True, False, False), rpb=table(1, (2, 3, 4)))


def test_extra_keys_are_in_the_same_softmax():
    extra = [torch.randn(1, 5, 1, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    compare(inputs((6, 7), heads=2, kv_heads=1), (3, 3), extra=extra, rpb=table(2, (3, 3)))


@st.composite
def windows(draw):
    rank = draw(st.integers(1, 3))
    longest = {1: 70, 2: 14, 3: 6}[rank]
    axes = []
    for _ in range(rank):
        kernel, dilation = draw(st.integers(2, 7)), draw(st.integers(1, 3))
        assume(kernel * dilation <= longest)
        length = draw(st.integers(kernel * dilation, longest))
        axes.append((length, kernel, dilation, draw(st.integers(1, kernel)), draw(st.booleans())))
    return tuple(zip(*axes, strict=True))


@settings(
    max_examples=3,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(windows(), st.sampled_from([1, 2]), st.integers(0, 2**31))
def test_any_size_and_window(axes, kv_heads, seed):
    torch.manual_seed(seed)
    grid, kernel, dilation, stride, causal = axes
    leaves = inputs(grid, heads=kv_heads, kv_heads=1, dim=4)
    compare(leaves, kernel, dilation=dilation, stride=stride, is_causal=causal)


@pytest.mark.slow
@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(windows(), st.integers(0, 2**31))
def test_any_size_and_window_in_small_tiles(small_tiles, axes, seed):
    torch.manual_seed(seed)
    grid, kernel, dilation, stride, causal = axes
    compare(inputs(grid, heads=1, dim=4), kernel, dilation=dilation, stride=stride, is_causal=causal)


def test_gradients_are_those_of_finite_differences():
    q, k, v = inputs((4, 5), heads=2, dim=3, v_dim=2, kv_heads=1)
    extra = torch.randn(2, 1, 2, 1, 3, dtype=torch.float64, requires_grad=True)

    def run(q, k, v, extra):
        return ops.neighborhood_attention(
            q, k, v, (3, 2), extra_k=extra[0], extra_v=extra[1, ..., :2], return_lse=True,
            backend="triton",
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, (q, k, v, extra), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_as_close_to_truth_as_the_definition(dtype):
    low = [x.detach().to(dtype).requires_grad_() for x in inputs((12, 11), dim=33)]
    rpb = table(1, (5, 5)).detach().float().requires_grad_()
    grads = torch.randn(1, 12, 11, 1, 33, dtype=dtype), torch.zeros(1, 12, 11, 1)
    run = lambda x, backend, rpb: everything(x, 5, backend, grads, rpb=rpb)  # noqa: E731
    exact = [x.detach().double().requires_grad_() for x in (*low, rpb)]
    truth = run(exact[:3], "reference", exact[3])
    errors = {
        backend: [(a.double() - b).abs().max() for a, b in zip(run(low, backend, rpb), truth, strict=True)]
        for backend in ("triton", "reference")
    }
    for place, (fast, budget) in enumerate(zip(errors["triton"], errors["reference"], strict=True)):
        low_products = 0 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps  # p and ds are cast
        assert fast <= 2 * budget + low_products + (1e-5 if place < 2 else 2e-4), place


def test_strided_packed_and_empty_inputs():
    packed = torch.randn(2, 6, 7, 3, 1, 8)
    q, k, v = packed.unbind(3)
    run = lambda *x: ops.neighborhood_attention(*x, 3, backend="triton")  # noqa: E731
    torch.testing.assert_close(run(q, k, v), run(*(x.contiguous() for x in (q, k, v))), rtol=0, atol=0)
    cropped = [x[:, 1:5, 2:6] for x in (q, k, v)]  # rows that do not follow each other
    torch.testing.assert_close(run(*cropped), run(*(x.contiguous() for x in cropped)), rtol=0, atol=0)
    assert run(q[:0], k[:0], v[:0]).shape == (0, 6, 7, 1, 8)


def test_an_empty_batch_gives_a_bias_gradient_of_zero():
    q, k, v = inputs((6, 6), batch=0)
    rpb = table(1, (3, 3))
    out = ops.neighborhood_attention(q, k, v, 3, rpb=rpb, backend="triton")
    assert (torch.autograd.grad(out.sum(), rpb)[0] == 0).all()


def test_the_operator_is_one_to_tracers():
    torch._dynamo.reset()
    q, k, v = (x.detach().float().requires_grad_() for x in inputs((6, 7)))
    rpb = table(1, (3, 3)).detach().float().requires_grad_()

    def layer(q, k, v, rpb):
        return ops.neighborhood_attention(q * 1.0, k, v, 3, rpb=rpb, backend="triton").sin()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, rpb), layer(q, k, v, rpb))
    for a, b in zip(
        torch.autograd.grad(compiled(q, k, v, rpb).sum(), (q, k, v, rpb)),
        torch.autograd.grad(layer(q, k, v, rpb).sum(), (q, k, v, rpb)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_explain_says_how():
    q, k, v = inputs((16, 16), dtype=torch.float32)
    told = ops.explain("neighborhood_attention", q, k, v, 7)
    assert (told.backend, told.reason) == ("triton", "the fastest that can run")
    assert told.configuration.startswith("tiles of ")
