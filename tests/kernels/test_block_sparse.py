"""Block-sparse attention: the lists, the definition against brute force, the fast paths against it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from zoo import ops
from zoo.ops import BlockList

BACKENDS = ["reference", "cpu"]


def inputs(n, m=None, *, batch=2, heads=4, kv_heads=None, dim=8, v_dim=None, dtype=torch.float64, grad=False):
    q = torch.randn(batch, n, heads, dim, dtype=dtype)
    k = torch.randn(batch, m or n, kv_heads or heads, dim, dtype=dtype)
    v = torch.randn(batch, m or n, kv_heads or heads, v_dim or dim, dtype=dtype)
    return tuple(x.requires_grad_(grad) for x in (q, k, v))


def random_mask(*shape, keep=0.5, empty=True):
    mask = torch.rand(shape) < keep
    if empty:
        mask[..., 0, :] = False
    return mask


def brute_force(q, k, v, seen, bias=None):
    """One query at a time; seen(b, h, query, key)."""
    out, lse = q.new_zeros(*q.shape[:3], v.shape[-1]), q.new_full(q.shape[:3], -math.inf)
    shared = q.shape[2] // k.shape[2]
    for b, n, h in itertools.product(*map(range, q.shape[:3])):
        keys = [m for m in range(k.shape[1]) if seen(b, h, n, m)]
        if not keys:
            continue
        logits = k[b, keys, h // shared] @ q[b, n, h] * q.shape[-1] ** -0.5
        if bias is not None:
            logits = logits + bias[b, h, n, keys]
        out[b, n, h] = logits.softmax(0) @ v[b, keys, h // shared]
        lse[b, n, h] = logits.logsumexp(0)
    return out, lse


# The lists -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lists", [(), (4,), (2, 1), (2, 4), (1, 1)])
def test_a_mask_becomes_lists_and_back(lists):
    mask = random_mask(*lists, 5, 7)
    blocks = BlockList.from_mask(mask, block_size=(16, 8))
    assert torch.equal(blocks.to_mask(), mask[(None,) * (4 - mask.ndim)])
    assert (blocks.query_blocks, blocks.key_blocks) == (5, 7)
    assert blocks.keep == pytest.approx(mask.double().mean().item())
    full = mask[(None,) * (4 - mask.ndim)]
    for b, h in itertools.product(range(full.shape[0]), range(full.shape[1])):
        for j in range(7):
            begin, end = blocks.inverse_offsets[b, h, j : j + 2].tolist()
            rows = blocks.inverse_indices[b, h, begin:end].tolist()
            assert rows == full[b, h, :, j].nonzero()[:, 0].tolist()


def test_segments_are_listed_whatever_the_default_device():
    expected = BlockList.from_segments([20, 0, 33], [9, 3, 41], block_size=16)
    with torch.device("meta"):
        found = BlockList.from_segments([20, 0, 33], [9, 3, 41], block_size=16, device="cpu")
    assert torch.equal(found.to_mask(), expected.to_mask())
    assert torch.equal(found.query_segments, expected.query_segments)


def test_masks_without_numbers_have_lists_of_the_right_length():
    with FakeTensorMode():
        assert BlockList.from_mask(torch.ones(3, 4, dtype=torch.bool)).indices.shape == (1, 1, 12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockList.from_mask([[True]]), "mask must be a tensor, found list"),
        (lambda: BlockList.from_indices([[0]], key_blocks=1), "indices must be a tensor, found list"),
        (
            lambda: BlockList.from_indices(torch.zeros(1, 1).long() - 1, key_blocks=-1),
            "key_blocks .* from 0, found -1",
        ),
        (
            lambda: BlockList.from_indices(torch.zeros(1).long(), torch.zeros(0).long(), key_blocks=1),
            "offsets .* must agree in the axes before",
        ),
        (lambda: BlockList.from_indices(torch.zeros(1, 1).cfloat(), key_blocks=1), "must be whole numbers"),
    ],
)
def test_what_is_no_list_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_indices_in_either_form_give_the_lists_of_the_mask():
    top = torch.tensor([[2, 0, -1], [-1, -1, -1], [1, -1, 3]])
    from_top = BlockList.from_indices(top, key_blocks=4, block_size=16)
    rows = BlockList.from_indices(
        torch.tensor([2, 0, 1, 3, 9]), torch.tensor([0, 2, 2, 4]), key_blocks=4, block_size=16
    )
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1]]).bool()
    assert torch.equal(from_top.to_mask()[0, 0], mask)
    assert torch.equal(rows.to_mask()[0, 0], mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"indices": [[0, 4]]}, r"indices must be between 0 and key_blocks - 1 = 3, found 4"),
        ({"indices": [[1, 1]]}, "must not list a key block twice"),
        ({"indices": [0, 1], "offsets": [0, 3]}, "offsets must not exceed the 2 entries of indices, found 3"),
        ({"indices": [0, 1], "offsets": [1, 2]}, "offsets must begin with 0 and never fall"),
        ({"indices": [[0.5]]}, "indices must be whole numbers"),
    ],
)
def test_wrong_lists_are_refused(arguments, message):
    arguments = {name: torch.tensor(value) for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        BlockList.from_indices(**arguments, key_blocks=4)


def test_other_wrong_arguments_of_lists_are_refused():
    with pytest.raises(ValueError, match=r"mask must be boolean .* found torch.float32 \(2, 2\)"):
        BlockList.from_mask(torch.ones(2, 2))
    with pytest.raises(ValueError, match="block_size must be a whole number of tokens, at least 1"):
        BlockList.from_mask(torch.ones(2, 2).bool(), block_size=0)
    with pytest.raises(ValueError, match="lengths must hold one length, at least 0"):
        BlockList.from_segments([3, -1])
    for lengths in (5, [2.5, 3.7], [True, False]):
        with pytest.raises(ValueError, match=r"lengths must be \[groups\] whole numbers"):
            BlockList.from_segments(lengths)
    with pytest.raises(ValueError, match="key_blocks must be a whole number, found 2.0"):
        BlockList.from_indices(torch.zeros(2, 1, dtype=torch.long), key_blocks=2.0)


# The definition --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lists", [(), (4,), (2, 1), (2, 4)])
def test_it_is_what_one_query_at_a_time_gives(lists, backend):
    q, k, v = inputs(11, 14, kv_heads=2, dim=3, v_dim=5)
    mask = random_mask(*lists, 3, 5)
    bias = torch.randn(1, 4, 11, 14, dtype=torch.float64)
    full = mask[(None,) * (4 - mask.ndim)].expand(2, 4, -1, -1)
    truth, true_lse = brute_force(
        q, k, v, lambda b, h, n, m: full[b, h, n // 4, m // 3], bias.expand(2, -1, -1, -1)
    )
    blocks = BlockList.from_mask(mask, block_size=(4, 3))
    out, lse = ops.block_sparse_attention(q, k, v, blocks, bias=bias, return_lse=True, backend=backend)
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, true_lse, rtol=1e-12, atol=1e-12)
    assert (out[:, :4] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[3, 0, 5, 1, 7], [16], [1] * 9])
def test_tokens_of_a_segment_attend_to_each_other(lengths, backend):
    key_lengths = [(n * 2) % 5 for n in lengths]
    total, keys = sum(lengths), sum(key_lengths)
    q, k, v = inputs(total, keys, dim=3)
    group = [g for g, n in enumerate(lengths) for _ in range(n)]
    key_group = [g for g, n in enumerate(key_lengths) for _ in range(n)]
    truth, true_lse = brute_force(q, k, v, lambda b, h, n, m: group[n] == key_group[m])
    blocks = BlockList.from_segments(lengths, key_lengths, block_size=4)
    out, lse = ops.block_sparse_attention(q, k, v, blocks, return_lse=True, backend=backend)
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, true_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("segments", [False, True])
def test_gradients_are_those_of_finite_differences(segments, backend):
    q, k, v = inputs(7, 7, batch=2, heads=2, kv_heads=1, dim=2, v_dim=3, grad=True)
    bias = torch.randn(1, 2, 7, 7, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 0]]).bool()
    blocks = BlockList.from_mask(mask, block_size=3)
    if segments:
        blocks = BlockList.from_segments([3, 0, 4], block_size=2)

    def run(q, k, v, bias):
        return ops.block_sparse_attention(q, k, v, blocks, bias=bias, return_lse=True, backend=backend)

    assert torch.autograd.gradcheck(run, (q, k, v, bias))


def test_the_definition_is_differentiable_twice():
    q, k, v = inputs(5, batch=1, heads=1, dim=2, grad=True)
    blocks = BlockList.from_mask(random_mask(3, 3), block_size=2)
    run = lambda q, k, v: ops.block_sparse_attention(q, k, v, blocks, backend="reference")  # noqa: E731
    assert torch.autograd.gradgradcheck(run, (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_sees_nothing_is_zero_with_finite_gradients(backend):
    q, k, v = inputs(8, dtype=torch.float32, grad=True)
    blocks = BlockList.from_mask(torch.tensor([[0, 0], [1, 0]]).bool(), block_size=4)
    bias = torch.zeros(8, 8)
    bias[5] = -math.inf
    out, lse = ops.block_sparse_attention(q, k, v, blocks, bias=bias, return_lse=True, backend=backend)
    for rows in (slice(0, 4), slice(5, 6)):
        assert (out[:, rows] == 0).all() and (lse[:, rows] == -math.inf).all()
    for x in torch.autograd.grad(out.sum() + lse[:, 6:].sum(), (q, k, v)):
        assert x.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_blocks_is_dense_attention(backend):
    q, k, v = inputs(13)
    out = ops.block_sparse_attention(
        q, k, v, BlockList.from_mask(torch.ones(4, 4).bool(), block_size=4), backend=backend
    )
    dense = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(out, dense.transpose(1, 2))


# The fast path against the definition ----------------------------------------------------------------------


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.tuples(st.integers(1, 17), st.integers(1, 17)),
    st.sampled_from([(), (4,), (2, 1), (2, 4)]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([None, (1, 1), (2, 1), (1, 4), (2, 4)]),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_any_lists_give_the_same_on_the_cpu_path(n, m, size, lists, kv_heads, biased, keep, seed):
    torch.manual_seed(seed)
    leaves = list(inputs(n, m, kv_heads=kv_heads, dim=4, v_dim=3, grad=True))
    bias = None
    if biased is not None:
        bias = torch.randn(*biased, n, m, dtype=torch.float64, requires_grad=True)
        leaves.append(bias)
    mask = random_mask(*lists, -(-n // size[0]), -(-m // size[1]), keep=keep, empty=False)
    blocks = BlockList.from_mask(mask, block_size=size)
    results = []
    for backend in BACKENDS:
        out, lse = ops.block_sparse_attention(
            *leaves[:3], blocks, bias=bias, return_lse=True, backend=backend
        )
        loss = out.square().sum() + lse.masked_fill(lse.isinf(), 0.0).sin().sum()
        results.append((out, lse, *torch.autograd.grad(loss, leaves)))
    for fast, truth in zip(*results, strict=True):
        torch.testing.assert_close(fast, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_cpu_path_is_as_close_to_truth_as_the_definition(dtype):
    low = [x.to(dtype) for x in inputs(97, dim=33)]
    blocks = BlockList.from_mask(random_mask(7, 7), block_size=16)
    grad = torch.randn(2, 97, 4, 33, dtype=dtype)

    def run(tensors, backend):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = ops.block_sparse_attention(*leaves, blocks, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    truth = run([x.double() for x in low], "reference")
    errors = {
        backend: [(a.double() - b).abs().max() for a, b in zip(run(low, backend), truth, strict=True)]
        for backend in BACKENDS
    }
    for position, (fast, budget) in enumerate(zip(errors["cpu"], errors["reference"], strict=True)):
        assert fast <= 2 * budget + (1e-5 if position == 0 else 2e-4), position


class _Largest(TorchDispatchMode):
    """Remembers the most entries a tensor had."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.entries = max(self.entries, x.numel())
        return out


def test_memory_is_linear_in_tokens():
    entries = {}
    for n in (2048, 4096):
        q, k, v = inputs(n, batch=1, heads=2, dim=32, dtype=torch.float32, grad=True)
        blocks = BlockList.from_mask(random_mask(n // 64, n // 64, keep=0.1), block_size=64)
        with _Largest() as largest:
            ops.block_sparse_attention(q, k, v, blocks, backend="cpu").sum().backward()
        entries[n] = largest.entries
    assert entries[4096] < 2.2 * entries[2048] < n**2


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_expanded_and_empty_inputs(backend):
    q, k, v = torch.randn(2, 13, 3, 2, 8).unbind(2)
    blocks = BlockList.from_mask(random_mask(4, 4), block_size=4)
    out = ops.block_sparse_attention(q, k, v, blocks, backend=backend)
    whole = ops.block_sparse_attention(*(x.contiguous() for x in (q, k, v)), blocks, backend=backend)
    torch.testing.assert_close(out, whole)
    one = q[:1].expand(2, -1, -1, -1)
    same = ops.block_sparse_attention(one, one, one, blocks, backend=backend)
    torch.testing.assert_close(same[0], same[1])
    assert ops.block_sparse_attention(q[:0], k[:0], v[:0], blocks, backend=backend).shape == (0, 13, 2, 8)
    no_keys = BlockList.from_mask(torch.ones(4, 0).bool(), block_size=4)
    assert (ops.block_sparse_attention(q, k[:, :0], v[:, :0], no_keys, backend=backend) == 0).all()


# Tracing ---------------------------------------------------------------------------------------------------


class _Layer(nn.Module):
    def forward(self, q, k, v, blocks):
        return ops.block_sparse_attention(q * 1.0, k, v, blocks).sin()


@pytest.mark.parametrize("dynamic", [None, True])
def test_it_compiles_to_one_graph_and_trains_there(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(_Layer(), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (64, 96):
        leaves = inputs(n, dtype=torch.float32, grad=True)
        blocks = BlockList.from_mask(random_mask(n // 16, n // 16), block_size=16)
        out, truth = compiled(*leaves, blocks), _Layer()(*leaves, blocks)
        torch.testing.assert_close(out, truth)
        for a, b in zip(
            torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(truth.sum(), leaves), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_lists_can_be_made_inside_a_compiled_graph():
    torch._dynamo.reset()

    def routed(q, k, v, top):
        blocks = BlockList.from_indices(top, key_blocks=4, block_size=16, check=False)
        return ops.block_sparse_attention(q, k, v, blocks)

    q, k, v = inputs(64, dtype=torch.float32)
    top = torch.rand(2, 1, 4, 4).topk(2).indices
    compiled = torch.compile(routed, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v, top), routed(q, k, v, top))


def test_it_exports_with_any_batch(tmp_path):
    q, k, v = inputs(64, dtype=torch.float32)
    blocks = BlockList.from_mask(random_mask(4, 4), block_size=16)
    batch = torch.export.Dim("batch")

    class Fixed(nn.Module):
        def forward(self, q, k, v):
            return ops.block_sparse_attention(q, k, v, blocks)

    program = torch.export.export(Fixed(), (q, k, v), dynamic_shapes=({0: batch},) * 3)
    torch.export.save(program, tmp_path / "layer.pt2")
    again = torch.export.load(tmp_path / "layer.pt2").module()
    torch.testing.assert_close(again(q[:1], k[:1], v[:1]), Fixed()(q[:1], k[:1], v[:1]))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_operator_passes_the_checks_of_torch_library():
    from zoo.kernels.block_sparse import schema

    q, k, v = inputs(12, dtype=torch.float32, grad=True)
    blocks = BlockList.from_mask(random_mask(3, 3), block_size=4)
    lists = (blocks.offsets, blocks.indices, blocks.inverse_offsets, blocks.inverse_indices)
    torch.library.opcheck(schema.forward, (q, k, v, None, *lists, None, None, 4, 4, 0.5, "cpu"))


def test_it_runs_on_tensors_without_values_and_under_function_transforms():
    q, k, v = inputs(16, dtype=torch.float32)
    blocks = BlockList.from_mask(random_mask(4, 4), block_size=4)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        assert ops.block_sparse_attention(*fakes, blocks).shape == q.shape
    run = lambda q, k, v: ops.block_sparse_attention(q, k, v, blocks).square().sum()  # noqa: E731
    by_transform = torch.func.grad(run)(q, k, v)
    (by_backward,) = torch.autograd.grad(run(q.requires_grad_(), k, v), q)
    torch.testing.assert_close(by_transform, by_backward)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_forward_mode_differentiation_takes_the_definition():
    """A custom operator would answer with a tangent of zero."""
    q, k, v = inputs(8)
    blocks = BlockList.from_mask(random_mask(2, 2), block_size=4)
    run = lambda q: ops.block_sparse_attention(q, k, v, blocks)  # noqa: E731
    step = torch.randn_like(q)
    with torch.autograd.forward_ad.dual_level():
        dual = run(torch.autograd.forward_ad.make_dual(q, step))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    difference = (run(q + 1e-6 * step) - run(q - 1e-6 * step)) / 2e-6
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-8)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        ops.block_sparse_attention(q, k, v, blocks, backend="cpu")


def test_backward_may_be_called_under_autocast():
    q, k, v = inputs(16, dtype=torch.float32, grad=True)
    blocks = BlockList.from_mask(random_mask(4, 4), block_size=4)
    grads = []
    for inside in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = ops.block_sparse_attention(q, k, v, blocks).float().square().sum()
            if inside:
                grads.append(torch.autograd.grad(loss, (q, k, v)))
        if not inside:
            grads.append(torch.autograd.grad(loss, (q, k, v)))
    for outside, inside in zip(*grads, strict=True):
        torch.testing.assert_close(inside, outside, rtol=0.05, atol=0.05)


def test_autocast_computes_in_its_dtype():
    q, k, v = inputs(16, dtype=torch.float32)
    blocks = BlockList.from_mask(random_mask(4, 4), block_size=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.block_sparse_attention(q, k, v, blocks)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), ops.block_sparse_attention(q, k, v, blocks), rtol=3e-2, atol=3e-2)


# The contract ----------------------------------------------------------------------------------------------

X = torch.randn(2, 8, 4, 8)
BLOCKS = BlockList.from_mask(torch.ones(2, 2).bool(), block_size=4)
WRONG = {
    r"q must be \[B, N, H, D\], found shape \(8, 4, 8\)": {"q": X[0]},
    r"k must have q's batch and width 2, 8, found \(2, 8, 4, 6\)": {"k": X[..., :6]},
    "v must have k's batch, tokens and heads": {"v": X[:, :7]},
    "q's 4 heads must be a multiple of k's 3 heads": {"k": X[:, :, :3], "v": X[:, :, :3]},
    "blocks must be a BlockList, found Tensor": {"blocks": torch.ones(2, 2)},
    "blocks must cut 12 queries into 3 blocks of 4, found 2 blocks": {"q": torch.randn(2, 12, 4, 8)},
    r"blocks must hold \[B or 1, Hq or 1\] = \[2 or 1, 4 or 1\] lists, found \(1, 3\)": {
        "blocks": BlockList.from_mask(torch.ones(3, 2, 2).bool(), block_size=4)
    },
    r"bias must be \[B or 1, Hq or 1, N, M\]": {"bias": torch.randn(3, 8, 8)},
    "k must have q's dtype torch.float32, found torch.float64": {"k": X.double()},
    "scale must be a number, found a tensor": {"scale": torch.ones(())},
    "blocks must be on q's device cpu, found meta": {"blocks": BLOCKS.to("meta")},
    "no backend 'cpuu'.*did you mean cpu": {"backend": "cpuu"},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_named_with_what_was_found_and_what_is_allowed(message):
    arguments = {"q": X, "k": X, "v": X, "blocks": BLOCKS, **WRONG[message]}
    with pytest.raises(ValueError, match=message):
        ops.block_sparse_attention(**arguments)


def test_explain_says_which_backend_and_how():
    told = ops.explain("block_sparse_attention", X, X, X, BLOCKS)
    assert (told.backend, told.configuration) == ("cpu", "blocks of 4 queries and 4 keys")
