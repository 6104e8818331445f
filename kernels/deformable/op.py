"""Deformable sampling and attention: check the arguments, choose a backend, compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.kernels import dispatch, tile
from zoo.kernels.checks import beside, broadcasts, floating, same_kind, scale_or_default, without_autocast
from zoo.kernels.deformable import cpu, reference, schema

SAMPLE, ATTENTION = "deformable_sample", "deformable_attention"
QUERY_GRIDS = ("corners", "centres")


@dataclass(frozen=True)
class SampleCall:
    """A checked call of the sampling."""

    x: Tensor
    positions: Tensor


@dataclass(frozen=True)
class AttentionCall:
    """A checked call of the attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor | None
    table: Tensor | None
    query_grid: str
    bias: Tensor | None
    scale: float
    return_lse: bool


def deformable_sample(x: Tensor, positions: Tensor, *, backend: str = "auto") -> Tensor:
    """Read a token map between its tokens, each group of channels at positions of its own.

    Shapes: x [B, Y, X, C]; positions [B, G, N, 2], G a divisor of C. Group g is the g-th run of C / G
        channels. Returns [B, N, C].
    Units: positions are (row, column), -1 at the first token of an axis and 1 at the last. Beyond the map
        there are zeros, faded in over one token.
    Numerics: positions and interpolation in at least float32, result in x's dtype.
    Raises: ValueError for arguments that do not fit each other; RuntimeError when a named backend cannot run
        the call.
    Source: Xia et al. 2022 (arXiv:2201.00520) Sec. 3.2, Eq. 4.
    """
    call = _check_sample(x, positions)
    chosen, _ = dispatch.resolve(SAMPLE, backend, call)
    with without_autocast(x):
        return chosen.run(call).to(x.dtype)


def deformable_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None = None,
    table: Tensor | None = None,
    *,
    query_grid: str = "corners",
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every token of a map to sampled keys, with a bias that follows where they were sampled.

    The bias of a query and a key is the table read between its entries at half of query minus key, -1 to 1
    from its first entry to its last; [H, 2Y - 1, 2X - 1] has an entry for every whole displacement.

    Shapes: q [B, Y, X, H, D], k [B, N, Hkv, D], v [B, N, Hkv, Dv]; query head h reads key head
        h // (H // Hkv). positions [B, G, N, 2], G a divisor of H, head h belongs to group h // (H // G).
        table [H, any, any]. bias, added as it is, broadcasts to [B, H, Y * X, N]. Returns [B, Y, X, H, Dv]
        and, with `return_lse`, the natural-log LSE [B, Y, X, H].
    Units: positions as in `deformable_sample`. The tokens of the query map lie between -1 and 1 as
        `query_grid` says: "corners" from the first at -1 to the last at 1 (a single one at 0), "centres" at
        (2i + 1) / length - 1. scale multiplies q.k and is D**-0.5 by default.
    Numerics: bias, logits and softmax in at least float32, result in q's dtype.
    Raises: ValueError for arguments that do not fit each other; RuntimeError when a named backend cannot run
        the call.
    Source: Xia et al. 2022 (arXiv:2201.00520) Sec. 3.2, Eq. 5-9; "corners": Xia et al. 2023
        (arXiv:2309.01430).
    """
    call = _check_attention(
        q, k, v, positions, table, query_grid=query_grid, bias=bias, scale=scale, return_lse=return_lse
    )
    chosen, _ = dispatch.resolve(ATTENTION, backend, call)
    with without_autocast(q):
        out, lse = chosen.run(call)
    out = out.to(call.q.dtype)
    return (out, lse) if return_lse else out


def explain_sample(x: Tensor, positions: Tensor, *, backend: str = "auto") -> dispatch.Explanation:
    """Say which backend `deformable_sample` with these arguments would use, and why."""
    chosen, reason = dispatch.resolve(SAMPLE, backend, _check_sample(x, positions))
    return dispatch.Explanation(SAMPLE, chosen.name, "", reason)


def explain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None = None,
    table: Tensor | None = None,
    *,
    backend: str = "auto",
    **options: Any,
) -> dispatch.Explanation:
    """Say which backend `deformable_attention` with these arguments would use, how, and why."""
    call = _check_attention(q, k, v, positions, table, **options)
    chosen, reason = dispatch.resolve(ATTENTION, backend, call)
    return dispatch.Explanation(ATTENTION, chosen.name, chosen.configuration(call), reason)


def _check_sample(x: Tensor, positions: Tensor) -> SampleCall:
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must be [B, Y, X, C] with at least one token, found shape {tuple(x.shape)}")
    _check_positions(positions, x.shape[0], None, x.shape[-1], "channels")
    floating("x", x)
    beside("positions", positions, "x", x)
    return SampleCall(x, positions)


def _check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None = None,
    table: Tensor | None = None,
    *,
    query_grid: str = "corners",
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> AttentionCall:
    if q.ndim != 5 or 0 in q.shape[1:]:
        raise ValueError(f"q must be [B, Y, X, H, D] with no empty axis but B, found shape {tuple(q.shape)}")
    batch, rows, columns, heads, width = q.shape
    if k.ndim != 4 or k.shape[0] != batch or k.shape[-1] != width or k.shape[1] == 0:
        raise ValueError(
            f"k must be [B, N, Hkv, D] with q's batch {batch} and width {width} and at least one key, "
            f"found shape {tuple(k.shape)}"
        )
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"v must have k's batch, keys and heads {tuple(k.shape[:-1])}, found {tuple(v.shape)}"
        )
    keys, kv_heads = k.shape[1:3]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q's {heads} heads must be a multiple of k's {kv_heads} heads")
    if query_grid not in QUERY_GRIDS:
        raise ValueError(f"query_grid must be one of {', '.join(QUERY_GRIDS)}, found {query_grid!r}")
    if table is not None:
        if positions is None:
            raise ValueError("a table needs positions, [B, G, N, 2], to be read at")
        if table.ndim != 3 or table.shape[0] != heads or 0 in table.shape:
            raise ValueError(
                f"table must be [H, rows, columns] with q's {heads} heads, found shape {tuple(table.shape)}"
            )
    if positions is not None:
        _check_positions(positions, batch, keys, heads, "heads")
    if bias is not None:
        broadcasts("bias", bias, "[B, H, Y * X, N]", (batch, heads, rows * columns, keys))
    for name, tensor in (("positions", positions), ("table", table), ("bias", bias)):
        if tensor is not None:
            beside(name, tensor, "q", q)
    q, k, v = same_kind(q=q, k=k, v=v)
    scale = scale_or_default(scale, width)
    return AttentionCall(q, k, v, positions, table, query_grid, bias, scale, return_lse)


def _check_positions(positions: Tensor, batch: int, keys: int | None, whole: int, of: str) -> None:
    if positions.ndim != 4 or positions.shape[0] != batch or positions.shape[-1] != 2:
        raise ValueError(
            f"positions must be [B, groups, N, 2] with batch {batch}, found shape {tuple(positions.shape)}"
        )
    if keys is not None and positions.shape[2] != keys:
        raise ValueError(f"positions must be as many as the {keys} keys, found {positions.shape[2]}")
    if positions.shape[1] == 0 or whole % positions.shape[1]:
        raise ValueError(f"the {positions.shape[1]} groups of positions must divide the {whole} {of}")


# Backends ---------------------------------------------------------------------------------------------------


def _arguments(call: AttentionCall) -> tuple:
    return call.q, call.k, call.v, call.positions, call.table, call.query_grid, call.bias, call.scale


def _cpu_why_not(call: SampleCall | AttentionCall) -> str | None:
    device = (call.x if isinstance(call, SampleCall) else call.q).device
    return dispatch.why_not_fused() if device.type == "cpu" else f"the tensors are on {device}"


def _triton_sample_why_not(call: SampleCall) -> str | None:
    return _why_not_atomic(call.x, call.positions) or tile.why_not(call.positions, call.positions)


def _triton_why_not(call: AttentionCall) -> str | None:
    if call.table is not None:
        if call.bias is not None:
            return "a table and a bias together"
        reason = _why_not_atomic(call.table, call.positions)
        if reason is not None:
            return reason
    return tile.why_not(call.q, call.v)


def _why_not_atomic(*inputs: Tensor) -> str | None:
    """Gradients of what is read between entries are summed in no fixed order."""
    if torch.are_deterministic_algorithms_enabled() and any(x.requires_grad for x in inputs):
        return "gradients with atomic sums, and PyTorch was told to use deterministic algorithms"
    return None


def _run_triton(call: AttentionCall) -> tuple[Tensor, Tensor]:
    bias, keys = call.bias, call.k.shape[1]
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)].expand(-1, -1, call.q.shape[1] * call.q.shape[2], keys)
    positions = None if call.table is None else call.positions
    corners = call.query_grid == "corners"
    return schema.forward(call.q, call.k, call.v, positions, call.table, bias, corners, call.scale, "triton")


def _describe_triton(call: AttentionCall) -> str:
    from zoo.kernels.deformable import triton

    return triton.describe(call.q, call.v, call.bias is not None, with_table=call.table is not None)


dispatch.OPERATIONS[SAMPLE] = (
    dispatch.Backend(
        "triton",
        run=lambda call: schema.sample(call.x, call.positions, "triton"),
        why_not=_triton_sample_why_not,
        missing=tile.missing,
    ),
    dispatch.Backend(
        "cpu", run=lambda call: cpu.deformable_sample(call.x, call.positions), why_not=_cpu_why_not
    ),
    dispatch.Backend(
        "reference",
        run=lambda call: reference.deformable_sample(call.x, call.positions),
        why_not=lambda call: None,
    ),
)
dispatch.OPERATIONS[ATTENTION] = (
    dispatch.Backend(
        "triton",
        run=_run_triton,
        why_not=_triton_why_not,
        missing=tile.missing,
        configuration=_describe_triton,
    ),
    dispatch.Backend(
        "cpu",
        run=lambda call: cpu.deformable_attention(*_arguments(call), return_lse=call.return_lse),
        why_not=_cpu_why_not,
    ),
    dispatch.Backend(
        "reference",
        run=lambda call: reference.deformable_attention(*_arguments(call)),
        why_not=lambda call: None,
    ),
)
