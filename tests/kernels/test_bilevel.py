"""Bi-level routing: the definition against brute force, the CPU path against it, routes against pooling."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from zoo import ops
from zoo.kernels.bilevel import cpu

BACKENDS = ["reference", "cpu"]


@pytest.fixture(params=["dense", "gathered", "one region at a time"])
def way(request, monkeypatch):
    """Make small maps take the ways that large ones take."""
    if request.param != "dense":
        monkeypatch.setattr(cpu, "DENSE_PRODUCTS", 0)
    if request.param == "one region at a time":
        monkeypatch.setattr(cpu, "BYTES_AT_ONCE", 1)


def inputs(
    grid=(6, 8), regions=(3, 2), topk=3, *, batch=2, heads=2, kv_heads=None, dim=4, v_dim=None, coarser=1,
    dtype=torch.float64, grad=False,
):  # fmt: skip
    kv_grid = tuple(length // coarser for length in grid)
    q = torch.randn(batch, *grid, heads, dim, dtype=dtype)
    k = torch.randn(batch, *kv_grid, kv_heads or heads, dim, dtype=dtype)
    v = torch.randn(batch, *kv_grid, kv_heads or heads, v_dim or dim, dtype=dtype)
    parts = regions[0] * regions[1]
    routes = torch.rand(batch, parts, parts).argsort(-1)[..., :topk]
    return *(x.requires_grad_(grad) for x in (q, k, v)), routes, regions


def brute_force(q, k, v, routes, regions, scale, weights=None) -> tuple[Tensor, Tensor]:
    """One query at a time, from the words of the definition."""
    batch, rows, columns, heads, _ = q.shape
    out, lse = q.new_zeros(*q.shape[:-1], v.shape[-1]), q.new_zeros(q.shape[:-1])

    def tokens(region: int, x: Tensor) -> list[tuple[int, int]]:
        height, width = x.shape[1] // regions[0], x.shape[2] // regions[1]
        top, left = region // regions[1] * height, region % regions[1] * width
        return list(itertools.product(range(top, top + height), range(left, left + width)))

    for b, region in itertools.product(range(batch), range(regions[0] * regions[1])):
        for (y, x), head in itertools.product(tokens(region, q), range(heads)):
            kv_head = head // (heads // k.shape[3])
            logits, values = [], []
            for slot, other in enumerate(routes[b, region].tolist()):
                weight = 1.0 if weights is None else weights[b, region, slot]
                for yk, xk in tokens(other, k):
                    logits.append(scale * (q[b, y, x, head] @ (weight * k[b, yk, xk, kv_head])))
                    values.append(weight * v[b, yk, xk, kv_head])
            logits = torch.stack(logits)
            out[b, y, x, head] = logits.softmax(0) @ torch.stack(values)
            lse[b, y, x, head] = logits.logsumexp(0)
    return out, lse


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_the_definition_one_query_at_a_time(backend, weighted, way):
    q, k, v, routes, regions = inputs((3, 4), heads=2, kv_heads=1, v_dim=3)
    weights = torch.rand(routes.shape, dtype=q.dtype) if weighted else None
    expected = brute_force(q, k, v, routes, regions, 0.3, weights)
    options = {"scale": 0.3, "route_weights": weights, "backend": backend}
    torch.testing.assert_close(
        ops.bilevel_routing_attention(q, k, v, routes, regions, return_lse=True, **options), expected
    )
    torch.testing.assert_close(
        ops.bilevel_routing_attention(q, k, v, routes, regions, **options), expected[0]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_may_lie_on_a_coarser_map(backend, way):
    q, k, v, routes, regions = inputs((4, 8), (2, 4), coarser=2)
    expected, _ = brute_force(q, k, v, routes, regions, 0.5)
    torch.testing.assert_close(
        ops.bilevel_routing_attention(q, k, v, routes, regions, backend=backend), expected
    )


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_cpu_path_agrees_with_the_definition_on_any_shape(data):
    size = st.integers(1, 4)
    regions = (data.draw(size), data.draw(size))
    region, coarser = (data.draw(size), data.draw(size)), data.draw(st.sampled_from([1, 2]))
    grid = tuple(n * m * coarser for n, m in zip(regions, region, strict=True))
    kv_heads, shared = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    made = inputs(
        grid, regions, data.draw(st.integers(1, regions[0] * regions[1])), batch=data.draw(st.integers(0, 3)),
        heads=kv_heads * shared, kv_heads=kv_heads, dim=data.draw(size), v_dim=data.draw(size),
        coarser=coarser, grad=True,
    )  # fmt: skip
    lse = data.draw(st.booleans())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "DENSE_PRODUCTS", data.draw(st.sampled_from([0, 1 << 16])))
        patch.setattr(cpu, "BYTES_AT_ONCE", data.draw(st.sampled_from([1, 1000, 1 << 20])))
        results = {}
        for backend in BACKENDS:
            out = ops.bilevel_routing_attention(*made, return_lse=lse, backend=backend)
            out = out if lse else (out,)
            loss = sum((x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in out)
            results[backend] = (*out, *torch.autograd.grad(loss, made[:3]))
    torch.testing.assert_close(results["cpu"], results["reference"])


@pytest.mark.parametrize("return_lse", [False, True])
def test_gradients_are_those_of_finite_differences(return_lse, way):
    *tensors, routes, regions = inputs((4, 4), (2, 2), 2, batch=1, dim=2, v_dim=3, grad=True)
    weights = torch.rand(routes.shape, dtype=torch.float64, requires_grad=True)
    for backend in BACKENDS:
        assert torch.autograd.gradcheck(
            lambda q, k, v, backend=backend: ops.bilevel_routing_attention(
                q, k, v, routes, regions, return_lse=return_lse, backend=backend
            ),
            tensors,
            fast_mode=True,
        )
        assert torch.autograd.gradcheck(
            lambda q, k, v, w, backend=backend: ops.bilevel_routing_attention(
                q, k, v, routes, regions, route_weights=w, return_lse=return_lse, backend=backend
            ),
            (*tensors, weights),
            fast_mode=True,
        )


def test_the_definition_differentiates_twice():
    *tensors, routes, regions = inputs((2, 4), (1, 2), 1, batch=1, heads=1, dim=2, grad=True)
    assert torch.autograd.gradgradcheck(
        lambda q, k, v: ops.bilevel_routing_attention(q, k, v, routes, regions, backend="reference"), tensors
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_lse_alone_has_its_gradient(backend, way):
    q, k, v, routes, regions = inputs((3, 4), grad=True)
    _, lse = ops.bilevel_routing_attention(q, k, v, routes, regions, return_lse=True, backend=backend)
    ours = torch.autograd.grad(lse.square().sum(), (q, k))
    _, lse = brute_force(q, k, v, routes, regions, 0.5)
    torch.testing.assert_close(ours, torch.autograd.grad(lse.square().sum(), (q, k)))


def test_regions_that_are_columns_of_the_map_have_their_gradients(monkeypatch):
    """With one image the cut into regions is a view there, and what is summed into must not be."""
    monkeypatch.setattr(cpu, "DENSE_PRODUCTS", 0)
    q, k, v, routes, regions = inputs((4, 2), (1, 2), 1, batch=1, grad=True)
    ours, theirs = (
        torch.autograd.grad(
            ops.bilevel_routing_attention(q, k, v, routes, regions, backend=backend).square().sum(), (q, k, v)
        )
        for backend in BACKENDS
    )
    torch.testing.assert_close(ours, theirs)


# Equivalences -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_regions_chosen_is_dense_attention(backend, way):
    q, k, v, routes, regions = inputs(topk=6)
    dense = F.scaled_dot_product_attention(*(x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)))
    out = ops.bilevel_routing_attention(q, k, v, routes, regions, backend=backend)
    torch.testing.assert_close(out, dense.transpose(1, 2).view_as(out))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_region_its_own_is_window_attention(backend, way):
    q, k, v, _, regions = inputs()
    own = torch.arange(6).view(1, 6, 1).expand(2, -1, -1)
    windows = ops.window_attention(q, k, v, (2, 4), backend="reference")
    out = ops.bilevel_routing_attention(q, k, v, own, regions, backend=backend)
    torch.testing.assert_close(out, windows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_routes_means_nothing_and_twice_counts_twice(backend, way):
    q, k, v, routes, regions = inputs((3, 4))

    def attend(routes: Tensor) -> Tensor:
        return ops.bilevel_routing_attention(q, k, v, routes, regions, backend=backend)

    torch.testing.assert_close(attend(routes), attend(routes.flip(-1).int()))
    torch.testing.assert_close(attend(routes), attend(torch.cat([routes, routes], -1)))
    twice = torch.cat([routes, routes[..., :1]], -1)
    expected, _ = brute_force(q, k, v, twice, regions, 0.5)
    torch.testing.assert_close(attend(twice), expected)


# Numbers, layouts, tracers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("topk", [2, 12])
def test_the_cpu_path_is_as_close_to_truth_as_the_definition(dtype, topk, way):
    q, k, v, routes, regions = inputs((8, 12), (4, 3), topk, dim=16, dtype=dtype, grad=True)
    truth = ops.bilevel_routing_attention(
        *(x.double() for x in (q, k, v)), routes, regions, backend="reference"
    )
    upstream = torch.randn_like(truth)
    exact = torch.autograd.grad((truth * upstream).sum(), (q, k, v))
    errors = {}
    for backend in BACKENDS:
        out = ops.bilevel_routing_attention(q, k, v, routes, regions, backend=backend)
        assert out.dtype == dtype
        grads = torch.autograd.grad((out * upstream).sum(), (q, k, v))
        pairs = zip((out, *grads), (truth, *exact), strict=True)
        errors[backend] = [(ours.double() - true.double()).norm() / true.norm() for ours, true in pairs]
    slack = {torch.float32: 1e-5, torch.float16: 2e-4, torch.bfloat16: 2e-3}[dtype]
    assert all(
        ours <= 2 * theirs + slack for ours, theirs in zip(errors["cpu"], errors["reference"], strict=True)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_and_expanded_inputs_and_an_empty_batch(backend, way):
    packed = torch.randn(2, 8, 6, 3, 2, 4, dtype=torch.float64)
    *_, routes, regions = inputs((6, 8))
    q, k, v = packed.transpose(1, 2).unbind(3)
    plain = ops.bilevel_routing_attention(
        *(x.contiguous() for x in (q, k, v)), routes, regions, backend=backend
    )
    torch.testing.assert_close(
        ops.bilevel_routing_attention(q, k, v, routes, regions, backend=backend), plain
    )
    one = ops.bilevel_routing_attention(
        *(x[:1].expand(2, -1, -1, -1, -1) for x in (q, k, v)), routes[:1].expand(2, -1, -1), regions,
        backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(one[1], plain[0])
    q, k, v, routes, regions = inputs(batch=0, grad=True)
    out, lse = ops.bilevel_routing_attention(q, k, v, routes, regions, return_lse=True, backend=backend)
    assert out.shape == q.shape and lse.shape == q.shape[:-1]
    out = ops.bilevel_routing_attention(q, k, v, routes, regions, backend=backend)
    out.sum().backward()
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_chosen_does_not_leak(backend, bad, way):
    q, k, v, _, regions = inputs()
    routes = torch.tensor([1, 2, 3, 4, 5]).expand(2, 6, -1)  # the first region is nobody's choice
    expected = ops.bilevel_routing_attention(q, k, v, routes, regions, backend=backend)
    k, v = k.clone(), v.clone()
    k[:, 0, 0], v[:, 1, 3] = bad, bad
    torch.testing.assert_close(
        ops.bilevel_routing_attention(q, k, v, routes, regions, backend=backend), expected
    )


@pytest.mark.parametrize("order", [(0, 3, 4, 1, 2), (0, 1, 2, 4, 3)], ids=["NCHW", "channels first"])
@pytest.mark.parametrize(("grid", "regions"), [((8, 6), (4, 1)), ((8, 6), (1, 1)), ((1, 12), (1, 4))])
def test_tensors_may_lie_in_memory_in_any_order(grid, regions, order, monkeypatch):
    monkeypatch.setattr(cpu, "DENSE_PRODUCTS", 0)
    made = inputs(grid, regions, 1, dim=16, dtype=torch.float32)
    back = [order.index(axis) for axis in range(5)]
    shuffled = [x.permute(order).contiguous().permute(back).requires_grad_() for x in made[:3]]
    assert shuffled[0].stride(-1) != 1
    plain = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in made[:3]]
    grad = torch.randn(made[0].permute(order).shape).permute(back)
    results = []
    for leaves, backend in ((shuffled, "cpu"), (plain, "reference")):
        out = ops.bilevel_routing_attention(*leaves, *made[3:], backend=backend)
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_sums_over_many_parts_are_not_rounded_on_the_way(monkeypatch):
    monkeypatch.setattr(cpu, "DENSE_PRODUCTS", 0)
    monkeypatch.setattr(cpu, "BYTES_AT_ONCE", 1)
    *leaves, routes, regions = inputs((16, 16), (8, 8), 48, batch=1, dim=8)
    grad = torch.randn_like(leaves[0])
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        some = [x.detach().bfloat16().to(dtype).requires_grad_() for x in leaves]
        out = ops.bilevel_routing_attention(*some, routes, regions, backend="cpu")
        results.append([x.double() for x in torch.autograd.grad(out, some, grad.bfloat16().to(dtype))])
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).norm() < 5e-3 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_lse_is_not_rounded_to_half_precision(dtype, weighted):
    q, k, v = (torch.randn(1, 16, 16, 2, 16).to(dtype) for _ in range(3))
    routes = torch.rand(1, 4, 4).argsort(-1)[..., :2]
    weights = torch.rand(1, 4, 2) if weighted else None
    _, lse = ops.bilevel_routing_attention(q, k, v, routes, 2, route_weights=weights, return_lse=True)
    q, k, v = (x.double() for x in (q, k, v))
    weights = None if weights is None else weights.double()
    _, exact = ops.bilevel_routing_attention(q, k, v, routes, 2, route_weights=weights, return_lse=True)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=1e-5)


def test_a_scaled_gradient_of_the_lse_fits_into_half_precision():
    q, k, v, routes, regions = inputs(dtype=torch.float16)
    q, k = ((x / 16).requires_grad_() for x in (q, k))
    _, lse = ops.bilevel_routing_attention(q, k, v, routes, regions, return_lse=True, backend="cpu")
    for grad in torch.autograd.grad(lse, (q, k), torch.full_like(lse, 65536.0)):
        assert grad.isfinite().all()


class _Largest(TorchDispatchMode):
    """Remember how many elements the largest result has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_memory_does_not_grow_with_the_number_of_routes(monkeypatch):
    monkeypatch.setattr(cpu, "BYTES_AT_ONCE", 1 << 14)
    q, k, v, routes, regions = inputs((28, 28), (7, 7), 16, batch=1, dtype=torch.float32, grad=True)
    with _Largest() as seen:
        out = ops.bilevel_routing_attention(q, k, v, routes, regions, backend="cpu")
        out.sum().backward()
    assert seen.elements <= 2 * q.numel()  # the copy for each route would be 16 times q


@pytest.mark.slow
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("way", ["dense", "gathered"], indirect=True)
def test_it_compiles_and_exports_with_any_batch(return_lse, way):
    class Routed(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            routes, scores = ops.route(q, k, (3, 2), 3)
            out = ops.bilevel_routing_attention(q, k, v, routes, (3, 2), return_lse=return_lse)
            return (*out, scores) if return_lse else (out, scores)

    torch._dynamo.reset()
    q, k, v, *_ = inputs(dtype=torch.float32)
    expected = Routed()(q, k, v)
    compiled = torch.compile(Routed(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), expected)
    batch = torch.export.Dim("batch")
    program = torch.export.export(Routed(), (q, k, v), dynamic_shapes=[{0: batch}] * 3)
    three = tuple(x.repeat(2, 1, 1, 1, 1)[:3] for x in (q, k, v))
    torch.testing.assert_close(program.module()(*three), Routed()(*three))


@pytest.mark.parametrize("way", ["dense", "gathered"], indirect=True)
def test_gradients_through_a_compiled_graph_are_the_same(way):
    torch._dynamo.reset()
    q, k, v, routes, regions = inputs(grad=True)
    compiled = torch.compile(ops.bilevel_routing_attention, fullgraph=True, backend="aot_eager")
    ours, theirs = (
        torch.autograd.grad(f(q, k, v, routes, regions).square().sum(), (q, k, v))
        for f in (compiled, ops.bilevel_routing_attention)
    )
    torch.testing.assert_close(ours, theirs)


def test_it_works_under_functorch_and_fake_tensors(way):
    q, k, v, routes, regions = inputs()

    def loss(q: Tensor) -> Tensor:
        return ops.bilevel_routing_attention(q, k, v, routes, regions).square().sum()

    q.requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(q), torch.autograd.grad(loss(q), q)[0])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = ops.bilevel_routing_attention(
            *(mode.from_tensor(x.detach()) for x in (q, k, v, routes)), regions
        )
    assert out.shape == q.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_decides_the_dtype(backend):
    q, k, v, routes, regions = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = ops.bilevel_routing_attention(q, k.bfloat16(), v, routes, regions, backend=backend)
        means = ops.region_means(q, regions)
        same, scores = ops.route(q, k, regions, 2)
    assert low.dtype == torch.bfloat16 and means.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(
        low.float(), ops.bilevel_routing_attention(q, k, v, routes, regions), rtol=0.03, atol=0.03
    )
    assert torch.equal(same, ops.route(q, k, regions, 2)[0])


# Routing ----------------------------------------------------------------------------------------------------


def test_routes_follow_the_means_of_whole_regions():
    q, k, *_ = inputs((6, 8), (3, 2), heads=2)
    flat_q, flat_k = (
        F.avg_pool2d(x.flatten(3).permute(0, 3, 1, 2), (2, 4)).flatten(2).transpose(1, 2) for x in (q, k)
    )
    affinity = 8**-0.5 * flat_q @ flat_k.transpose(1, 2)
    routes, scores = ops.route(q, k, (3, 2), 4)
    assert routes.dtype == torch.int64
    torch.testing.assert_close(scores, affinity.topk(4)[0])
    torch.testing.assert_close(affinity.gather(2, routes), scores)
    means = [ops.region_means(x, (3, 2)) for x in (q, k)]
    assert torch.equal(ops.route(*means, (3, 2), 4)[0], routes)


def test_scores_carry_gradients():
    q, k, *_ = inputs((4, 4), (2, 2), batch=1, heads=4, kv_heads=2, dim=2, grad=True)
    assert torch.autograd.gradcheck(lambda q, k: ops.route(q, k, 2, 3, scale=0.7)[1], (q, k))


def test_padding_is_left_out_of_the_means():
    x = torch.randn(2, 5, 7, 2, 3, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, 0, 0, 2, 0, 1))
    expected = F.avg_pool2d(x.flatten(3).permute(0, 3, 1, 2), (2, 3), ceil_mode=True, count_include_pad=False)
    means = ops.region_means(padded, (3, 3), image=(5, 7))
    torch.testing.assert_close(means.flatten(3).permute(0, 3, 1, 2), expected)


# Mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regions": (4, 2)}, "regions 4 x 2 must divide q's map of 6 x 8"),
        ({"regions": (3, 2, 1)}, "regions must be one number or"),
        ({"regions": True}, "regions must be a whole number, found True"),
        ({"regions": 2.0}, "regions must be one number or .rows, columns., found 2.0"),
        ({"regions": (0, 2)}, "regions 0 x 2 must divide"),
        ({"q": torch.zeros(2, 6, 8, 4)}, "q must be .* found .2, 6, 8, 4."),
        ({"k": torch.zeros(2, 6, 8, 2, 5)}, "k must be .* width 4"),
        ({"k": torch.zeros(2, 6, 8, 3, 4)}, "v must have|multiple of k's 3 heads"),
        ({"v": torch.zeros(2, 6, 4, 2, 4)}, "v must have k's batch, map and heads"),
        ({"v": torch.zeros(2, 6, 8, 2, 4).double()}, "v must have q's dtype torch.float32"),
        ({"routes": torch.zeros(2, 5, 1).long()}, "6 regions .* found .2, 5, 1."),
        ({"routes": torch.zeros(2, 6, 0).long()}, "topk of at least 1"),
        ({"routes": torch.zeros(2, 6, 1)}, "routes must be int64 or int32, found torch.float32"),
        ({"routes": torch.full((2, 6, 1), 6)}, "between 0 and 5, found 6 to 6"),
        ({"routes": torch.full((2, 6, 1), -1)}, "between 0 and 5, found -1 to -1"),
        ({"route_weights": torch.ones(2, 6)}, "route_weights must be one for each"),
        ({"scale": torch.tensor(1.0)}, "scale must be a number"),
        ({"backend": "gpu"}, "no backend 'gpu'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    q, k, v, routes, regions = inputs(dtype=torch.float32)
    arguments = {"q": q, "k": k, "v": v, "routes": routes, "regions": regions} | change
    with pytest.raises(ValueError, match=message):
        ops.bilevel_routing_attention(**arguments)


@pytest.mark.parametrize("topk", [0, 7, 1.5])
def test_topk_is_a_number_of_regions(topk):
    q, k, *_ = inputs()
    with pytest.raises(ValueError, match=f"topk must be .*{topk}"):
        ops.route(q, k, (3, 2), topk)


def test_means_and_routes_refuse_what_is_no_map_of_one_kind():
    q, k, *_ = inputs()
    with pytest.raises(ValueError, match="k must have q's dtype"):
        ops.route(q, k.half(), (3, 2), 2)
    with pytest.raises(ValueError, match="k must be on q's device"):
        ops.route(q, k.to("meta"), (3, 2), 2)
    with pytest.raises(ValueError, match=r"x must be \[B, Y, X, H, D\], found shape \(2, 6, 6, 8\)"):
        ops.region_means(torch.randn(2, 6, 6, 8), 2)
    with pytest.raises(ValueError, match=r"image must be \(rows, columns\), found 6"):
        ops.region_means(torch.randn(2, 6, 6, 1, 8), 2, image=6)


def test_it_explains_itself():
    q, k, v, routes, regions = inputs((56, 56), (7, 7), 4, dtype=torch.float32)
    told = ops.explain("bilevel_routing_attention", q, k, v, routes, regions)
    assert (told.backend, told.configuration) == ("cpu", "63 regions at once with 256 keys each")
    # What is copied of keys that heads share is as wide as all heads.
    q, k, v, routes, regions = inputs((56, 56), (7, 7), 4, heads=8, kv_heads=1, dim=32, dtype=torch.float32)
    told = ops.explain("bilevel_routing_attention", q, k, v, routes, regions)
    assert told.configuration == "2 regions at once with 256 keys each"
    q, k, v, routes, regions = inputs((14, 14), (7, 7), 16, dtype=torch.float32)
    told = ops.explain("bilevel_routing_attention", q, k, v, routes, regions)
    assert told.configuration == "one dense attention with a mask"
