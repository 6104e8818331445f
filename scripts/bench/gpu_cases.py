"""What gpu_suite.py checks and times: shapes, their work, their peers, the goals.

A case is a function from a `Maker` and sizes to a `Problem`; small sizes for the comparison with float64, one
large size for the clock. Nothing here needs more than the kernels and torch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from published import gather_regions
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo import ops

Leaves = dict[str, Tensor]
Peer = Callable[[Leaves], Tensor]


@dataclass(frozen=True)
class Maker:
    """Makes the tensors of a problem; without values where kernels are only compiled."""

    device: torch.device
    dtype: torch.dtype
    empty: bool = False

    def leaf(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Return a tensor that wants a gradient, normal numbers times `scale`."""
        dtype = dtype or self.dtype
        if self.empty:
            return torch.empty(shape, device=self.device, dtype=dtype, requires_grad=True)
        x = torch.randn(shape, device=self.device, dtype=torch.float32) * scale
        return x.to(dtype).requires_grad_()

    def qkv(self, *shape: int) -> Leaves:
        """Return queries, keys and values of one shape."""
        return {name: self.leaf(*shape) for name in "qkv"}


@dataclass
class Problem:
    """One problem: what it is made of, who computes it, and what that takes at least (forward)."""

    leaves: Leaves
    run: Callable[[Leaves, str], Any]  # with a backend; an output, or an output and its LSE
    peers: dict[str, Peer] = field(default_factory=dict)
    flops: float = 0.0  # of matrix products
    moved: float = 0.0  # bytes: inputs and output once
    exps: float = 0.0


@dataclass(frozen=True)
class Goal:
    """Ours is at least `ratio` times as fast as the peer."""

    what: str  # forward or training
    peer: str
    ratio: float


@dataclass(frozen=True)
class Case:
    """An operation at some size; `small` sizes are compared with float64, `large` is timed."""

    name: str
    op: str
    build: Callable[..., Problem]
    small: tuple[dict[str, Any], ...]
    large: dict[str, Any]
    goals: tuple[Goal, ...] = ()
    tuned: bool = False  # the template's tile sizes are tried on it
    rounds: int = 0  # how often a 16-bit kernel rounds what the definition keeps


# Peers ------------------------------------------------------------------------------------------------------


def fused(which: SDPBackend | None) -> Peer:
    """Dense attention by PyTorch, its choice or one named."""

    def run(x: Leaves) -> Tensor:
        q, k, v = (x[name].flatten(1, -3).transpose(1, 2) for name in "qkv")
        with nullcontext() if which is None else sdpa_kernel(which):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return run


DENSE = {
    "sdpa cudnn": fused(SDPBackend.CUDNN_ATTENTION),
    "sdpa flash": fused(SDPBackend.FLASH_ATTENTION),
}


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Every case has its own, forward and training; behind eight, PyTorch would compute all pairs of tokens.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False)


def flex(allowed: Callable[..., Tensor] | None, size: int = 128) -> Peer:
    """flex_attention, compiled; `allowed(b, h, q, k)` is its mask. The block mask is made once."""
    masks: dict[torch.device, Any] = {}

    def run(x: Leaves) -> Tensor:
        q, k, v = (x[name].flatten(1, -3).transpose(1, 2) for name in "qkv")
        if allowed is not None and q.device not in masks:
            from torch.nn.attention.flex_attention import create_block_mask

            tokens = q.shape[2], k.shape[2]
            masks[q.device] = create_block_mask(
                allowed, None, None, *tokens, q.device, BLOCK_SIZE=size, _compile=True
            )
        return _compiled_flex()(q, k, v, block_mask=masks.get(q.device)).transpose(1, 2)

    return run


def by_backend(problem: Problem, backend: str) -> Peer:
    """Our operation by another of its backends."""
    return lambda x: problem.run(x, backend)


def compiled(peer: Peer) -> Peer:
    """The same through torch.compile."""
    return torch.compile(peer, dynamic=False)


def installed(name: str) -> Any | None:
    """An optional package, None where it is not installed or does not load."""
    if find_spec(name.partition(".")[0]) is None:
        return None
    try:
        return import_module(name)
    except Exception:  # built for another CUDA, as a rule
        return None


# Cases ------------------------------------------------------------------------------------------------------


def _size(*tensors: Tensor) -> float:
    return float(sum(x.numel() * x.element_size() for x in tensors))


def _attention(x: Leaves, pairs: float, **options: Any) -> dict[str, Any]:
    """The work of attention over so many pairs of a query and a key, of all images and heads."""
    width = x["q"].shape[-1]
    return {
        "flops": 4.0 * pairs * width,
        "moved": _size(*x.values()) + _size(x["q"]),
        "exps": pairs,
        **options,
    }


def dense(make: Maker, batch: int, tokens: int, heads: int, width: int) -> Problem:
    """Every token sees every token."""
    x = make.qkv(batch, tokens, heads, width)
    count = -(-tokens // 128)
    blocks = ops.BlockList.from_mask(torch.ones(count, count, dtype=torch.bool)).to(make.device)
    return Problem(
        x,
        lambda x, backend: ops.block_sparse_attention(**x, blocks=blocks, return_lse=True, backend=backend),
        {**DENSE, "flex": flex(None)},
        **_attention(x, batch * heads * tokens**2),
    )


def text(make: Maker, batch: int, tokens: int, words: int, heads: int, width: int) -> Problem:
    """Tokens that read a text, the last third of which is padding."""
    x = {"q": make.leaf(batch, tokens, heads, width)}
    x |= {name: make.leaf(batch, words, heads, width) for name in "kv"}
    seen = (torch.arange(words) < words - words // 3).expand(batch, -1).to(make.device)
    return Problem(
        x,
        lambda x, backend: ops.attention(**x, key_mask=seen, return_lse=True, backend=backend),
        {"sdpa": lambda x: ops.attention(**x, key_mask=seen, backend="sdpa")},
        **_attention(x, batch * heads * tokens * words),
    )


def block_lists(make: Maker, tokens: int, heads: int, width: int, keep: float) -> Problem:
    """A random share of the pairs of blocks, the diagonal among them."""
    count = -(-tokens // 128)
    mask = torch.rand(count, count, generator=torch.Generator().manual_seed(0)) < keep
    mask |= torch.eye(count, dtype=torch.bool)
    blocks, seen = ops.BlockList.from_mask(mask).to(make.device), mask.to(make.device)
    x = make.qkv(1, tokens, heads, width)
    return Problem(
        x,
        lambda x, backend: ops.block_sparse_attention(**x, blocks=blocks, return_lse=True, backend=backend),
        {**DENSE, "flex": flex(lambda b, h, i, j: seen[i // 128, j // 128])},
        **_attention(x, heads * tokens**2 * blocks.keep),
    )


def segments(make: Maker, lengths: tuple[int, ...], heads: int, width: int) -> Problem:
    """Ragged groups of one sequence, each attends inside itself."""
    x = make.qkv(1, sum(lengths), heads, width)
    blocks = ops.BlockList.from_segments(lengths, device=make.device)
    group = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(make.device)
    peers = {"flex": flex(lambda b, h, i, j: group[i] == group[j])}
    if xformers := installed("xformers.ops"):
        bias = xformers.fmha.BlockDiagonalMask.from_seqlens(list(lengths))
        peers["xformers"] = lambda x: xformers.memory_efficient_attention(*x.values(), attn_bias=bias)
    return Problem(
        x,
        lambda x, backend: ops.block_sparse_attention(**x, blocks=blocks, return_lse=True, backend=backend),
        peers,
        **_attention(x, heads * sum(n * n for n in lengths)),
    )


def near(
    make: Maker,
    batch: int,
    grid: tuple[int, ...],
    heads: int,
    width: int,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    rpb: bool = False,
    tile: tuple[int, int] | None = None,
) -> Problem:
    """Neighborhoods; `tile` lays flex's tokens out in boxes, which costs it nothing here."""
    x = make.qkv(batch, *grid, heads, width)
    if rpb:
        x["rpb"] = make.leaf(heads, *(2 * kernel_size - 1 for _ in grid), dtype=torch.float32)
    options = {"dilation": dilation, "stride": stride, "return_lse": True}
    peers = dict(DENSE)
    if len(grid) == 2 and dilation == 1 and not rpb:
        name = "flex" if tile is None else "flex in tiles"
        peers[name] = flex(partial(_near_2d, grid, kernel_size, stride, tile or (1, grid[1])))
    if not rpb and (natten := installed("natten")):
        function = getattr(natten, f"na{len(grid)}d")
        peers["natten"] = lambda x: function(*x.values(), kernel_size, stride=stride, dilation=dilation)
    return Problem(
        x,
        lambda x, backend: ops.neighborhood_attention(
            x["q"], x["k"], x["v"], kernel_size, rpb=x.get("rpb"), **options, backend=backend
        ),
        peers,
        **_attention(x, batch * heads * prod(grid) * kernel_size ** len(grid)),
    )


def _near_2d(
    grid: tuple[int, int],
    kernel_size: int,
    stride: int,
    tile: tuple[int, int],
    b: Tensor,
    h: Tensor,
    i: Tensor,
    j: Tensor,
) -> Tensor:
    """flex_attention's mask of a neighborhood whose tokens lie tile by tile."""
    rows, columns = tile
    across = grid[1] // columns

    def place(n: Tensor) -> tuple[Tensor, Tensor]:
        box, inside = n // (rows * columns), n % (rows * columns)
        return box // across * rows + inside // columns, box % across * columns + inside % columns

    seen = None
    for query, key, length in zip(place(i), place(j), grid, strict=True):
        leader = (query // stride * stride + stride // 2).clamp(max=length - 1)
        first = (leader - kernel_size // 2).clamp(min=0, max=length - kernel_size)
        on_axis = (key >= first) & (key < first + kernel_size)
        seen = on_axis if seen is None else seen & on_axis
    return seen


def windows(make: Maker, batch: int, side: int, heads: int, width: int, size: int, shift: int = 0) -> Problem:
    """Windows with a bias."""
    x = make.qkv(batch, side, side, heads, width)
    x["bias"] = make.leaf(heads, size**2, size**2, dtype=torch.float32)
    problem = Problem(
        x,
        lambda x, backend: ops.window_attention(
            x["q"], x["k"], x["v"], size, shift=shift, bias=x["bias"], backend=backend
        ),
        **_attention(x, batch * heads * side**2 * size**2),
    )
    problem.peers["sdpa"] = by_backend(problem, "sdpa")
    return problem


def routed(make: Maker, batch: int, side: int, heads: int, topk: int, width: int = 32) -> Problem:
    """Regions that a region was routed to, 7 x 7 of them."""
    parts = 49
    x = make.qkv(batch, side, side, heads, width)
    generator = torch.Generator().manual_seed(0)
    routes = torch.rand(batch, parts, parts, generator=generator).argsort(-1)[..., :topk].to(make.device)

    def gather(x: Leaves) -> Tensor:
        return gather_regions(x["q"], x["k"], x["v"], routes, 7)

    return Problem(
        x,
        lambda x, backend: ops.bilevel_routing_attention(
            x["q"], x["k"], x["v"], routes, 7, return_lse=True, backend=backend
        ),
        {"published": gather, "published, compiled": compiled(gather)},
        **_attention(x, batch * heads * side**2 * topk * side**2 / parts),
    )


def channels(make: Maker, batch: int, tokens: int, heads: int, width: int) -> Problem:
    """Every channel of a head sees every channel of it."""
    x = make.qkv(batch, tokens, heads, width)
    problem = Problem(
        x,
        lambda x, backend: ops.channel_attention(**x, scale=tokens**-0.5, backend=backend),
        flops=4.0 * batch * tokens * heads * width**2,
        moved=4.0 * _size(x["q"]),
        exps=float(batch * heads * width**2),
    )
    problem.peers["published, compiled"] = compiled(by_backend(problem, "reference"))
    return problem


def agents(make: Maker, batch: int, tokens: int, heads: int, width: int, count: int) -> Problem:
    """Attention through agents, with both biases."""
    x = make.qkv(batch, tokens, heads, width)
    x["agents"] = make.leaf(batch, count, heads, width)
    x["bias_in"] = make.leaf(heads, count, tokens, dtype=torch.float32)
    x["bias_out"] = make.leaf(heads, tokens, count, dtype=torch.float32)
    problem = Problem(
        x,
        lambda x, backend: ops.agent_attention(**x, backend=backend),
        **_attention(x, 2.0 * batch * heads * tokens * count),
    )
    problem.peers["sdpa"] = by_backend(problem, "sdpa")
    problem.peers["published"] = by_backend(problem, "reference")
    return problem


def deformable(make: Maker, batch: int, side: int, heads: int, width: int, keys: int, groups: int) -> Problem:
    """Attention to sampled keys with a bias read between the entries of a table."""
    x = {
        "q": make.leaf(batch, side, side, heads, width),
        "k": make.leaf(batch, keys, heads, width),
        "v": make.leaf(batch, keys, heads, width),
        "positions": make.leaf(batch, groups, keys, 2, dtype=torch.float32, scale=0.4),
        "table": make.leaf(heads, 2 * side - 1, 2 * side - 1, dtype=torch.float32),
    }
    problem = Problem(
        x,
        lambda x, backend: ops.deformable_attention(**x, backend=backend),
        **_attention(x, batch * heads * side**2 * keys),
    )
    problem.peers["published"] = by_backend(problem, "reference")
    problem.peers["published, compiled"] = compiled(problem.peers["published"])
    return problem


def sampled(make: Maker, batch: int, side: int, channels: int, points: int, groups: int) -> Problem:
    """A map read between its tokens."""
    x = {
        "x": make.leaf(batch, side, side, channels),
        "positions": make.leaf(batch, groups, points, 2, dtype=torch.float32, scale=0.4),
    }
    problem = Problem(
        x,
        lambda x, backend: ops.deformable_sample(**x, backend=backend),
        moved=5.0 * batch * points * channels * x["x"].element_size(),
    )
    problem.peers["published"] = by_backend(problem, "reference")
    return problem


def aligned(make: Maker, side: int, text: int, heads: int, width: int) -> Problem:
    """An image and its text seen densely, and one condition token at the query's own place beside them."""
    x = make.qkv(1, side**2 + text, heads, width)
    x["own_k"], x["own_v"] = make.leaf(1, side, side, heads, width), make.leaf(1, side, side, heads, width)
    count = -(-(side**2 + text) // 128)
    blocks = ops.BlockList.from_mask(torch.ones(count, count, dtype=torch.bool)).to(make.device)

    def without(x: Leaves, backend: str) -> tuple[Tensor, Tensor]:
        return ops.block_sparse_attention(x["q"], x["k"], x["v"], blocks, return_lse=True, backend=backend)

    def run(x: Leaves, backend: str) -> tuple[Tensor, Tensor]:
        out, lse = without(x, backend)
        image = x["q"][:, : side**2].unflatten(1, (side, side))
        near, near_lse = ops.aligned_attention(
            image, x["own_k"], x["own_v"], return_lse=True, backend=backend
        )
        both, lse_of_both = ops.merge_attentions(
            (out[:, : side**2], near.flatten(1, 2)), (lse[:, : side**2], near_lse.flatten(1, 2))
        )
        return torch.cat((both, out[:, side**2 :]), 1), torch.cat((lse_of_both, lse[:, side**2 :]), 1)

    return Problem(
        x,
        run,
        {"without the aligned keys": lambda x: without(x, "triton")},
        **_attention(x, heads * ((side**2 + text) ** 2 + side**2)),
    )


def modulated(make: Maker, batch: int, tokens: int, channels: int, norm: str = "layer") -> Problem:
    """A norm that every image scales and shifts."""
    x = {
        "x": make.leaf(batch, tokens, channels),
        "scale": make.leaf(batch, 1, channels),
        "shift": make.leaf(batch, 1, channels),
    }
    layer = {"layer": F.layer_norm, "rms": F.rms_norm}[norm]

    def layers(x: Leaves) -> Tensor:
        return layer(x["x"], (channels,), eps=1e-6) * (1 + x["scale"]) + x["shift"]

    return Problem(
        x,
        lambda x, backend: ops.modulated_norm(**x, norm=norm, backend=backend),
        {"layers": layers, "layers, compiled": compiled(layers)},
        moved=2.0 * _size(x["x"]),
    )


def gated(make: Maker, batch: int, tokens: int, channels: int) -> Problem:
    """A residual behind a gate."""
    x = {
        "x": make.leaf(batch, tokens, channels),
        "y": make.leaf(batch, tokens, channels),
        "gate": make.leaf(batch, 1, channels),
    }

    def layers(x: Leaves) -> Tensor:
        return x["x"] + x["gate"] * x["y"]

    return Problem(
        x,
        lambda x, backend: ops.gated_residual(**x, backend=backend),
        {"layers": layers, "layers, compiled": compiled(layers)},
        moved=3.0 * _size(x["x"]),
    )


def rotary(make: Maker, batch: int, tokens: int, heads: int, width: int) -> Problem:
    """Norm and rotary positions of heads."""
    x = {"x": make.leaf(batch, tokens, heads, width), "weight": make.leaf(width)}
    angles = torch.linspace(0, 50, tokens * width // 2, device=make.device).view(tokens, -1)
    cos, sin = angles.cos(), angles.sin()

    def layers(x: Leaves) -> Tensor:
        normed = F.rms_norm(x["x"], (width,), x["weight"], 1e-6)
        one, other = normed.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = (one * cos[:, None] - other * sin[:, None], one * sin[:, None] + other * cos[:, None])
        return torch.stack(turned, -1).flatten(-2).type_as(normed)

    return Problem(
        x,
        lambda x, backend: ops.rotary_norm(**x, cos=cos, sin=sin, backend=backend),
        {"layers": layers, "layers, compiled": compiled(layers)},
        moved=2.0 * _size(x["x"]) + _size(cos, sin),
    )


def _both(peer: str, forward: float, training: float) -> tuple[Goal, Goal]:
    return Goal("forward", peer, forward), Goal("training", peer, training)


SPARSE, NEAR = "block_sparse_attention", "neighborhood_attention"
SMALL_LISTS = (
    {"tokens": 512, "heads": 2, "width": 64, "keep": 0.3},
    {"tokens": 300, "heads": 2, "width": 80, "keep": 0.5},
)
SMALL_NEAR = (
    {"batch": 2, "grid": (14, 19), "heads": 2, "width": 32, "kernel_size": 7, "rpb": True},
    {"batch": 1, "grid": (16, 16), "heads": 2, "width": 48, "kernel_size": 5, "stride": 2, "dilation": 2},
    {"batch": 1, "grid": (6, 8, 9), "heads": 2, "width": 64, "kernel_size": 3},
    {"batch": 1, "grid": (257,), "heads": 2, "width": 128, "kernel_size": 33},
)
FLUX = {"batch": 1, "grid": (256, 256), "heads": 24, "width": 128, "kernel_size": 80, "tile": (16, 8)}
ROUTED = (
    *_both("published", 4.0, 4.0),
    *_both("published, compiled", 2.5, 2.5),
)
CASES = [
    Case(
        "dense, 16k tokens, 16 heads of 128", SPARSE, dense,
        (
            {"batch": 2, "tokens": 257, "heads": 2, "width": 64},
            {"batch": 1, "tokens": 97, "heads": 2, "width": 33},
        ),
        {"batch": 1, "tokens": 16384, "heads": 16, "width": 128},
        (*_both("sdpa cudnn", 0.75, 0.60), *_both("flex", 1.05, 1.0)), tuned=True,
    ),
    Case(
        "a padded text of 512 tokens read by 4096, 24 heads of 128, batch 4", "attention", text,
        (
            {"batch": 2, "tokens": 97, "words": 33, "heads": 2, "width": 64},
            {"batch": 1, "tokens": 17, "words": 257, "heads": 2, "width": 33},
        ),
        {"batch": 4, "tokens": 4096, "words": 512, "heads": 24, "width": 128},
    ),
    Case(
        "neighborhood 56x56, kernel 7, 2 heads of 32, batch 128", NEAR, near, SMALL_NEAR,
        {"batch": 128, "grid": (56, 56), "heads": 2, "width": 32, "kernel_size": 7},
        (*_both("flex", 3.0, 2.5), Goal("forward", "sdpa flash", 6.0)), tuned=True,
    ),
    Case(
        "neighborhood 56x56 with bias, kernel 7, 2 heads of 32, batch 128", NEAR, near, (),
        {"batch": 128, "grid": (56, 56), "heads": 2, "width": 32, "kernel_size": 7, "rpb": True}, tuned=True,
    ),
    Case(
        "neighborhood 256x256, kernel 80, 24 heads of 128", NEAR, near, (), FLUX,
        (*_both("sdpa cudnn", 5.0, 3.0), Goal("forward", "flex in tiles", 1.2)), tuned=True,
    ),
    Case(
        "neighborhood 256x256, kernel 80, stride 16, 24 heads of 128", NEAR, near, (),
        {**FLUX, "stride": 16}, _both("sdpa cudnn", 8.5, 5.0),
    ),
    Case(
        "a quarter of the blocks, 32k tokens, 24 heads of 128", SPARSE, block_lists, SMALL_LISTS,
        {"tokens": 32768, "heads": 24, "width": 128, "keep": 0.25},
        (*_both("sdpa cudnn", 3.0, 2.4), *_both("flex", 1.1, 1.0)), tuned=True,
    ),
    Case(
        "a tenth of the blocks, 32k tokens, 24 heads of 128", SPARSE, block_lists, (),
        {"tokens": 32768, "heads": 24, "width": 128, "keep": 0.1},
        (*_both("sdpa cudnn", 7.0, 6.0), *_both("flex", 1.1, 1.0)),
    ),
    Case(
        "segments of 900 to 1300 tokens, 16 heads of 128", SPARSE, segments,
        ({"lengths": (5, 0, 70, 130, 1), "heads": 2, "width": 64},),
        {"lengths": tuple(900 + 50 * (n % 9) for n in range(15)), "heads": 16, "width": 128},
    ),
    Case(
        "windows of 7x7 with bias, 56x56, 3 heads of 32, batch 128", "window_attention", windows,
        (
            {"batch": 2, "side": 14, "heads": 2, "width": 32, "size": 7, "shift": 3},
            {"batch": 1, "side": 12, "heads": 2, "width": 59, "size": 4},
        ),
        {"batch": 128, "side": 56, "heads": 3, "width": 32, "size": 7}, _both("sdpa", 2.0, 2.0),
    ),
    *(
        Case(
            f"{topk} of 49 regions, {side}x{side}, {heads} heads of 32, batch 128",
            "bilevel_routing_attention", routed,
            ({"batch": 2, "side": 14, "heads": 2, "topk": 3, "width": 33},) if topk == 1 else (),
            {"batch": 128, "side": side, "heads": heads, "topk": topk}, ROUTED,
        )
        for side, heads, topk in ((56, 3, 1), (28, 6, 4), (14, 12, 16))
    ),
    Case(
        "channels, 56x56 tokens, 3 heads of 32, batch 128", "channel_attention", channels,
        (
            {"batch": 2, "tokens": 97, "heads": 2, "width": 32},
            {"batch": 1, "tokens": 17, "heads": 2, "width": 12},
        ),
        {"batch": 128, "tokens": 3136, "heads": 3, "width": 32}, _both("published, compiled", 2.0, 1.8),
    ),
    Case(
        "49 agents, 56x56 tokens, 3 heads of 32, batch 128", "agent_attention", agents,
        ({"batch": 2, "tokens": 97, "heads": 2, "width": 32, "count": 9},),
        {"batch": 128, "tokens": 3136, "heads": 3, "width": 32, "count": 49},
        (Goal("forward", "sdpa", 1.8), Goal("training", "published", 1.8)),
        rounds=1,  # what the agents gather, between the two passes
    ),
    Case(
        "49 sampled keys, 56x56, 3 heads of 32, batch 128", "deformable_attention", deformable,
        ({"batch": 2, "side": 9, "heads": 2, "width": 32, "keys": 5, "groups": 1},),
        {"batch": 128, "side": 56, "heads": 3, "width": 32, "keys": 49, "groups": 3},
        (Goal("forward", "published", 4.0), Goal("forward", "published, compiled", 2.0),
         Goal("training", "published", 2.5)),
    ),
    Case(
        "49 samples of 96 channels, 56x56, batch 128", "deformable_sample", sampled,
        ({"batch": 2, "side": 9, "channels": 24, "points": 7, "groups": 2},),
        {"batch": 128, "side": 56, "channels": 96, "points": 49, "groups": 3},
    ),
    Case(
        "one aligned key beside 1536 tokens, 24 heads of 128", "aligned_attention", aligned,
        ({"side": 8, "text": 33, "heads": 2, "width": 64},),
        {"side": 32, "text": 512, "heads": 24, "width": 128},
        _both("without the aligned keys", 1 / 1.08, 1 / 1.15),
    ),
    Case(
        "modulated norm, 4096 tokens of 3072 channels, batch 4", "modulated_norm", modulated,
        (
            {"batch": 2, "tokens": 97, "channels": 1152},
            {"batch": 1, "tokens": 17, "channels": 111, "norm": "rms"},
        ),
        {"batch": 4, "tokens": 4096, "channels": 3072},
    ),
    Case(
        "gated residual, 4096 tokens of 3072 channels, batch 4", "gated_residual", gated,
        ({"batch": 2, "tokens": 97, "channels": 1152}, {"batch": 1, "tokens": 17, "channels": 111}),
        {"batch": 4, "tokens": 4096, "channels": 3072},
    ),
    Case(
        "norm and rotary positions, 4096 tokens, 24 heads of 128, batch 4", "rotary_norm", rotary,
        (
            {"batch": 2, "tokens": 97, "heads": 3, "width": 64},
            {"batch": 1, "tokens": 17, "heads": 2, "width": 80},
        ),
        {"batch": 4, "tokens": 4096, "heads": 24, "width": 128},
    ),
]  # fmt: skip
