"""Deformable sampling and attention: the definition against brute force, the CPU path against it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zoo import ops
from zoo.kernels.deformable import cpu

BACKENDS = ["reference", "cpu"]
GRIDS = ["corners", "centres"]


def inputs(size=(3, 4), *, batch=2, heads=4, kv_heads=None, groups=2, keys=5, dim=3, dtype=torch.float64):
    """q, k, v, positions (some beyond the map) and a table whose entries are no whole displacements."""
    q = torch.randn(batch, *size, heads, dim, dtype=dtype)
    k = torch.randn(batch, keys, kv_heads or heads, dim, dtype=dtype)
    v = torch.randn(batch, keys, kv_heads or heads, dim, dtype=dtype)
    positions = 2.4 * torch.rand(batch, groups, keys, 2, dtype=dtype) - 1.2
    return q, k, v, positions, torch.randn(heads, 6, 5, dtype=dtype)


def read(entries: list[list[float]], y: float, x: float) -> float:
    """One bilinear sample at (y, x), each from -1 to 1, with zeros around."""
    rows, columns = len(entries), len(entries[0])
    y, x = (y + 1) / 2 * (rows - 1), (x + 1) / 2 * (columns - 1)
    total = 0.0
    for i, j in itertools.product(range(rows), range(columns)):
        total += max(0.0, 1 - abs(y - i)) * max(0.0, 1 - abs(x - j)) * entries[i][j]
    return total


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_are_what_one_at_a_time_gives(backend):
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    positions = inputs()[3]
    out = ops.deformable_sample(x, positions, backend=backend)
    assert out.shape == (2, 5, 6)
    for b, n, c in itertools.product(range(2), range(5), range(6)):
        y, x_ = positions[b, c // 3, n].tolist()
        assert out[b, n, c].item() == pytest.approx(read(x[b, :, :, c].tolist(), y, x_), abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", GRIDS)
def test_attention_is_what_one_pair_at_a_time_gives(grid, backend):
    q, k, v, positions, table = inputs(kv_heads=2)
    bias = torch.randn(2, 4, 12, 5, dtype=torch.float64)
    out, lse = ops.deformable_attention(
        q, k, v, positions, table, query_grid=grid, bias=bias, return_lse=True, backend=backend
    )
    at = {
        "corners": lambda i, n: 2 * i / (n - 1) - 1,
        "centres": lambda i, n: (2 * i + 1) / n - 1,
    }[grid]
    for b, y, x, h in itertools.product(range(2), range(3), range(4), range(4)):
        logits = []
        for n in range(5):
            key_y, key_x = positions[b, h // 2, n].tolist()
            relative = read(table[h].tolist(), (at(y, 3) - key_y) / 2, (at(x, 4) - key_x) / 2)
            product = (q[b, y, x, h] @ k[b, n, h // 2]).item() / math.sqrt(3)
            logits.append(product + relative + bias[b, h, 4 * y + x, n].item())
        logits = torch.tensor(logits, dtype=torch.float64)
        torch.testing.assert_close(out[b, y, x, h], logits.softmax(0) @ v[b, :, h // 2])
        torch.testing.assert_close(lse[b, y, x, h], logits.logsumexp(0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_the_tokens_it_reads_the_tokens_and_the_entries_of_the_table(backend):
    rows, columns = 3, 4
    x = torch.randn(1, rows, columns, 2, dtype=torch.float64)
    y, x_ = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (rows, columns))
    positions = torch.stack(torch.meshgrid(y, x_, indexing="ij"), -1).flatten(0, 1)[None, None]
    torch.testing.assert_close(ops.deformable_sample(x, positions, backend=backend), x.flatten(1, 2))
    table = torch.randn(1, 2 * rows - 1, 2 * columns - 1, dtype=torch.float64)
    zero = torch.zeros(1, rows, columns, 1, 2, dtype=torch.float64)
    weights = ops.deformable_attention(
        zero, zero.flatten(1, 2), torch.eye(12, dtype=torch.float64)[None, :, None], positions, table,
        backend=backend,
    )  # fmt: skip
    token = torch.arange(12)
    down = token[:, None] // columns - token // columns + rows - 1  # query minus key
    right = token[:, None] % columns - token % columns + columns - 1
    torch.testing.assert_close(weights.view(12, 12), table[0, down, right].softmax(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_beyond_the_map_there_are_zeros(backend):
    x = torch.ones(1, 3, 3, 1)
    positions = torch.tensor([[-1.0, 0.0], [-1.5, 0.0], [-2.0, 0.0], [9.0, 9.0]])
    out = ops.deformable_sample(x, positions[None, None], backend=backend)
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 0.5, 0.0, 0.0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", GRIDS)
def test_gradients_are_those_of_finite_differences(grid, backend):
    q, k, v, positions, table = (
        x.requires_grad_() for x in inputs((2, 2), batch=1, heads=2, groups=1, keys=3, dim=2)
    )
    bias = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(q, k, v, positions, table, bias):
        return ops.deformable_attention(
            q, k, v, positions, table, bias=bias, query_grid=grid, return_lse=True, backend=backend
        )

    assert torch.autograd.gradcheck(run, (q, k, v, positions, table, bias))
    assert torch.autograd.gradcheck(
        lambda x, positions: ops.deformable_sample(x, positions, backend=backend), (x, positions)
    )


def test_the_definition_is_differentiable_twice():
    q, k, v, positions, table = (
        x.requires_grad_() for x in inputs((2, 1), batch=1, heads=1, groups=1, keys=2, dim=2)
    )
    run = lambda *leaves: ops.deformable_attention(*leaves, backend="reference")  # noqa: E731
    assert torch.autograd.gradgradcheck(run, (q, k, v, positions, table))


@given(
    st.tuples(st.integers(1, 7), st.integers(1, 7)), st.integers(1, 9),
    st.sampled_from([(4, 2), (6, 3), (3, 1)]), st.booleans(), st.sampled_from([None, (1, 1), (3, 8)]),
    st.sampled_from(GRIDS), st.sampled_from([1 << 24, 7]), st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_size_gives_the_same_on_the_cpu_path(size, keys, heads, biased, table, grid, at_once, seed):
    torch.manual_seed(seed)
    heads, groups = heads
    q, k, v, positions, _ = inputs(size, heads=heads, groups=groups, keys=keys)
    leaves = [q, k, v, positions] if table else [q, k, v]
    options = {"query_grid": grid}
    if table:
        options |= {"positions": positions, "table": torch.randn(heads, *table, dtype=torch.float64)}
        leaves.append(options["table"])
    if biased:
        options["bias"] = torch.randn(heads, size[0] * size[1], keys, dtype=torch.float64)
        leaves.append(options["bias"])
    for leaf in leaves:
        leaf.requires_grad_()
    x = torch.randn(2, *size, heads, dtype=torch.float64, requires_grad=True)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "PAIRS_AT_ONCE", at_once)  # so small a number cuts every map into parts
        for backend in BACKENDS:
            out = ops.deformable_attention(q, k, v, backend=backend, **options)
            sample = ops.deformable_sample(x, positions, backend=backend)
            loss = out.square().sum() + sample.square().sum()
            results.append((out, sample, *torch.autograd.grad(loss, [*leaves, x])))
    for fast, truth in zip(*results, strict=True):
        torch.testing.assert_close(fast, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
def test_the_cpu_path_is_as_close_to_truth_as_the_definition(trained, dtype):
    q, k, v, positions, table = inputs((9, 8), keys=20, dim=33)
    positions = positions.float()
    low = [x.to(dtype) for x in (q, k, v)] + [positions, table.to(dtype).requires_grad_(trained)]
    x = torch.randn(2, 9, 8, 8).to(dtype)
    exact = [each.detach().double() for each in low]
    truth = ops.deformable_attention(*exact, backend="reference")
    true_sample = ops.deformable_sample(x.double(), positions.double(), backend="reference")
    errors = {}
    for backend in BACKENDS:
        out = ops.deformable_attention(*low, backend=backend)
        sample = ops.deformable_sample(x, positions, backend=backend)
        assert out.dtype == sample.dtype == dtype
        errors[backend] = [
            ((a.double() - b).norm() / b.norm()).item() for a, b in ((out, truth), (sample, true_sample))
        ]
    for fast, budget in zip(errors["cpu"], errors["reference"], strict=True):
        assert fast <= 2 * budget + 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_table_it_is_attention_to_the_samples(backend):
    q, k, v, *_ = inputs()
    out = ops.deformable_attention(q, k, v, backend=backend)
    flat = [x.transpose(1, 2) for x in (q.flatten(1, 2), k, v)]
    dense = nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2).unflatten(1, (3, 4))
    torch.testing.assert_close(out, dense)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_the_keys_merge_by_their_lse(backend):
    q, k, v, positions, table = inputs()

    def part(some):
        return ops.deformable_attention(
            q, k[:, some], v[:, some], positions[:, :, some], table, return_lse=True, backend=backend
        )

    out, lse = zip(part(slice(0, 2)), part(slice(2, 5)), strict=True)
    merged, _ = ops.merge_attentions(out, lse)
    torch.testing.assert_close(merged, ops.deformable_attention(q, k, v, positions, table, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_expanded_and_empty_inputs(backend):
    q, k, v, positions, table = inputs(dtype=torch.float32)
    whole = ops.deformable_attention(q, k, v, positions, table, backend=backend)
    k, v = torch.stack([k, v], 2).unbind(2)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    positions = positions.flip(-1).contiguous().flip(-1)
    table = table.transpose(1, 2).contiguous().transpose(1, 2)
    out = ops.deformable_attention(q, k, v, positions, table, backend=backend)
    torch.testing.assert_close(out, whole)
    x = torch.randn(2, 4, 3, 4).transpose(1, 2)
    torch.testing.assert_close(
        ops.deformable_sample(x, positions, backend=backend),
        ops.deformable_sample(x.contiguous(), positions, backend=backend),
    )
    none = ops.deformable_attention(q[:0], k[:0], v[:0], positions[:0], table, backend=backend)
    assert none.shape == (0, 3, 4, 4, 3)
    assert ops.deformable_sample(x[:0], positions[:0], backend=backend).shape == (0, 5, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_its_dtype_but_not_the_positions(backend):
    q, k, v, positions, table = inputs((8, 8), dtype=torch.float32)
    exact = ops.deformable_attention(q, k, v, positions, table, backend=backend)
    x = torch.randn(2, 64, 64, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.deformable_attention(q, k, v, positions, table, backend=backend)
        sample = ops.deformable_sample(x, positions, backend=backend)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(sample, ops.deformable_sample(x, positions, backend=backend))


class _Layer(nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 6, 5))
        self.backend = backend

    def forward(self, x: Tensor, q: Tensor, positions: Tensor) -> Tensor:
        k = ops.deformable_sample(x, positions, backend=self.backend).unflatten(-1, (4, -1))
        return ops.deformable_attention(q, k, k, positions, self.table, backend=self.backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_to_one_graph_and_trains_there(backend):
    torch._dynamo.reset()
    layer = _Layer(backend)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    q, _, _, positions, _ = inputs((5, 6), dtype=torch.float32)
    x = torch.randn(2, 5, 6, 12)
    torch.testing.assert_close(compiled(x, q, positions), layer(x, q, positions))
    compiled(x, q, positions).sum().backward()
    assert layer.table.grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "strict"), [("reference", False), ("cpu", False), ("cpu", True)])
def test_it_exports_with_any_batch(backend, strict):
    q, _, _, positions, _ = inputs((5, 6), dtype=torch.float32)
    x = torch.randn(2, 5, 6, 12)
    batch = torch.export.Dim("batch")
    layer = _Layer(backend).eval()
    shapes = ({0: batch},) * 3
    program = torch.export.export(layer, (x, q, positions), dynamic_shapes=shapes, strict=strict)
    more = [each.repeat(3, *[1] * (each.ndim - 1)) for each in (x, q, positions)]
    torch.testing.assert_close(program.module()(*more), layer(*more))


def replaced(**changes):
    names = ("q", "k", "v", "positions", "table")
    return dict(zip(names, inputs(), strict=True)) | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.randn(2, 12, 4, 3)}, r"q must be \[B, Y, X, H, D\].*\(2, 12, 4, 3\)"),
        ({"k": torch.randn(2, 5, 4, 2)}, "k must be .*width 3.*found shape"),
        ({"v": torch.randn(2, 6, 4, 3)}, "v must have k's batch, keys and heads"),
        ({"k": torch.randn(2, 5, 3, 3), "v": torch.randn(2, 5, 3, 3)}, "4 heads must be a multiple of k's 3"),
        ({"positions": torch.randn(2, 2, 5, 3)}, r"positions must be \[B, groups, N, 2\].*found"),
        ({"positions": torch.randn(2, 2, 4, 2)}, "as many as the 5 keys, found 4"),
        ({"positions": torch.randn(2, 3, 5, 2)}, "3 groups of positions must divide the 4 heads"),
        ({"positions": None}, "a table needs positions"),
        ({"positions": torch.zeros(2, 2, 5, 2).long()}, "positions must be float64.*found torch.int64"),
        ({"table": torch.randn(2, 6, 5)}, "table must be .*4 heads, found shape"),
        ({"bias": torch.randn(3, 12, 5)}, r"bias must broadcast to .*\(2, 4, 12, 5\), found \(3, 12, 5\)"),
        ({"query_grid": "centers"}, "query_grid must be one of corners, centres, found 'centers'"),
        ({"scale": torch.ones(())}, "scale must be a number"),
        ({"v": torch.randn(2, 5, 4, 3)}, "v must have q's dtype torch.float64, found torch.float32"),
        ({"backend": "flex"}, "no backend 'flex'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_told_with_value_and_limit(changes, message):
    with pytest.raises(ValueError, match=message):
        ops.deformable_attention(**replaced(**changes))


@pytest.mark.parametrize(
    ("x", "positions", "message"),
    [
        (torch.randn(2, 3, 4), torch.randn(2, 1, 5, 2), r"x must be \[B, Y, X, C\]"),
        (torch.randn(2, 3, 4, 6), torch.randn(1, 1, 5, 2), "with batch 2, found shape"),
        (torch.randn(2, 3, 4, 6), torch.randn(2, 4, 5, 2), "4 groups of positions must divide the 6"),
    ],
)  # fmt: skip
def test_wrong_samples_are_told_with_value_and_limit(x, positions, message):
    with pytest.raises(ValueError, match=message):
        ops.deformable_sample(x, positions)


def test_it_says_what_it_would_use():
    q, k, v, positions, table = inputs()
    assert ops.explain("deformable_attention", q, k, v, positions, table).backend == "cpu"
    x = torch.randn(2, 3, 4, 6)
    assert ops.explain("deformable_sample", x, positions, backend="reference").backend == "reference"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [False, True])
def test_a_query_from_which_a_bias_hides_every_key_gets_zero(backend, trained):
    q, k, v, positions, table = inputs()
    bias = torch.randn(12, 5, dtype=torch.float64)
    bias[7] = float("-inf")
    bias.requires_grad_(trained)
    for more in ({}, {"positions": positions, "table": table}):
        arguments = {"bias": bias, "backend": backend, **more}
        out, lse = ops.deformable_attention(q, k, v, **arguments, return_lse=True)
        torch.testing.assert_close(ops.deformable_attention(q, k, v, **arguments), out)
        out, lse = out.flatten(1, 2), lse.flatten(1, 2)
        assert (out[:, 7] == 0).all() and (lse[:, 7] == float("-inf")).all()
        assert out.isfinite().all() and lse[:, :7].isfinite().all()
        if trained:
            (gradient,) = torch.autograd.grad(out.square().sum(), bias)
            assert gradient.isfinite().all()


def test_a_table_that_wants_a_gradient_can_be_mapped_over():
    q, k, v, positions, table = (x.requires_grad_() for x in inputs())

    def run(*tensors):
        return ops.deformable_attention(*(x[None] for x in tensors), table=table)[0]

    mapped = torch.func.vmap(lambda q, k, v, p: run(q, k, v, p))(q, k, v, positions)
    torch.testing.assert_close(mapped, ops.deformable_attention(q, k, v, positions=positions, table=table))
