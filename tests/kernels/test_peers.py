"""flex_attention, xformers and NATTEN as named backends: the same numbers, never chosen, refused in words."""

from __future__ import annotations

import sys
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from zoo import ops
from zoo.kernels import dispatch, peers
from zoo.kernels.block_sparse.peers import block_mask
from zoo.ops import BlockList


def qkv(n, m=None, *, batch=2, heads=4, kv_heads=None, dim=16):
    return [
        torch.randn(batch, n if name == "q" else m or n, heads if name == "q" else kv_heads or heads, dim)
        for name in "qkv"
    ]


def lists(kind: str) -> tuple[BlockList, int, int]:
    if kind == "segments":
        return BlockList.from_segments([5, 0, 150, 40], [9, 3, 0, 260], block_size=32), 195, 272
    shape = {"shared": (), "by head": (4,), "by image": (2, 1)}[kind]
    mask = torch.rand(*shape, 7, 4) < 0.5
    mask[..., 2, :] = False
    return BlockList.from_mask(mask, block_size=(49, 80)), 320, 300


@pytest.mark.parametrize(
    ("kind", "biased"),
    [
        ("shared", False),
        ("by head", True),
        pytest.param("by image", False, marks=pytest.mark.slow),
        pytest.param("segments", True, marks=pytest.mark.slow),
        ("segments", False),
    ],
)
def test_flex_computes_block_sparse_attention(kind, biased):
    blocks, n, m = lists(kind)
    q, k, v = qkv(n, m, kv_heads=2)
    bias = torch.randn(4, n, m) if biased else None
    out, lse = ops.block_sparse_attention(q, k, v, blocks, bias=bias, return_lse=True, backend="flex")
    expected = ops.block_sparse_attention(q, k, v, blocks, bias=bias, return_lse=True, backend="reference")
    torch.testing.assert_close((out, lse), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["shared", "by head", "by image", "segments"])
def test_its_blocks_hold_what_is_listed_and_no_more(kind):
    blocks, n, m = lists(kind)
    mask = block_mask(blocks, n, m)
    listed = blocks.to_mask()[..., torch.arange(n) // blocks.query_size, :]
    seen = F.pad(listed[..., torch.arange(m) // blocks.key_size], (0, -m % 128, 0, -n % 128))
    there = F.pad(torch.ones(n, m, dtype=torch.bool), (0, -m % 128, 0, -n % 128))

    def cut(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, 128)).unflatten(-3, (-1, 128)).transpose(-3, -2).flatten(-2)

    rows, count = cut(seen), mask.kv_num_blocks.shape[-1]
    found = []
    for numbers, indices in (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        taken = torch.arange(indices.shape[-1]) < numbers[..., None]
        found.append(torch.zeros_like(taken).scatter(-1, indices.long(), taken))
    partial, full = found
    assert count == rows.shape[-3]
    assert not (partial & full).any()
    assert torch.equal(partial | full, rows.any(-1))
    whole = (rows | ~cut(there)).all(-1) & rows.any(-1)
    assert torch.equal(full, whole if kind != "segments" else torch.zeros_like(whole))


@pytest.mark.parametrize(("shift", "biased"), [(0, True), pytest.param(2, True, marks=pytest.mark.slow)])
def test_flex_computes_window_attention(shift, biased):
    q, k, v = (torch.randn(2, 8, 12, heads, 16) for heads in (4, 2, 2))
    bias = torch.randn(4, 16, 16) if biased else None
    options = {"shift": shift, "bias": bias, "return_lse": True}
    out, lse = ops.window_attention(q, k, v, 4, **options, backend="flex")
    expected = ops.window_attention(q, k, v, 4, **options, backend="reference")
    torch.testing.assert_close((out, lse), expected, rtol=1e-4, atol=1e-5)


class Xformers:
    """What the calls rely on, in plain PyTorch: [B, N, H, D], a block-diagonal mask of lengths."""

    class BlockDiagonalMask:
        @staticmethod
        def from_seqlens(queries, keys):
            return list(queries), list(keys)

    fmha = SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask)

    @staticmethod
    def memory_efficient_attention(q, k, v, attn_bias=None, scale=None):
        mask = None
        if attn_bias is not None:
            groups = [torch.arange(len(x)).repeat_interleave(torch.tensor(x)) for x in attn_bias]
            mask = groups[0][:, None] == groups[1]
            assert q.shape[0] == 1 and len(groups[0]) == q.shape[1] and len(groups[1]) == k.shape[1]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)


@pytest.fixture
def xformers(monkeypatch):
    """A stand-in, for what is around the call; the package itself runs on a GPU only."""
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(ops=Xformers))
    monkeypatch.setitem(sys.modules, "xformers.ops", Xformers)
    tables = {}
    for op in ("block_sparse_attention", "window_attention"):
        tables[op] = tuple(
            dispatch.Backend(b.name, b.run, lambda call: None) if b.name == "xformers" else b
            for b in dispatch.OPERATIONS[op]
        )
        monkeypatch.setitem(dispatch.OPERATIONS, op, tables[op])


def test_xformers_is_handed_the_segments(xformers):
    blocks, n, m = lists("segments")
    q, k, v = (x.requires_grad_() for x in qkv(n, m, kv_heads=2))
    results = []
    for backend in ("xformers", "reference"):
        out = ops.block_sparse_attention(q, k, v, blocks, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_xformers_is_handed_the_windows(xformers):
    q, k, v = (torch.randn(2, 8, 12, heads, 16) for heads in (4, 2, 2))
    out = ops.window_attention(q, k, v, 4, shift=1, backend="xformers")
    torch.testing.assert_close(
        out, ops.window_attention(q, k, v, 4, shift=1, backend="reference"), rtol=1e-4, atol=1e-5
    )


GEOMETRIES = [
    ((40,), 7, {"dilation": 3}),
    ((17,), 4, {"stride": 2, "is_causal": True}),
    ((12, 13), (3, 5), {"dilation": (2, 1), "is_causal": (True, False)}),
    ((5, 6, 7), (3, 3, 2), {"dilation": (1, 2, 1), "stride": (2, 1, 1)}),
]


@pytest.mark.parametrize(("grid", "kernel_size", "options"), GEOMETRIES)
def test_flex_computes_neighborhood_attention(grid, kernel_size, options):
    q, k, v = (torch.randn(2, *grid, heads, 16) for heads in (4, 2, 2))
    options = {**options, "return_lse": True, "scale": 0.3}
    out = ops.neighborhood_attention(q, k, v, kernel_size, **options, backend="flex")
    expected = ops.neighborhood_attention(q, k, v, kernel_size, **options, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def natten(monkeypatch):
    """A stand-in with the package's arguments: the package itself needs a compiler of CUDA to be of use."""
    functions = {name: partial(getattr(ops, name), backend="reference") for name in ("na1d", "na2d", "na3d")}
    monkeypatch.setitem(sys.modules, "natten", SimpleNamespace(**functions))
    choose = lambda q, k, v, torch_compile: "flex-fna"  # noqa: E731
    monkeypatch.setitem(sys.modules, "natten.backends", SimpleNamespace(choose_backend=choose))
    monkeypatch.setattr("zoo.kernels.neighborhood.peers.natten_missing", lambda: None)


@pytest.mark.parametrize(("grid", "kernel_size", "options"), GEOMETRIES)
def test_natten_is_handed_the_neighborhoods(natten, grid, kernel_size, options):
    q, k, v = (torch.randn(2, *grid, heads, 16) for heads in (4, 2, 2))
    extra = torch.randn(2, 3, 2, 16)
    options = {**options, "extra_k": extra, "extra_v": extra, "return_lse": True, "scale": 0.3}
    out = ops.neighborhood_attention(q, k, v, kernel_size, **options, backend="natten")
    expected = ops.neighborhood_attention(q, k, v, kernel_size, **options, backend="reference")
    torch.testing.assert_close(out, expected)


def test_what_they_cannot_run_of_neighborhoods_is_told(natten, monkeypatch):
    q, k, v = torch.randn(3, 1, 9, 9, 2, 16)
    rpb, extra = torch.zeros(2, 5, 5), torch.randn(1, 3, 2, 16)

    def told(backend: str, *inputs: torch.Tensor, **options) -> str:
        with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run") as refused:
            ops.neighborhood_attention(*inputs, 3, backend=backend, **options)
        return str(refused.value)

    assert "a bias" in told("flex", q, k, v, rpb=rpb) and "a bias" in told("natten", q, k, v, rpb=rpb)
    assert "extra keys" in told("flex", q, k, v, extra_k=extra, extra_v=extra)
    assert "float64" in told("natten", q.double(), k.double(), v.double())
    assert "scale of 0" in told("natten", q, k, v, scale=0.0)
    assert "no backward pass on a CPU" in told("natten", q.clone().requires_grad_(), k, v)
    assert "LSE with a gradient" in told("natten", q.clone().requires_grad_(), k, v, return_lse=True)

    def refuse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, torch_compile: bool) -> str:
        raise NotImplementedError("no suitable backend")

    monkeypatch.setattr(sys.modules["natten.backends"], "choose_backend", refuse)
    assert "no kernel for torch.float32 heads of 16 on cpu: no suitable" in told("natten", q, k, v)
    monkeypatch.undo()
    if find_spec("natten") is None:
        assert "natten is not installed; use cpu" in told("natten", q, k, v)


def test_auto_takes_none_and_all_are_named(monkeypatch):
    rows = {(row.op, row.backend): row.reason for row in ops.backends()}
    peers_of = {
        "block_sparse_attention": ["flex", "xformers"],
        "window_attention": ["flex", "xformers"],
        "neighborhood_attention": ["flex", "natten"],
    }
    for op, names in peers_of.items():
        assert rows[op, "flex"] is None
        table = [b for b in dispatch.OPERATIONS[op] if b.only_by_name]
        assert [b.name for b in table] == names
        monkeypatch.setitem(dispatch.OPERATIONS, op, tuple(table))
    q, k, v = qkv(32)
    with pytest.raises(RuntimeError, match="no backend of block_sparse_attention can run"):
        ops.block_sparse_attention(q, k, v, BlockList.from_segments([32]))


def test_what_they_cannot_run_is_told():
    q, k, v = qkv(32)
    blocks = BlockList.from_segments([32])
    with pytest.raises(RuntimeError, match="'flex' cannot run .* float64.*use cpu or reference"):
        ops.block_sparse_attention(q.double(), k.double(), v.double(), blocks, backend="flex")
    with pytest.raises(RuntimeError, match="no backward pass on a CPU"):
        ops.block_sparse_attention(q.requires_grad_(), k, v, blocks, backend="flex")
    with torch.no_grad():
        assert ops.explain("block_sparse_attention", q, k, v, blocks, backend="flex").backend == "flex"
    cuda = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16, shape=(1, 8, 2, 64))
    why_not = lambda q, v, bias=None, lse=False: peers.xformers_why_not(q, v, bias, lse)  # noqa: E731
    assert why_not(cuda, cuda) is None
    assert "a bias" in why_not(cuda, cuda, bias=q)
    assert "LSE" in why_not(cuda, cuda, lse=True)
    assert "one width" in why_not(cuda, SimpleNamespace(shape=(1, 8, 2, 32)))
    assert "on cpu" in why_not(q, q)
    narrow = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16, shape=(1, 8, 2, 8))
    assert "less than 16 channels" in peers.flex_why_not([narrow], 8)
    assert peers.flex_why_not([cuda], 64) is None
