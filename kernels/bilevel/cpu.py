"""Bi-level routing attention on a CPU: a few regions at a time with the keys they have chosen.

Whole regions are long rows to copy, so the chosen keys of some regions are put side by side and go through
one fused attention call. Forward and backward walk the same regions and keep inputs, output and LSE only:
however many regions are chosen, memory is linear in tokens. On a small map one dense call with a mask is
faster.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.kernels.bilevel.regions import region_of, to_map, to_regions

# Measured on one core with AVX-512, 32 channels per head; `scripts/bench/ops_cpu.py` shows what they lead to.
COPIED_TOKEN = 32  # cost of copying one key and its value, in query-key products
DENSE_PRODUCTS = 1 << 16  # where a mask of this many entries for each image still costs nothing
TOKENS_AT_ONCE = 32768  # chosen keys held at once; fewer are slower

# SDPA's own kernel, named because it gives the LSE and takes its backward pass apart from autograd.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def bilevel_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    regions: tuple[int, int],
    scale: float,
    route_weights: Tensor | None,
    *,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the output [B, Y, X, Hq, Dv] and, where asked for, the natural-log LSE [B, Y, X, Hq]."""
    width, shared = v.shape[-1], q.shape[3] // k.shape[3]
    wide = max(width, q.shape[-1])  # the fused call wants keys and values of one width
    q, k, v = (F.pad(x, (0, wide - x.shape[-1])) if x.shape[-1] < wide else x for x in (q, k, v))
    if shared > 1:
        k, v = (x.repeat_interleave(shared, 3) for x in (k, v))
    if _is_dense(q, k, routes, route_weights, return_lse):
        out = _dense(q, k, v, routes, regions, scale)
        # A mask multiplies unseen values by zero, which NaN and infinity survive; gathering never sees them.
        if _all_finite(out):
            return out[..., :width], None
    out, lse = _gathered(q, k, v, routes, regions, scale, route_weights, return_lse)
    return out[..., :width], lse


def describe(q: Tensor, k: Tensor, routes: Tensor, route_weights: Tensor | None, return_lse: bool) -> str:
    """How a call would be computed, in words."""
    if _is_dense(q, k, routes, route_weights, return_lse):
        return "one dense attention with a mask"
    keys = _chosen_keys(k, routes)
    some = routes.shape[1] if route_weights is not None else max(1, TOKENS_AT_ONCE // keys)
    return f"{some} regions at once with {keys} keys each"


def _is_dense(q: Tensor, k: Tensor, routes: Tensor, route_weights: Tensor | None, return_lse: bool) -> bool:
    """Whether every query against every key is possible and less work than gathering."""
    if return_lse or route_weights is not None:
        return False
    queries, keys, chosen = q.shape[1] * q.shape[2], k.shape[1] * k.shape[2], _chosen_keys(k, routes)
    gathering = chosen * (queries + COPIED_TOKEN * routes.shape[1])
    return queries * keys <= min(DENSE_PRODUCTS, gathering)


def _chosen_keys(k: Tensor, routes: Tensor) -> int:
    """How many keys a query sees."""
    return routes.shape[2] * k.shape[1] * k.shape[2] // routes.shape[1]


def _dense(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: tuple[int, int], scale: float) -> Tensor:
    """Every query against every key, those of regions not chosen behind a mask."""
    parts, grid = routes.shape[1], q.shape[1:3]
    # How often a region was chosen, as a bias: log 0 hides it, and one chosen twice counts twice.
    chosen = torch.zeros(routes.shape[0], parts, parts, dtype=torch.promote_types(q.dtype, torch.float32))
    bias = chosen.scatter_add(2, routes, torch.ones((), dtype=chosen.dtype).expand(routes.shape)).log()
    bias = bias.index_select(1, region_of(regions, grid, q.device))
    bias = bias.index_select(2, region_of(regions, k.shape[1:3], q.device))
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None], scale=scale)
    return out.transpose(1, 2).unflatten(1, grid)


def _gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    regions: tuple[int, int],
    scale: float,
    route_weights: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Every region against the regions it has chosen, and no others."""
    batch, parts, _ = routes.shape
    grid = q.shape[1:3]
    q, k, v = (to_regions(x, regions).flatten(0, 1) for x in (q, k, v))  # [B * p, tokens, H, D]
    rows = (routes + parts * torch.arange(batch)[:, None, None]).flatten(0, 1)
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if traced or route_weights is not None:
        weights = None if route_weights is None else route_weights.to(q.dtype).flatten(0, 1)
        out, lse = _all_at_once(q, k, v, rows, weights, scale, return_lse)
    else:
        out, lse = _Regions.apply(q, k, v, rows, scale)
    out = to_map(out.unflatten(0, (batch, parts)), regions, grid)
    return out, to_map(lse.unflatten(0, (batch, parts)), regions, grid) if return_lse else None


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Regions [p, tokens, H, D] side by side as `rows` [P, topk] lists them: [P, topk, tokens, H, D]."""
    return x.flatten(1).index_select(0, rows.flatten()).unflatten(1, x.shape[1:]).unflatten(0, rows.shape)


def _heads_first(x: Tensor) -> Tensor:
    """[P, ..., tokens, H, D] to [P, H, all tokens, D]."""
    return x.flatten(1, -3).transpose(1, 2)


def _all_at_once(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, weights: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """What `_Regions` does, in operations that a tracer and autograd understand; copies `topk` times k, v."""
    k, v = _take(k, rows), _take(v, rows)
    if weights is not None:
        k, v = (x * weights[..., None, None, None] for x in (k, v))
    q, k, v = (_heads_first(x) for x in (q, k, v))
    if not return_lse:
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2), None
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = scale * (q.to(dtype) @ k.to(dtype).transpose(-1, -2))
    out = (logits.softmax(dim=-1) @ v.to(dtype)).to(q.dtype)
    return out.transpose(1, 2), logits.logsumexp(dim=-1).transpose(1, 2)


class _Regions(torch.autograd.Function):
    """Attention of regions [P, tokens, H, D] to the regions in `rows`: output, and LSE [P, tokens, H]."""

    @staticmethod
    def forward(ctx, q, k, v, rows, scale):  # noqa: ANN001, ANN205
        done = []
        for part in _parts(rows, k):
            some = (q[part], _take(k, rows[part]), _take(v, rows[part]))
            done.append(_flash(*map(_heads_first, some), scale=scale))
        out, lse = (_cat([some.transpose(1, 2) for some in parts]) for parts in zip(*done, strict=True))
        ctx.save_for_backward(q, k, v, rows, out, lse)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):  # noqa: ANN001, ANN205
        q, k, v, rows, out, lse = ctx.saved_tensors
        width = q.shape[-1]
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        if grad_lse is not None:
            # The kernel subtracts the row sums of grad_out * out from the logits' gradient; grad_lse must be
            # added to it. One more channel does: nothing in q, k and v, 1 in grad_out, -grad_lse in out.
            q, k, v = (F.pad(x, (0, 1)) for x in (q, k, v))
            grad_out = F.pad(grad_out, (0, 1), value=1.0)
            out = torch.cat([out, -grad_lse[..., None].to(out.dtype)], dim=-1)
        grad_q, grad_k, grad_v = [], k.new_zeros(k.shape), v.new_zeros(v.shape)
        for part in _parts(rows, k):
            some = (grad_out[part], q[part], _take(k, rows[part]), _take(v, rows[part]), out[part])
            some_lse = lse[part].transpose(1, 2)
            grads = _flash_backward(*map(_heads_first, some), some_lse, 0.0, False, scale=ctx.scale)
            grad_q.append(grads[0].transpose(1, 2))
            for whole, grad in zip((grad_k.flatten(1), grad_v.flatten(1)), grads[1:], strict=True):
                grad = grad.transpose(1, 2).reshape(-1, whole.shape[1])  # [P * topk, tokens * H * D]
                whole.index_add_(0, rows[part].flatten(), grad)
        return *(x[..., :width] for x in (_cat(grad_q), grad_k, grad_v)), None, None


def _parts(rows: Tensor, k: Tensor) -> list[slice]:
    """Regions that are taken together."""
    some = max(1, TOKENS_AT_ONCE // (rows.shape[1] * k.shape[1]))
    return [slice(start, start + some) for start in range(0, max(1, len(rows)), some)]


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _all_finite(x: Tensor) -> bool:
    """Whether `x` holds no NaN or infinity; where a tracer hides the values, they count as finite."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or type(x) is not Tensor:
        return True
    return bool(x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32)).isfinite())
