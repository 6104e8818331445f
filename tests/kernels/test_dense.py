"""Attention of all to all: the definition against brute force, the other paths against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo import ops

BACKENDS = ("reference", "cpu", "sdpa")
WITH_LSE = ("reference", "cpu")
WIDTHS = (10, 12, 33, 59, 80, 111)
LENGTHS = (1, 2, 5, 17, 97, 257)


def inputs(n=7, m=None, *, batch=2, heads=2, kv_heads=None, dim=8, v_dim=None, dtype=torch.float64):
    m, kv_heads = m or n, kv_heads or heads
    shapes = (n, heads, dim), (m, kv_heads, dim), (m, kv_heads, v_dim or dim)
    return [torch.randn(batch, *shape).to(dtype).requires_grad_() for shape in shapes]


def brute_force(q, k, v, key_mask, scale=None):
    """One image, head and query at a time: output and LSE."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shared = q.shape[2] // k.shape[2]
    out, lse = q.new_zeros(*q.shape[:3], v.shape[-1]), q.new_full(q.shape[:3], -math.inf)
    for b in range(len(q)):
        seen = slice(None) if key_mask is None else key_mask[b]
        for h in range(q.shape[2]):
            keys, values = k[b, seen, h // shared], v[b, seen, h // shared]
            for n in range(q.shape[1] if len(keys) else 0):
                logits = scale * keys @ q[b, n, h]
                out[b, n, h], lse[b, n, h] = logits.softmax(0) @ values, logits.logsumexp(0)
    return out, lse


def everything(leaves, backend, key_mask=None, **options):
    """Output, the LSE where there is one, every gradient."""
    torch.manual_seed(1)
    with_lse = backend in WITH_LSE and options.pop("return_lse", True)
    found = ops.attention(*leaves, key_mask=key_mask, return_lse=with_lse, backend=backend, **options)
    found = found if with_lse else (found,)
    loss = sum((x.where(x.isfinite(), 0.0) * torch.randn(x.shape)).sum() for x in found)
    return [*found, *torch.autograd.grad(loss, leaves)]


@given(
    n=st.integers(0, 12),
    m=st.integers(0, 12),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    widths=st.sampled_from([(1, 1), (4, 4), (8, 3), (5, 20)]),
    masked=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
)
@settings(max_examples=30, deadline=None)
def test_every_backend_is_the_definition(n, m, heads, widths, masked, scale):
    torch.manual_seed(n + 13 * m)
    shapes = (n, heads[0], widths[0]), (m, heads[1], widths[0]), (m, heads[1], widths[1])
    q, k, v = (torch.randn(2, *shape, dtype=torch.float64) for shape in shapes)
    mask = torch.rand(2, m) < 0.5 if masked else None
    out, lse = brute_force(q, k, v, mask, scale)
    for backend in BACKENDS:
        with_lse = backend in WITH_LSE
        found = ops.attention(q, k, v, key_mask=mask, scale=scale, return_lse=with_lse, backend=backend)
        found, wanted = (found, (out, lse)) if with_lse else ((found,), (out,))
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["cpu", "sdpa"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dim", "v_dim"), [*((d, d) for d in WIDTHS), (33, 59)])
def test_any_length_and_width_has_the_same_values_and_gradients(backend, masked, dim, v_dim):
    for n, m in zip(LENGTHS, LENGTHS[::-1], strict=True):
        torch.manual_seed(n)
        leaves = inputs(n, m, batch=1, heads=2, kv_heads=1, dim=dim, v_dim=v_dim)
        mask = torch.rand(1, m) < 0.7 if masked else None
        found = everything(leaves, backend, mask)
        truth = everything(leaves, "reference", mask, return_lse=backend in WITH_LSE)
        for ours, theirs in zip(found, truth, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [10, 80])
def test_low_precision_errs_at_most_twice_as_much_as_the_definition(dtype, width):
    leaves = inputs(97, 257, batch=1, dim=width, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = everything(exact, "reference")
    errors = {
        backend: [
            ((a.double() - b).abs().max() / b.abs().max()).item()
            for a, b in zip(everything(leaves, backend), truth, strict=True)
        ]
        for backend in WITH_LSE
    }
    for place, (ours, theirs) in enumerate(zip(errors["cpu"], errors["reference"], strict=True)):
        assert ours <= 2 * max(theirs, torch.finfo(dtype).eps) + (1e-5 if place < 2 else 2e-4), place


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_leaks_from_behind_the_mask_and_an_image_without_keys_is_zero(backend):
    q, k, v = (x.detach() for x in inputs(5, 9))
    mask = torch.arange(9) < torch.tensor([[6], [0]])
    leaves = [q, *(x.masked_fill(~mask[..., None, None], bad) for x, bad in ((k, math.nan), (v, math.inf)))]
    out, *rest = everything([x.requires_grad_() for x in leaves], backend, mask)
    torch.testing.assert_close(out[:1], ops.attention(q[:1], k[:1, :6], v[:1, :6], backend="reference"))
    assert (out[1] == 0).all() and all(x.isfinite().all() for x in rest[-3:])
    assert (rest[-2].masked_select(~mask[..., None, None]) == 0).all()
    if backend in WITH_LSE:
        assert (rest[0][1] == -math.inf).all()


@pytest.mark.parametrize("backend", WITH_LSE)
def test_gradients_of_output_and_lse_are_right(backend):
    leaves = inputs(4, 5, kv_heads=1, dim=3, v_dim=2)
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 0, 0]], dtype=torch.bool)
    run = lambda *leaves: ops.attention(*leaves, key_mask=mask, return_lse=True, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_expanded_and_empty_inputs(backend):
    packed = torch.randn(2, 9, 3, 2, 8)
    q, k, v = packed.unbind(2)
    out = ops.attention(q, k, v, backend=backend)
    torch.testing.assert_close(out, ops.attention(*(x.contiguous() for x in (q, k, v)), backend=backend))
    one = k[:1].expand(2, -1, -1, -1)
    assert torch.equal(
        ops.attention(q, one, one, backend=backend),
        ops.attention(q, *[one.contiguous()] * 2, backend=backend),
    )
    none = [x[:0].detach().requires_grad_() for x in (q, k, v)]
    out = ops.attention(*none, key_mask=torch.ones(0, 9, dtype=torch.bool), backend=backend)
    assert out.shape == (0, 9, 2, 8)
    assert all(x.shape == y.shape for x, y in zip(torch.autograd.grad(out.sum(), none), none, strict=True))


def test_the_order_of_keys_does_not_matter_and_parts_can_be_merged():
    q, k, v = inputs(7, 9)
    out, lse = ops.attention(q, k, v, return_lse=True)
    order = torch.randperm(9)
    torch.testing.assert_close(ops.attention(q, k[:, order], v[:, order]), out)
    parts = [ops.attention(q, k[:, some], v[:, some], return_lse=True) for some in (slice(4), slice(4, 9))]
    for merged, whole in zip(ops.merge_attentions(*zip(*parts, strict=True)), (out, lse), strict=True):
        torch.testing.assert_close(merged, whole)


@pytest.mark.slow
@pytest.mark.parametrize("return_lse", [False, True])
def test_it_compiles_to_one_graph_with_gradients(return_lse):
    torch._dynamo.reset()
    leaves, mask = inputs(7, 9, dtype=torch.float32), torch.rand(2, 9) < 0.7

    def layer(q, k, v):
        out = ops.attention(q, k, v, key_mask=mask, return_lse=return_lse)
        return out[0].sum() + out[1].sum() if return_lse else out.sin().sum()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, layer):
        out = run(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("masked", [False, True])
def test_it_compiles_with_symbols_for_heads(masked):
    mask = torch.rand(2, 5) < 0.7 if masked else None
    for dynamic in (True, None):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda q, k: ops.attention(q, k, k, key_mask=mask),
            fullgraph=True, dynamic=dynamic, backend="eager",
        )  # fmt: skip
        for heads in (4, 8, 12):
            q, k = torch.randn(2, 5, heads, 8), torch.randn(2, 5, heads // 2, 8)
            torch.testing.assert_close(compiled(q, k), ops.attention(q, k, k, key_mask=mask))


@pytest.mark.parametrize("return_lse", [pytest.param(False, marks=pytest.mark.slow), True])
def test_it_exports_with_any_batch_and_length(return_lse):
    class Module(torch.nn.Module):
        def forward(self, q, k, v, mask):
            return ops.attention(q, k, v, key_mask=mask, return_lse=return_lse)

    leaves = [x.detach() for x in inputs(7, 9, dtype=torch.float32)]
    batch, queries, keys = (torch.export.Dim(name, min=2) for name in ("batch", "queries", "keys"))
    shapes = {0: batch, 1: queries}, *[{0: batch, 1: keys}] * 3
    program = torch.export.export(Module(), (*leaves, torch.rand(2, 9) < 0.7), dynamic_shapes=shapes)
    others = [x.detach() for x in inputs(5, 17, batch=3, dtype=torch.float32)]
    mask = torch.rand(3, 17) < 0.7
    torch.testing.assert_close(program.module()(*others, mask), Module()(*others, mask))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_function_transforms_take_a_path_that_they_see_through():
    q, k, v = (x.detach() for x in inputs())
    run = lambda *x: ops.attention(*(y[None] for y in x), return_lse=True)  # noqa: E731
    each = torch.func.vmap(run)(q, k, v)
    for ours, theirs in zip(each, ops.attention(q, k, v, return_lse=True), strict=True):
        torch.testing.assert_close(ours.squeeze(1), theirs)
    along = lambda q: ops.attention(q, k, v, return_lse=True)[1]  # noqa: E731
    _, tangent = torch.func.jvp(along, (q,), (torch.ones_like(q),))
    torch.testing.assert_close(tangent, (along(q + 1e-6) - along(q - 1e-6)) / 2e-6, rtol=1e-4, atol=1e-6)


WRONG = {
    r"q must be \[B, N, H, D\], found shape \(2, 7, 8\)": {"q": (2, 7, 8)},
    "k must have q's batch and width 2, 8, found": {"k": (2, 7, 2, 9)},
    r"v must have k's batch, tokens and heads \(2, 7, 2\), found": {"v": (2, 8, 2, 8)},
    "q and v must have channels": {"v": (2, 7, 2, 0)},
    "q's 2 heads must be a multiple of k's 3 heads": {"k": (2, 7, 3, 8), "v": (2, 7, 3, 8)},
    r"key_mask must be bool \[B, M\] = \(2, 7\), found torch.float32 \(2, 7\)": {"key_mask": (2, 7)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named_with_their_limit(message):
    shapes = dict.fromkeys("qkv", (2, 7, 2, 8)) | WRONG[message]
    with pytest.raises(ValueError, match=message):
        ops.attention(**{name: torch.randn(shape) for name, shape in shapes.items()})


def test_backends_are_obeyed_or_refused_with_the_reason():
    leaves = inputs()
    assert ops.explain("attention", *leaves).backend == "sdpa"
    told = ops.explain("attention", *leaves, return_lse=True)
    assert told.backend == "cpu" and "sdpa cannot: PyTorch's attention returns no LSE" in told.reason
    with pytest.raises(RuntimeError, match="'sdpa' cannot run attention: .*no LSE; use cpu or reference"):
        ops.attention(*leaves, return_lse=True, backend="sdpa")
    with pytest.raises(ValueError, match="key_mask must be on q's device"):
        ops.attention(*leaves, key_mask=torch.ones(2, 7, dtype=torch.bool, device="meta"))
