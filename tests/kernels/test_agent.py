"""Agent attention: the definition against brute force, the fast path against the definition."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo import ops
from zoo.kernels import dispatch

BACKENDS = ["reference", "sdpa"]


def inputs(n=10, m=None, a=4, *, batch=2, heads=4, kv_heads=None, dim=8, v_dim=None, dtype=torch.float64):
    q = torch.randn(batch, n, heads, dim, dtype=dtype)
    k = torch.randn(batch, m or n, kv_heads or heads, dim, dtype=dtype)
    v = torch.randn(batch, m or n, kv_heads or heads, v_dim or dim, dtype=dtype)
    return q, k, v, torch.randn(batch, a, heads, dim, dtype=dtype)


def biases(q, k, agents, *, batch=False):
    heads, count = agents.shape[2], agents.shape[1]
    lead = (len(q), heads) if batch else (heads,)
    return (
        torch.randn(*lead, count, k.shape[1], dtype=q.dtype),
        torch.randn(*lead, q.shape[1], count, dtype=q.dtype),
    )


def brute_force(q, k, v, agents, bias_in=None, bias_out=None, scale=None):
    """One image, head, agent and query at a time."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shared = q.shape[2] // k.shape[2]
    full = (*q.shape[:1], q.shape[2])
    bias_in = torch.zeros(()) if bias_in is None else bias_in
    bias_out = torch.zeros(()) if bias_out is None else bias_out
    bias_in = bias_in.expand(*full, agents.shape[1], k.shape[1])
    bias_out = bias_out.expand(*full, q.shape[1], agents.shape[1])
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    for b in range(full[0]):
        for h in range(full[1]):
            own_k, own_v = k[b, :, h // shared], v[b, :, h // shared]
            gathered = torch.stack([
                (scale * own_k @ agents[b, a, h] + bias_in[b, h, a]).softmax(0) @ own_v
                for a in range(agents.shape[1])
            ])  # fmt: skip
            for n in range(q.shape[1]):
                logits = scale * agents[b, :, h] @ q[b, n, h] + bias_out[b, h, n]
                out[b, n, h] = logits.softmax(0) @ gathered
    return out


@given(
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    a=st.integers(1, 6),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    dims=st.sampled_from([(1, 1), (4, 4), (8, 3), (20, 20)]),
    bias=st.sampled_from([None, "shared", "image"]),
    scale=st.sampled_from([None, 0.3]),
)
@settings(max_examples=25, deadline=None)
def test_every_backend_is_the_definition(n, m, a, heads, dims, bias, scale):
    torch.manual_seed(0)
    q, k, v, agents = inputs(n, m, a, heads=heads[0], kv_heads=heads[1], dim=dims[0], v_dim=dims[1])
    b_in, b_out = (None, None) if bias is None else biases(q, k, agents, batch=bias == "image")
    truth = brute_force(q, k, v, agents, b_in, b_out, scale)
    for backend in BACKENDS:
        out = ops.agent_attention(q, k, v, agents, bias_in=b_in, bias_out=b_out, scale=scale, backend=backend)
        torch.testing.assert_close(out, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_every_input_are_right(backend):
    q, k, v, agents = inputs(5, 6, 3, heads=2, dim=3)
    tensors = [x.requires_grad_() for x in (q, k, v, agents, *biases(q, k, agents))]

    def run(q, k, v, agents, bias_in, bias_out):
        return ops.agent_attention(q, k, v, agents, bias_in=bias_in, bias_out=bias_out, backend=backend)

    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


def test_biases_that_are_parameters_take_the_fused_path_where_no_gradient_is_taken():
    q, k, _, agents = given = inputs()
    bias_in, bias_out = (bias.requires_grad_() for bias in biases(q, k, agents))
    options = {"bias_in": bias_in, "bias_out": bias_out}
    expected = ops.agent_attention(*given, **options, backend="reference")
    name = "torch.nn.functional.scaled_dot_product_attention"
    with torch.no_grad(), mock.patch(name, wraps=F.scaled_dot_product_attention) as fused:
        torch.testing.assert_close(ops.agent_attention(*given, **options), expected.detach())
    assert len(fused.mock_calls) == 2
    assert not any(call.kwargs["attn_mask"].requires_grad for call in fused.mock_calls)


@pytest.mark.parametrize("learned", [(), ("in",), ("out",), ("in", "out")])
def test_both_backends_have_the_same_gradients(learned):
    q, k, v, agents = inputs(17, 13, 4, kv_heads=2, v_dim=5)
    b_in, b_out = biases(q, k, agents)
    tensors = [q, k, v, agents, *(b for b, name in ((b_in, "in"), (b_out, "out")) if name in learned)]
    grads = []
    for backend in BACKENDS:
        for x in tensors:
            x.requires_grad_()
        out = ops.agent_attention(q, k, v, agents, bias_in=b_in, bias_out=b_out, backend=backend)
        grads.append(torch.autograd.grad(out.sin().sum(), tensors))
    for fast, truth in zip(*grads, strict=True):
        torch.testing.assert_close(fast, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("learned", [False, True])
def test_hidden_tokens_have_no_say_and_rows_that_see_nothing_are_zero(backend, learned):
    q, k, v, agents = (x.requires_grad_() for x in inputs(6, 9, 3))
    hidden = torch.zeros(2, 1, 1, 9, dtype=q.dtype).index_fill_(3, torch.tensor([1, 8]), -math.inf)
    bias = hidden.expand(2, 1, 3, 9).clone().requires_grad_(learned)
    out = ops.agent_attention(q, k, v, agents, bias_in=bias, backend=backend)
    kept = [0, 2, 3, 4, 5, 6, 7]
    without = ops.agent_attention(q, k[:, kept], v[:, kept], agents, backend="reference")
    torch.testing.assert_close(out, without)

    with torch.no_grad():
        bias[1] = -math.inf  # nothing to gather in the second image
    blind = torch.zeros(6, 3, dtype=q.dtype)
    blind[2] = -math.inf  # a query that sees no agent
    out = ops.agent_attention(
        q, k, v, agents, bias_in=bias, bias_out=blind.requires_grad_(learned), backend=backend
    )
    assert (out[1] == 0).all() and (out[:, 2] == 0).all() and (out[0, 0] != 0).all()
    for grad in torch.autograd.grad(out.sum(), (q, k, v, agents)):
        assert grad.isfinite().all()


def test_queries_that_are_the_agents_attend_through_themselves():
    """With tokens as agents and logits so strong that a token sees itself only, values come back."""
    q = 40 * torch.eye(6, dtype=torch.float64)[None, :, None]
    v = torch.randn(1, 6, 1, 5, dtype=torch.float64)
    torch.testing.assert_close(ops.agent_attention(q, q, v, q, scale=1.0), v)


def test_order_of_tokens_and_of_agents_does_not_matter():
    q, k, v, agents = inputs(7, 9, 4)
    out = ops.agent_attention(q, k, v, agents)
    tokens, few = torch.randperm(9), torch.randperm(4)
    torch.testing.assert_close(ops.agent_attention(q, k[:, tokens], v[:, tokens], agents[:, few]), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_errs_at_most_twice_as_much_as_the_definition(dtype):
    q, k, v, agents = inputs(196, 196, 49, dim=32, dtype=dtype)
    b_in, b_out = (b.to(dtype) for b in biases(q, k, agents))
    exact = [x.double() for x in (q, k, v, agents, b_in, b_out)]
    truth = ops.agent_attention(*exact[:4], bias_in=exact[4], bias_out=exact[5])
    errors = {}
    for backend in BACKENDS:
        out = ops.agent_attention(q, k, v, agents, bias_in=b_in, bias_out=b_out, backend=backend)
        assert out.dtype == dtype
        errors[backend] = (out.double() - truth).abs().max().item()
    assert errors["sdpa"] <= 2 * errors["reference"] + 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_empty_batches(backend):
    qkv = torch.randn(2, 10, 3, 4, 8)
    q, k, v = qkv.unbind(2)  # views of one projection
    agents = torch.randn(2, 4, 3, 8).transpose(1, 2)
    bias = torch.randn(4, 10, 3).transpose(1, 2)
    out = ops.agent_attention(q, k, v, agents, bias_in=bias, backend=backend)
    same = ops.agent_attention(
        *(x.contiguous() for x in (q, k, v, agents)), bias_in=bias.contiguous(), backend=backend
    )
    torch.testing.assert_close(out, same)
    shared = agents[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(
        ops.agent_attention(q, k, v, shared, backend=backend),
        ops.agent_attention(q, k, v, shared.contiguous(), backend=backend),
    )
    empty = ops.agent_attention(q[:0], k[:0], v[:0], agents[:0], bias_in=bias, backend=backend)
    assert empty.shape == (0, 10, 4, 8)


@pytest.mark.parametrize("learned", [False, True])
def test_it_compiles_to_one_graph(learned):
    q, k, v, agents = inputs(10, dtype=torch.float32)
    b_in, b_out = (b.requires_grad_(learned) for b in biases(q, k, agents))

    def run(q, k, v, agents):
        return ops.agent_attention(q, k, v, agents, bias_in=b_in, bias_out=b_out)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v, agents), run(q, k, v, agents))


def test_it_exports_with_any_batch_and_length():
    class Module(torch.nn.Module):
        def forward(self, q, k, v, agents, bias_in):
            return ops.agent_attention(q, k, v, agents, bias_in=bias_in)

    q, k, v, agents = inputs(10, 9, dtype=torch.float32)
    tensors = (q, k, v, agents, biases(q, k, agents)[0])
    batch, queries, keys = (torch.export.Dim(name) for name in ("batch", "queries", "keys"))
    shapes = ({0: batch, 1: queries}, *[{0: batch, 1: keys}] * 2, {0: batch}, {2: keys})
    program = torch.export.export(Module(), tensors, dynamic_shapes=shapes)
    fewer = (q[:1, :7], k[:1, :6], v[:1, :6], agents[:1], tensors[4][:, :, :6])
    torch.testing.assert_close(program.module()(*fewer), Module()(*fewer))


def test_autocast_decides_the_dtype():
    q, k, v, agents = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.agent_attention(q, k.bfloat16(), v, agents)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), ops.agent_attention(q, k, v, agents), rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_function_transforms_work():
    q, k, v, agents = inputs(5)
    each = torch.func.vmap(lambda *x: ops.agent_attention(*(y[None] for y in x))[0])(q, k, v, agents)
    torch.testing.assert_close(each, ops.agent_attention(q, k, v, agents))

    def run(q):
        return ops.agent_attention(q, k, v, agents)

    _, tangent = torch.func.jvp(run, (q,), (torch.ones_like(q),))
    step = 1e-6
    torch.testing.assert_close(tangent, (run(q + step) - run(q - step)) / (2 * step), rtol=1e-4, atol=1e-6)


WRONG = {
    r"q must be \[B, N, H, D\].*found shape \(2, 10, 32\)": {"q": (2, 10, 32)},
    "flatten a map": {"q": (2, 5, 2, 4, 8)},
    "k must be .*batch 2 and width 8": {"k": (2, 10, 4, 7)},
    "at least one token": {"k": (2, 0, 4, 8), "v": (2, 0, 4, 8)},
    r"v must have k's batch, tokens and heads \(2, 10, 4\), found \(2, 9, 4, 8\)": {"v": (2, 9, 4, 8)},
    "q's 4 heads must be a multiple of k's 3 heads": {"k": (2, 10, 3, 8), "v": (2, 10, 3, 8)},
    "agents must be .* 4 heads and width 8 .*found shape": {"agents": (2, 5, 3, 8)},
    "at least one agent": {"agents": (2, 0, 4, 8)},
    r"bias_in must broadcast to \[B, H, A, M\] = \(2, 4, 5, 10\), found \(4, 5, 9\)": {"bias_in": (4, 5, 9)},
    r"bias_out must broadcast to \[B, H, N, A\] = \(2, 4, 10, 5\), found \(4,\)": {"bias_out": (4,)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named_with_their_limit(message):
    shapes = {"q": (2, 10, 4, 8), "k": (2, 10, 4, 8), "v": (2, 10, 4, 8), "agents": (2, 5, 4, 8)}
    with pytest.raises(ValueError, match=message):
        ops.agent_attention(**{name: torch.randn(shape) for name, shape in (shapes | WRONG[message]).items()})


def test_wrong_kinds_are_refused_and_backends_obeyed():
    q, k, v, agents = inputs()
    with pytest.raises(ValueError, match="k must have q's dtype"):
        ops.agent_attention(q, k.float(), v, agents)
    with pytest.raises(ValueError, match="bias_in must be float64, float32"):
        ops.agent_attention(q, k, v, agents, bias_in=torch.zeros(4, 10, dtype=torch.int64))
    with pytest.raises(ValueError, match="has no backend 'natten'"):
        ops.agent_attention(q, k, v, agents, backend="natten")
    assert ops.explain("agent_attention", q, k, v, agents).backend == "sdpa"
    assert [b.name for b in dispatch.OPERATIONS["agent_attention"]][-1] == "reference"
