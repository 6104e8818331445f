"""Aligned attention: a query sees the keys at and around its own place of another grid."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo import ops
from zoo.kernels.aligned.reference import keys_of

BACKENDS = ("cpu", "reference")


def inputs(
    grid: tuple[int, ...], heads: int = 2, kv_heads: int = 2, width: int = 5, **options: object
) -> list:
    kind = {"dtype": torch.float64, **options}
    shapes = [(heads, width), (kv_heads, width), (kv_heads, width + 1)]
    return [torch.randn(2, *grid, *shape, **kind) for shape in shapes]


def brute_force(q: Tensor, k: Tensor, v: Tensor, radius: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """All pairs of places, those too far apart masked."""
    grid, shared = q.shape[1:-2], q.shape[-2] // k.shape[-2]
    places = torch.cartesian_prod(*map(torch.arange, grid)).view(-1, len(grid))
    seen = ((places[:, None] - places).abs() <= torch.tensor(radius)).all(dim=-1)
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
    logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    out = (logits.softmax(dim=-1) @ v).transpose(1, 2).unflatten(1, grid)
    return out, logits.logsumexp(dim=-1).transpose(1, 2).unflatten(1, grid)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(
    axes=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=3),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
)
def test_it_is_attention_to_all_places_that_are_near(backend, axes, heads):
    grid, radius = zip(*axes, strict=True)
    q, k, v = inputs(grid, *heads)
    found = ops.aligned_attention(q, k, v, radius, return_lse=True, backend=backend)
    for x, truth in zip(found, brute_force(q, k, v, radius), strict=True):
        torch.testing.assert_close(x, truth)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("radius", [0, 1, (0, 2)])
def test_gradients_are_right_of_output_and_lse_and_once_more(backend, radius):
    q, k, v = (x.requires_grad_() for x in inputs((2, 3), heads=2, kv_heads=1, width=2))

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.aligned_attention(q, k, v, radius, return_lse=True, backend=backend)

    assert torch.autograd.gradcheck(call, (q, k, v))
    assert torch.autograd.gradgradcheck(call, (q, k, v))


def test_one_key_is_its_value_whatever_the_query():
    q, k, v = (x.requires_grad_() for x in inputs((3, 4)))
    out, lse = ops.aligned_attention(q, k, v, return_lse=True)
    assert torch.equal(out, v)
    torch.testing.assert_close(lse, (q * k).sum(-1) * q.shape[-1] ** -0.5)
    (gradient,) = torch.autograd.grad(out.sum(), q, allow_unused=True)
    assert gradient is None or not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rounds_once(backend, dtype):
    tensors = inputs((4, 5), dtype=dtype)
    out, lse = ops.aligned_attention(*tensors, 1, return_lse=True, backend=backend)
    truth, truth_lse = brute_force(*(x.double() for x in tensors), (1, 1))
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert (out.double() - truth).abs().max() <= 4 * torch.finfo(dtype).eps * truth.abs().max()
    assert (lse.double() - truth_lse).abs().max() <= 1e-5


def test_it_compiles_exports_and_takes_strange_tensors():
    q, k, v = inputs((3, 4), dtype=torch.float32)
    wanted = ops.aligned_attention(q, k, v, 1)
    compiled = torch.compile(ops.aligned_attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v, 1), wanted)

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.aligned_attention(q, k, v, 1)

    # Any batch, and any map that holds a window of 3 x 3.
    free = [torch.export.Dim(name, min=least) for name, least in (("batch", 1), ("rows", 3), ("columns", 3))]
    shapes = (dict(enumerate(free)),) * 3
    program = torch.export.export(Module(), (q, k, v), dynamic_shapes=shapes).module()
    more = [torch.cat([x, x, x])[:, :, :3] for x in (q, k, v)]
    for tensors in ((q, k, v), more):
        assert torch.equal(program(*tensors), ops.aligned_attention(*tensors, 1))
    turned = (x.transpose(1, 2) for x in (q, k, v))
    torch.testing.assert_close(ops.aligned_attention(*turned, 1), wanted.transpose(1, 2))
    assert ops.aligned_attention(q[:0], k[:0], v[:0], 1).shape == (0, 3, 4, 2, 6)
    assert ops.aligned_attention(q[:, :0], k[:, :0], v[:, :0], 1).shape == (2, 0, 4, 2, 6)
    expanded = ops.aligned_attention(q[:1].expand(2, -1, -1, -1, -1), k, v, 1)
    torch.testing.assert_close(expanded[0], ops.aligned_attention(q[:1], k[:1], v[:1], 1)[0])
    mapped = torch.func.vmap(lambda *x: ops.aligned_attention(*x, 1))(q[None], k[None], v[None])
    torch.testing.assert_close(mapped[0], wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.aligned_attention(q, k, v, 1).dtype == torch.bfloat16


def test_keys_lie_around_their_query_and_inside_the_grid():
    index, visible = keys_of((2, 3), (1, 0))
    assert index.masked_fill(~visible, -1).tolist() == [
        [-1, 0, 3], [-1, 1, 4], [-1, 2, 5], [0, 3, -1], [1, 4, -1], [2, 5, -1],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radius": -1}, "radius .* found -1"),
        ({"radius": (1, 1, 1)}, r"2 axes, found \(1, 1, 1\)"),
        ({"radius": 1.5}, "radius .* found 1.5"),
        ({"k": torch.zeros(2, 3, 5, 2, 5)}, r"k must have .* found \(2, 3, 5, 2, 5\)"),
        ({"v": torch.zeros(2, 3, 4, 1, 5)}, r"v must have .* found \(2, 3, 4, 1, 5\)"),
        ({"q": torch.zeros(2, 3, 4, 3, 5)}, "q's 3 heads .* k's 2"),
        ({"k": torch.zeros(2, 3, 4, 2, 5).half()}, "k must have q's dtype"),
        ({"scale": torch.tensor(1.0)}, "scale must be a number"),
        ({"backend": "triton9"}, "no backend 'triton9'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change, message):
    q, k, v = inputs((3, 4), dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        ops.aligned_attention(**{"q": q, "k": k, "v": v, **change})


def test_explain_names_the_backend():
    q, k, v = inputs((3, 4))
    assert ops.explain("aligned_attention", q, k, v, 1).backend == "cpu"
    assert ops.explain("aligned_attention", q, k, v, backend="reference").backend == "reference"
