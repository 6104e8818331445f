"""Neighborhood attention: the definition against brute force and stored outputs, the fast paths against
it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from goldens import cases, golden
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from zoo import ops
from zoo.kernels.neighborhood import cpu

BACKENDS = ["reference", "cpu"]


@contextmanager
def cut_into(size: int) -> Iterator[None]:
    """Cut even the smallest map into tiles, so that small tests see what large maps run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_tile_sizes", lambda axes: [min(size, a.length // a.dilation) for a in axes])
        patch.setattr(cpu, "_bands_are_less", lambda axes, pairs: False)
        cpu._plan.cache_clear()
        try:
            yield
        finally:
            cpu._plan.cache_clear()


@contextmanager
def bands_of(rows: int) -> Iterator[None]:
    """Take so many rows together wherever that is possible, on the smallest map too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "BAND", rows)
        patch.setattr(cpu, "_bands_are_less", lambda axes, pairs: axes[0].dilation == 1)
        cpu._bands.cache_clear()
        try:
            yield
        finally:
            cpu._bands.cache_clear()


@pytest.fixture
def tiles():
    with cut_into(3):
        yield


def inputs(grid, *, batch=2, heads=2, kv_heads=None, dim=8, v_dim=None, dtype=torch.float64, grad=False):
    shape = (batch, *grid)
    q = torch.randn(*shape, heads, dim, dtype=dtype)
    k = torch.randn(*shape, kv_heads or heads, dim, dtype=dtype)
    v = torch.randn(*shape, kv_heads or heads, v_dim or dim, dtype=dtype)
    return tuple(x.requires_grad_(grad) for x in (q, k, v))


def sees(query: int, key: int, length: int, kernel: int, dilation: int, stride: int, causal: bool) -> bool:
    """The rule of one axis, one pair at a time."""
    if query % dilation != key % dilation:
        return False
    position, other = query // dilation, key // dilation
    members = len(range(query % dilation, length, dilation))
    if causal:
        leader = min(position // stride * stride + stride - 1, members - 1)
        return max(leader - kernel + 1, 0) <= other <= position
    leader = min(position // stride * stride + stride // 2, members - 1)
    start = min(max(leader - kernel // 2, 0), members - kernel)
    return start <= other < start + kernel


def brute_force(q, k, v, kernel_size, *, dilation, stride, is_causal, rpb=None, extra_k=None, extra_v=None):
    """One query at a time, in float64."""
    grid = q.shape[1:-2]
    out, lse = q.new_zeros(*q.shape[:-1], v.shape[-1]), q.new_zeros(q.shape[:-1])
    per_kv = q.shape[-2] // k.shape[-2]
    for query in itertools.product(*map(range, grid)):
        keys = [
            key
            for key in itertools.product(*map(range, grid))
            if all(map(sees, query, key, grid, kernel_size, dilation, stride, is_causal))
        ]
        for b, h in itertools.product(range(q.shape[0]), range(q.shape[-2])):
            ks = [k[(b, *key, h // per_kv)] for key in keys]
            vs = [v[(b, *key, h // per_kv)] for key in keys]
            bias = [0.0] * len(keys)
            if rpb is not None:
                places = [
                    tuple(
                        (a - c) // d + n - 1
                        for a, c, d, n in zip(key, query, dilation, kernel_size, strict=True)
                    )
                    for key in keys
                ]
                bias = [rpb[(h, *place)] for place in places]
            if extra_k is not None:
                ks += list(extra_k[b, :, h // per_kv])
                vs += list(extra_v[b, :, h // per_kv])
                bias += [0.0] * extra_k.shape[1]
            logits = torch.stack(ks) @ q[(b, *query, h)] * q.shape[-1] ** -0.5 + torch.tensor(
                bias, dtype=q.dtype
            )
            out[(b, *query, h)] = logits.softmax(0) @ torch.stack(vs)
            lse[(b, *query, h)] = logits.logsumexp(0)
    return out, lse


# Stored outputs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*BACKENDS, "tiles"])
@pytest.mark.parametrize("case", cases("neighborhood_attention"))
def test_stored_outputs_and_gradients(case, backend, request):
    if backend == "tiles":
        request.getfixturevalue("tiles")
    facts, stored = golden().load_case(case)
    settings_ = facts["constructor"]
    given_ = {
        name: golden().seeded_normal(name, shape, facts["seed"]) for name, shape in facts["inputs"].items()
    }
    grad = given_.pop("grad")
    leaves = {name: x.requires_grad_() for name, x in given_.items()}
    out, lse = ops.neighborhood_attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        settings_["kernel_size"],
        dilation=settings_["dilation"],
        stride=settings_["stride"],
        is_causal=settings_["is_causal"],
        scale=settings_["scale"],
        rpb=leaves.get("rpb"),
        extra_k=leaves.get("k_extra"),
        extra_v=leaves.get("v_extra"),
        return_lse=True,
        backend="cpu" if backend == "tiles" else backend,
    )
    (out * grad).sum().backward()
    error = golden().relative_error
    tolerance = facts["tolerance"]
    assert error(out, stored["out"]) <= tolerance["outputs"]
    assert error(lse, stored["lse"]) <= tolerance["outputs"]
    for name, leaf in leaves.items():
        assert error(leaf.grad, stored[f"d{name}"]) <= tolerance["gradients"], name


# The definition --------------------------------------------------------------------------------------------

DEFINITIONS = {
    "1-D, even kernel, dilation that does not divide": ((11,), (4,), (2,), (1,), (False,), {}),
    "1-D causal with stride": ((12,), (5,), (1,), (3,), (True,), {}),
    "2-D, everything different per axis": ((5, 6), (3, 2), (1, 2), (2, 1), (False, True), {}),
    "2-D with bias and grouped heads": ((5, 7), (3, 3), (1, 2), (1, 1), (False, False), {"rpb": True}),
    "2-D with bias, stride and causality": ((6, 7), (3, 4), (1, 1), (2, 4), (True, False), {"rpb": True}),
    "2-D with extra keys": ((4, 5), (2, 4), (2, 1), (1, 4), (False, False), {"extra": 3}),
    "3-D": ((3, 4, 2), (2, 3, 2), (1, 1, 1), (1, 2, 1), (True, False, False), {}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_it_is_what_one_query_at_a_time_gives(name, backend, tiles):
    grid, kernel, dilation, stride, causal, more = DEFINITIONS[name]
    q, k, v = inputs(grid, batch=1, heads=4, kv_heads=2, dim=3, v_dim=5)
    options = {"dilation": dilation, "stride": stride, "is_causal": causal}
    if "rpb" in more:
        options["rpb"] = torch.randn(4, *(2 * n - 1 for n in kernel), dtype=torch.float64)
    if "extra" in more:
        options["extra_k"] = torch.randn(1, more["extra"], 2, 3, dtype=torch.float64)
        options["extra_v"] = torch.randn(1, more["extra"], 2, 5, dtype=torch.float64)
    out, lse = ops.neighborhood_attention(q, k, v, kernel, return_lse=True, backend=backend, **options)
    truth, true_lse = brute_force(q, k, v, kernel, **options)
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, true_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("grid", "kernel"), [((7,), (3,)), ((4, 5), (3, 2)), ((2, 3, 3), (2, 2, 3))], ids=["1d", "2d", "3d"]
)
def test_gradients_are_those_of_finite_differences(grid, kernel, backend, tiles):
    q, k, v = inputs(grid, batch=1, dim=2, grad=True)
    rpb = torch.randn(2, *(2 * n - 1 for n in kernel), dtype=torch.float64, requires_grad=True)
    extra = torch.randn(2, 1, 2, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(q, k, v, rpb, extra):
        return ops.neighborhood_attention(
            q, k, v, kernel, rpb=rpb, extra_k=extra[0], extra_v=extra[1], return_lse=True, backend=backend
        )

    assert torch.autograd.gradcheck(run, (q, k, v, rpb, extra))


def test_the_definition_is_differentiable_twice():
    q, k, v = inputs((5,), batch=1, heads=1, dim=2, grad=True)
    run = lambda q, k, v: ops.neighborhood_attention(q, k, v, 3, backend="reference")  # noqa: E731
    assert torch.autograd.gradgradcheck(run, (q, k, v))


# The fast paths against the definition ---------------------------------------------------------------------


@st.composite
def windows(draw):
    rank = draw(st.integers(1, 3))
    longest = {1: 80, 2: 24, 3: 9}[rank]
    axes = []
    for _ in range(rank):
        kernel, dilation = draw(st.integers(2, 7)), draw(st.integers(1, 3))
        assume(kernel * dilation <= longest)
        length = draw(st.integers(kernel * dilation, longest))
        axes.append((length, kernel, dilation, draw(st.integers(1, kernel)), draw(st.booleans())))
    return tuple(zip(*axes, strict=True))


def test_windows_that_tile_the_map_take_extra_keys_as_well():
    """The keys of all tiles are then the tokens in order, but for the extra ones."""
    q, k, v = inputs((12,))
    more = [torch.randn(2, 3, 2, 8, dtype=torch.float64) for _ in range(2)]
    with cut_into(2):
        outs = [
            ops.neighborhood_attention(
                q, k, v, 2, stride=2, extra_k=more[0], extra_v=more[1], backend=backend
            )
            for backend in BACKENDS
        ]
    torch.testing.assert_close(*outs)


@given(
    windows(),
    st.sampled_from([None, 1, 2, 3, 5]),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.integers(0, 2),
    st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_any_size_and_window_gives_the_same_on_the_cpu_path(axes, tile, kv_heads, biased, extra, seed):
    torch.manual_seed(seed)
    grid, kernel, dilation, stride, causal = axes
    q, k, v = inputs(grid, batch=1, kv_heads=kv_heads, dim=4, grad=True)
    rpb = (
        torch.randn(2, *(2 * n - 1 for n in kernel), dtype=torch.float64, requires_grad=True)
        if biased
        else None
    )
    more = [torch.randn(1, extra, kv_heads, 4, dtype=torch.float64) if extra else None for _ in range(2)]
    leaves = [q, k, v] + ([rpb] if biased else [])
    results = []

    def attend(backend):
        return ops.neighborhood_attention(
            q, k, v, kernel, dilation=dilation, stride=stride, is_causal=causal, rpb=rpb,
            extra_k=more[0], extra_v=more[1], backend=backend,
        )  # fmt: skip

    with nullcontext() if tile is None else cut_into(tile):
        for backend in BACKENDS:
            out = attend(backend)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for fast, truth in zip(*results, strict=True):
        torch.testing.assert_close(fast, truth, rtol=1e-9, atol=1e-11)
    with bands_of(tile or 2), torch.no_grad():
        torch.testing.assert_close(attend("cpu"), results[0][0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", [(9,), (4, 7), (2, 5, 3)])
def test_a_window_as_large_as_the_grid_is_dense_attention(grid, backend, tiles):
    q, k, v = inputs(grid)
    out = ops.neighborhood_attention(q, k, v, grid, backend=backend)
    flat = [x.flatten(1, -3).transpose(1, 2) for x in (q, k, v)]
    dense = nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2).unflatten(1, grid)
    torch.testing.assert_close(out, dense)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stride_as_large_as_the_window_is_window_attention(backend, tiles):
    q, k, v = inputs((6, 12))
    out = ops.neighborhood_attention(q, k, v, (3, 4), stride=(3, 4), backend=backend)
    parts = [
        x.unflatten(1, (2, 3))
        .unflatten(3, (3, 4))
        .transpose(2, 3)
        .flatten(1, 2)
        .flatten(2, 3)
        .transpose(2, 3)
        for x in (q, k, v)
    ]  # [B, windows, H, 12, D]
    window = nn.functional.scaled_dot_product_attention(*parts).transpose(2, 3)
    window = window.unflatten(1, (2, 3)).unflatten(3, (3, 4)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    torch.testing.assert_close(out, window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("grid", [(12, 13), (20, 18)])
def test_the_cpu_path_is_as_close_to_truth_as_the_definition(grid, biased, dtype):
    q, k, v = inputs(grid, dim=33)
    rpb = torch.randn(2, 9, 9, dtype=torch.float64) if biased else None
    low = [None if x is None else x.to(dtype) for x in (q, k, v, rpb)]
    exact = [None if x is None else x.double() for x in low]
    leaves = [x.requires_grad_() for x in low if x is not None]
    truth_leaves = [x.requires_grad_() for x in exact if x is not None]

    def run(q, k, v, rpb, wanted, backend):
        out = ops.neighborhood_attention(q, k, v, 5, rpb=rpb, backend=backend)
        return out, *torch.autograd.grad(out.double().square().sum(), wanted)

    truth = run(*exact, truth_leaves, "reference")
    errors = {
        backend: [
            (x.double() - y).norm() / y.norm() for x, y in zip(run(*low, leaves, backend), truth, strict=True)
        ]
        for backend in BACKENDS
    }
    for position, (fast, budget) in enumerate(zip(errors["cpu"], errors["reference"], strict=True)):
        assert fast <= 2 * budget + (1e-5 if position == 0 else 2e-4), position


def test_heads_without_a_bias_gradient_and_with_one_agree(tiles):
    """Two ways to compute, one for inference and one for training."""
    q, k, v = inputs((14, 15), dtype=torch.float32)
    rpb = torch.randn(2, 13, 13)
    frozen = ops.neighborhood_attention(q, k, v, 7, rpb=rpb)
    trained = ops.neighborhood_attention(q, k, v, 7, rpb=rpb.requires_grad_())
    torch.testing.assert_close(frozen, trained.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wants", ["nothing", "q", "rpb", "lse"])
def test_rows_are_taken_together_where_nothing_is_learnt(wants):
    """Backward, and for the LSE, tiles are less."""
    q, k, v = inputs((28, 28), heads=4, dtype=torch.float32)
    rpb = torch.randn(4, 13, 13, requires_grad=wants == "rpb")
    q.requires_grad_(wants == "q")
    told = ops.explain("neighborhood_attention", q, k, v, 7, rpb=rpb, return_lse=wants == "lse")
    assert told.configuration.startswith("14 bands of 56 queries" if wants == "nothing" else "28 tiles of")
    with torch.no_grad():
        assert "bands" in ops.explain("neighborhood_attention", q, k, v, 7, rpb=rpb).configuration


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_bands_compute_what_the_definition_does(bad, dtype):
    q, k, v = (x.to(dtype) for x in inputs((9, 8), heads=4, kv_heads=2))
    rpb = torch.randn(4, 5, 7, dtype=dtype)
    if bad is not None:
        k[0, 0, 0, 0], v[1, 4, 3, 1] = bad, bad
    with bands_of(2):
        out = ops.neighborhood_attention(q, k, v, (3, 4), rpb=rpb)
        hidden = ops.neighborhood_attention(q, k, v, (3, 4), rpb=torch.full_like(rpb, float("-inf")))
        empty = ops.neighborhood_attention(q[:0], k[:0], v[:0], (3, 4))
    truth = ops.neighborhood_attention(q, k, v, (3, 4), rpb=rpb, backend="reference")
    good = truth.isfinite()
    assert not out[~good].isfinite().any() and (bad is not None or good.all())
    torch.testing.assert_close(out[good], truth[good])
    assert bad is not None or not hidden.any()
    assert empty.shape == q[:0].shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_a_query_does_not_see_does_not_reach_it(bad, backend, tiles):
    q, k, v = inputs((12, 12), dtype=torch.float32)
    clean, clean_lse = ops.neighborhood_attention(q, k, v, 3, return_lse=True, backend=backend)
    k[0, 0, 0, 0], v[1, 0, 0, 1] = bad, bad  # one head of either image
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    dirty, lse = ops.neighborhood_attention(q, k, v, 3, return_lse=True, backend=backend)
    sees_bad = torch.zeros(2, 12, 12, 2, dtype=torch.bool)
    sees_bad[0, :2, :2, 0] = sees_bad[1, :2, :2, 1] = True
    assert not dirty[sees_bad].isfinite().any()
    torch.testing.assert_close(dirty[~sees_bad], clean[~sees_bad])
    torch.testing.assert_close(lse[1], clean_lse[1])
    assert not lse[0, :2, :2, 0].isfinite().any()
    dq, dk, dv = torch.autograd.grad(dirty[~sees_bad].sum(), (q, k, v))
    assert dq[~sees_bad].isfinite().all()
    assert dk[:, 3:].isfinite().all() and dv[:, 3:].isfinite().all()


class _Largest(TorchDispatchMode):
    """Remembers the most entries a tensor had."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.entries = max(self.entries, x.numel())
        return out


@pytest.mark.parametrize("biased", [False, True])
def test_memory_is_linear_in_tokens(biased):
    """Neither all pairs of tokens nor a copy of the keys of every query, forward and backward."""
    entries = {}
    for side in (32, 64):
        q, k, v = inputs((side, side), batch=1, dim=32, dtype=torch.float32, grad=True)
        rpb = torch.randn(2, 13, 13, requires_grad=True) if biased else None
        with _Largest() as largest:
            ops.neighborhood_attention(q, k, v, 7, rpb=rpb).sum().backward()
        entries[side] = largest.entries
        assert 7 * entries[side] < q.numel() * 7**2
    assert entries[64] < 4.5 * entries[32]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_packed_and_empty_inputs(backend, tiles):
    packed = torch.randn(2, 6, 7, 3, 2, 8)
    q, k, v = packed.unbind(3)
    out = ops.neighborhood_attention(q, k, v, 3, backend=backend)
    whole = ops.neighborhood_attention(*(x.contiguous() for x in (q, k, v)), 3, backend=backend)
    torch.testing.assert_close(out, whole)
    assert out.is_contiguous()
    one = q[:1].expand(2, -1, -1, -1, -1)
    same = ops.neighborhood_attention(one, one, one, 3, backend=backend)
    torch.testing.assert_close(same[0], same[1])
    assert ops.neighborhood_attention(q[:0], k[:0], v[:0], 3, backend=backend).shape == (0, 6, 7, 2, 8)


def test_autocast_computes_in_its_dtype():
    q, k, v = inputs((6, 6), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.neighborhood_attention(q, k, v, 3)
    assert out.dtype == torch.bfloat16
    exact = ops.neighborhood_attention(q, k, v, 3)
    torch.testing.assert_close(out.float(), exact, rtol=3e-2, atol=3e-2)


class _Layer(nn.Module):
    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        self.rpb = nn.Parameter(torch.randn(2, 13, 13))
        self.backend = backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.neighborhood_attention(q, k, v, 7, dilation=2, rpb=self.rpb, backend=self.backend)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dynamic"), [("cpu", None), ("cpu", True), ("reference", None)])
def test_it_compiles_to_one_graph_for_any_size_and_trains_there(backend, dynamic):
    torch._dynamo.reset()
    layer = _Layer(backend)
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=dynamic)
    for batch, grid in ((1, (14, 15)), (2, (20, 24)), (3, (22, 33))):
        q, k, v = inputs(grid, batch=batch, dtype=torch.float32)
        torch.testing.assert_close(compiled(q, k, v), layer(q, k, v))
    compiled(q, k, v).sum().backward()
    assert layer.rpb.grad.isfinite().all()


def test_a_compiled_call_follows_the_backend_of_its_block():
    torch._dynamo.reset()
    q, k, v = inputs((14, 15), dtype=torch.float32)
    layer, graphs = _Layer().eval(), []

    def keep(graph, example):
        graphs.append({node.target for node in graph.graph.nodes})
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=keep)
    compiled(q, k, v)
    with ops.use_backend("reference"):
        compiled(q, k, v)
    compiled(q, k, v)
    assert [torch.functional.einsum in graph for graph in graphs] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strict", [False, True])
def test_it_exports_with_any_batch_and_needs_nothing_of_the_zoo(strict, backend, tmp_path):
    q, k, v = inputs((20, 24), dtype=torch.float32)
    batch = torch.export.Dim("batch")
    layer = _Layer(backend).eval()
    program = torch.export.export(layer, (q, k, v), dynamic_shapes=({0: batch},) * 3, strict=strict)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(name.startswith(("aten.", "<built-in")) for name in names), names
    torch.export.save(program, tmp_path / "layer.pt2")
    again = torch.export.load(tmp_path / "layer.pt2").module()
    torch.testing.assert_close(again(q[:1], k[:1], v[:1]), layer(q[:1], k[:1], v[:1]))


def test_it_runs_on_tensors_without_values_and_under_function_transforms():
    q, k, v = inputs((20, 22), dtype=torch.float32)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        assert ops.neighborhood_attention(*fakes, 5).shape == q.shape
    run = lambda q, k, v: ops.neighborhood_attention(q, k, v, 5).square().sum()  # noqa: E731
    by_transform = torch.func.grad(run)(q, k, v)
    (by_backward,) = torch.autograd.grad(run(q.requires_grad_(), k, v), q)
    torch.testing.assert_close(by_transform, by_backward)


# The window as numbers -------------------------------------------------------------------------------------


def test_indices_name_the_keys_of_every_query():
    index = ops.neighborhood_indices((5, 6), (3, 2), dilation=(1, 2), is_causal=(False, True))
    for query, keys in enumerate(index.tolist()):
        y, x = divmod(query, 6)
        expected = {
            key
            for key in range(30)
            if sees(y, key // 6, 5, 3, 1, 1, False) and sees(x, key % 6, 6, 2, 2, 1, True)
        }
        assert {key for key in keys if key >= 0} == expected


def test_a_bias_that_hides_every_key_of_a_query_leaves_zero_and_finite_gradients():
    tensors = [x.requires_grad_() for x in inputs((12, 13), heads=2)]
    rpb = torch.randn(2, 5, 5, dtype=torch.float64)
    rpb[:, 3:], rpb[:, 2, 2:] = float("-inf"), float("-inf")  # only keys before the query are left
    tensors.append(rpb.requires_grad_())
    results = []
    for backend in ("cpu", "reference"):
        for more in ({}, {"return_lse": True}):
            out = ops.neighborhood_attention(*tensors[:3], 3, rpb=rpb, backend=backend, **more)
            out, lse = out if more else (out, torch.zeros(1))
            assert not out[:, 0, 0].any()
            seen = lse[lse.isfinite()].sum()
            results.append([out, *torch.autograd.grad(out.square().sum() + seen, tensors)])
            assert all(x.isfinite().all() for x in results[-1])
    torch.testing.assert_close(results[:2], results[2:])


def test_infinity_in_a_channel_of_a_value_stays_in_its_channel():
    q, k, v = inputs((12, 13), heads=2)
    v[0, 5, 5, 1, 3] = float("inf")
    out = ops.neighborhood_attention(q, k, v, 3)
    expected = ops.neighborhood_attention(q, k, v, 3, backend="reference")
    assert torch.equal(out.isfinite(), expected.isfinite()) and not out[..., 3].isfinite().all()


def test_what_a_subclass_of_tensor_does_not_see_does_not_reach_it():
    class Own(torch.Tensor):
        pass

    q, k, v = inputs((12, 13), heads=2)
    k[0, 5, 5] = float("nan")
    own = ops.neighborhood_attention(*(x.as_subclass(Own) for x in (q, k, v)), 3)
    torch.testing.assert_close(
        own.as_subclass(torch.Tensor), ops.neighborhood_attention(q, k, v, 3), equal_nan=True
    )


# natten's signatures and natten itself ---------------------------------------------------------------------


def test_natten_signatures_mean_the_same():
    q, k, v = inputs((8, 9))
    extra = torch.randn(2, 3, 2, 8, dtype=torch.float64)
    ours = ops.neighborhood_attention(q, k, v, 3, dilation=2, stride=2, extra_k=extra, extra_v=extra)
    theirs = ops.na2d(q, k, v, 3, 2, 2, additional_keys=extra, additional_values=extra, backend="flex-fna")
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(
        ValueError, match=r"query of na1d must be .B, 1 grid axes, H, D., found shape \(2, 8, 9, 2, 8\)"
    ):
        ops.na1d(q, k, v, 3)
    with pytest.raises(TypeError, match="q_tile_shap.*did you mean q_tile_shape"):
        ops.na2d(q, k, v, 3, q_tile_shap=(8, 8))


@pytest.mark.filterwarnings("ignore:return_lse is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize(
    ("name", "grid", "options"),
    [
        ("na1d", (23,), {"kernel_size": 4, "dilation": 3, "is_causal": True, "scale": 0.3}),
        ("na2d", (10, 12), {"kernel_size": (3, 5), "dilation": (2, 1), "stride": (1, 2)}),
        ("na3d", (4, 6, 5), {"kernel_size": (3, 4, 5), "is_causal": (True, False, False)}),
    ],
)
def test_natten_gives_the_same(name, grid, options):
    natten = pytest.importorskip("natten", reason="natten is not installed: pip install natten")
    q, k, v = inputs(grid, batch=1, dtype=torch.float32, dim=16)
    extra = torch.randn(1, 3, 2, 16)
    options = {**options, "additional_keys": extra, "additional_values": extra, "return_lse": True}
    theirs = getattr(natten, name)(q, k, v, **options)
    for backend in ("auto", "natten"):
        ours = getattr(ops, name)(q, k, v, **options, backend=backend)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# The contract ----------------------------------------------------------------------------------------------

WRONG = {
    "kernel_size must be at least 2, found 1": {"kernel_size": 1},
    r"kernel_size \* dilation = 5 \* 2 must not exceed the length 8 on axis 1": {
        "kernel_size": 5,
        "dilation": 2,
    },
    "stride must be between 1 and kernel_size = 3, found 4": {"stride": 4},
    "dilation must be at least 1, found 0": {"dilation": 0},
    r"kernel_size must have one value or one for each of the 2 grid axes, found \(3, 3, 3\)": {
        "kernel_size": (3, 3, 3)
    },
    "kernel_size must be a whole number": {"kernel_size": 3.0},
    "is_causal must be True or False": {"is_causal": 1},
    r"k must have q's batch, grid and width \(2, 10, 8, 4, 8\), found": {"k": torch.randn(2, 10, 9, 4, 8)},
    "v must have k's batch, grid and heads": {"v": torch.randn(2, 10, 8, 2, 8)},
    "q's 4 heads must be a multiple of k's 3 heads": {
        "k": torch.randn(2, 10, 8, 3, 8),
        "v": torch.randn(2, 10, 8, 3, 8),
    },
    "extra_k and extra_v must be given together": {"extra_k": torch.randn(2, 1, 4, 8)},
    "extra_v must be": {"extra_k": torch.randn(2, 1, 4, 8), "extra_v": torch.randn(2, 2, 4, 8)},
    r"rpb must be \[Hq, 2 \* kernel_size - 1 per axis\] = \(4, 5, 5\), found \(4, 7, 7\)": {
        "rpb": torch.randn(4, 7, 7)
    },
    "k must have q's dtype torch.float32, found torch.float64": {
        "k": torch.randn(2, 10, 8, 4, 8, dtype=torch.float64)
    },
    "rpb must be on q's device cpu, found meta": {"rpb": torch.randn(4, 5, 5, device="meta")},
    "rpb must be float64, float32, float16 or bfloat16, found torch.int64": {
        "rpb": torch.ones(4, 5, 5).long()
    },
    "scale must be a number, found a tensor": {"scale": torch.ones(())},
    "scale must be a number, found '0.5'": {"scale": "0.5"},
    "scale must be a number, found True": {"scale": True},
    "k must be a tensor, found ndarray": {"k": np.zeros((2, 10, 8, 4, 8))},
    "q must be a tensor, found NoneType": {"q": None},
    "q must have at least one channel": {n: torch.randn(2, 10, 8, 4, 0) for n in "qkv"},
    "must be float64, float32, float16 or bfloat16": {"q": torch.ones(2, 10, 8, 4, 8, dtype=torch.int64)},
    "q must be": {"q": torch.randn(10, 4, 8)},
    "no backend 'cpuu'; use auto, triton, cpu, .*, reference; did you mean cpu": {"backend": "cpuu"},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_named_with_what_was_found_and_what_is_allowed(message):
    x = torch.randn(2, 10, 8, 4, 8)
    arguments = {"q": x, "k": x, "v": x, "kernel_size": 3, **WRONG[message]}
    with pytest.raises(ValueError, match=message):
        ops.neighborhood_attention(**arguments)


def test_whole_numbers_of_any_kind_are_taken():
    q, k, v = inputs((8, 9))
    torch.testing.assert_close(
        ops.neighborhood_attention(q, k, v, [np.int64(3), 5]), ops.neighborhood_attention(q, k, v, (3, 5))
    )
    torch.testing.assert_close(
        ops.neighborhood_attention(q, k, v, np.array([3, 5])), ops.neighborhood_attention(q, k, v, (3, 5))
    )


def test_a_named_backend_is_refused_with_the_reason_and_the_nearest_choice():
    x = torch.empty(1, 8, 8, 2, 4, device="meta")
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run.*on meta; use reference"):
        ops.neighborhood_attention(x, x, x, 3, backend="cpu")
    assert ops.neighborhood_attention(x, x, x, 3).shape == x.shape


def test_explain_says_which_backend_and_how():
    x = torch.randn(1, 56, 56, 2, 8)
    told = ops.explain("neighborhood_attention", x, x, x, 5)
    assert told.backend == "cpu"
    assert told.reason.startswith("triton cannot: ")
    assert "tiles of" in told.configuration
    with pytest.raises(ValueError, match="did you mean neighborhood_attention"):
        ops.explain("neighborhood_atention", x, x, x, 5)
