"""Block-sparse attention: check the arguments, choose a backend, compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zoo.kernels import dispatch, peers, tile
from zoo.kernels.block_sparse import reference, schema
from zoo.kernels.block_sparse.blocks import BlockList
from zoo.kernels.checks import beside, heads_last, same_kind, scale_or_default, without_autocast

OP = "block_sparse_attention"


@dataclass(frozen=True)
class Call:
    """A checked call: consistent tensors; the bias, if any, has four axes."""

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: BlockList
    scale: float
    bias: Tensor | None
    return_lse: bool = False


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every block of queries to the blocks of keys listed for it.

    A query that sees no key gets exactly 0, LSE -inf and finite gradients.

    Shapes: q [B, N, Hq, D], k [B, M, Hkv, D], v [B, M, Hkv, Dv]; query head h reads key head
        h // (Hq // Hkv). blocks: `BlockList.from_mask`, `from_indices` or `from_segments`; its lists are
        shared or one for each image or query head. bias [N, M], [Hq, N, M] or [B, Hq, N, M] with 1 for B or
        Hq where it is shared, added to the logits unscaled; -inf hides a key. Returns [B, N, Hq, Dv] and,
        with `return_lse`, the natural-log LSE [B, N, Hq], differentiable too.
    Units: scale multiplies q.k and is D**-0.5 by default.
    Numerics: logits and softmax in at least float32, result in q's dtype.
    Raises: ValueError for arguments that do not fit each other; RuntimeError when a named backend cannot run
        the call.
    """
    call = _check(q, k, v, blocks, scale=scale, bias=bias, return_lse=return_lse)
    chosen, _ = dispatch.resolve(OP, backend, call)
    with without_autocast(q):
        out, lse = chosen.run(call)
    out = out.to(call.q.dtype)
    return (out, lse) if return_lse else out


def explain(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, *, backend: str = "auto", **options: Any
) -> dispatch.Explanation:
    """Say which backend `block_sparse_attention` with these arguments would use, how, and why."""
    call = _check(q, k, v, blocks, **options)
    chosen, reason = dispatch.resolve(OP, backend, call)
    return dispatch.Explanation(OP, chosen.name, chosen.configuration(call), reason)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    return_lse: bool = False,
) -> Call:
    heads_last(q, k, v)
    (batch, queries, heads, width), keys = q.shape, k.shape[1]
    _check_blocks(blocks, q, keys)
    if bias is not None:
        if not 2 <= bias.ndim <= 4:
            raise ValueError(f"bias must be [N, M], [Hq, N, M] or [B, Hq, N, M], found {tuple(bias.shape)}")
        bias = bias[(None,) * (4 - bias.ndim)]
        if (
            bias.shape[0] not in (1, batch)
            or bias.shape[1] not in (1, heads)
            or bias.shape[2:] != (queries, keys)
        ):
            raise ValueError(
                f"bias must be [B or 1, Hq or 1, N, M] = [{batch} or 1, {heads} or 1, {queries}, {keys}], "
                f"found {tuple(bias.shape)}"
            )
        beside("bias", bias, "q", q)
    q, k, v = same_kind(q=q, k=k, v=v)
    scale = scale_or_default(scale, width)
    return Call(q, k, v, blocks, scale, bias, return_lse)


def _check_blocks(blocks: BlockList, q: Tensor, keys: int) -> None:
    if not isinstance(blocks, BlockList):
        raise ValueError(
            f"blocks must be a BlockList, found {type(blocks).__name__}; make one with BlockList.from_mask, "
            "from_indices or from_segments"
        )
    for name, tokens, size, found in (
        ("queries", q.shape[1], blocks.query_size, blocks.query_blocks),
        ("keys", keys, blocks.key_size, blocks.key_blocks),
    ):
        if found != -(-tokens // size):
            raise ValueError(
                f"blocks must cut {tokens} {name} into {-(-tokens // size)} blocks of {size}, "
                f"found {found} blocks"
            )
    lists = tuple(blocks.offsets.shape[:2])
    if lists[0] not in (1, q.shape[0]) or lists[1] not in (1, q.shape[2]):
        raise ValueError(
            f"blocks must hold [B or 1, Hq or 1] = [{q.shape[0]} or 1, {q.shape[2]} or 1] lists, "
            f"found {lists}"
        )
    if blocks.offsets.device != q.device:
        raise ValueError(
            f"blocks must be on q's device {q.device}, found {blocks.offsets.device}; use blocks.to(q.device)"
        )
    for name, segments, tokens in (
        ("query_segments", blocks.query_segments, q.shape[1]),
        ("key_segments", blocks.key_segments, keys),
    ):
        if segments is not None and segments.shape != (tokens,):
            raise ValueError(f"the groups of blocks.{name} hold {len(segments)} tokens, found {tokens}")


# Backends ---------------------------------------------------------------------------------------------------


def _run(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    blocks = call.blocks
    return schema.forward(
        call.q, call.k, call.v, call.bias, blocks.offsets, blocks.indices, blocks.inverse_offsets,
        blocks.inverse_indices, blocks.query_segments, blocks.key_segments, blocks.query_size,
        blocks.key_size, call.scale, backend,
    )  # fmt: skip


def _cpu_why_not(call: Call) -> str | None:
    if call.q.device.type != "cpu":
        return f"the tensors are on {call.q.device}"
    return dispatch.why_not_opaque()


def _flex_why_not(call: Call) -> str | None:
    leaves = [x for x in (call.q, call.k, call.v, call.bias) if x is not None]
    return peers.flex_why_not(leaves, call.q.shape[-1])


def _run_flex(call: Call) -> tuple[Tensor, Tensor]:
    from zoo.kernels.block_sparse import peers

    return peers.flex(call.q, call.k, call.v, call.blocks, call.scale, call.bias)


def _xformers_why_not(call: Call) -> str | None:
    if call.blocks.query_segments is None:
        return "blocks without segments; BlockList.from_segments makes those it can take"
    return peers.xformers_why_not(call.q, call.v, call.bias, call.return_lse)


def _run_xformers(call: Call) -> tuple[Tensor, None]:
    from zoo.kernels.block_sparse import peers

    return peers.xformers(call.q, call.k, call.v, call.blocks, call.scale), None


def _describe_triton(call: Call) -> str:
    from zoo.kernels.block_sparse import triton

    blocks, biased = call.blocks, call.bias is not None
    return triton.describe(call.q, call.v, blocks.query_size, blocks.key_size, biased)


dispatch.OPERATIONS[OP] = (
    dispatch.Backend(
        "triton",
        run=lambda call: _run(call, "triton"),
        why_not=lambda call: tile.why_not(call.q, call.v),
        missing=tile.missing,
        configuration=_describe_triton,
    ),
    dispatch.Backend(
        "cpu",
        run=lambda call: _run(call, "cpu"),
        why_not=_cpu_why_not,
        configuration=lambda call: (
            f"blocks of {call.blocks.query_size} queries and {call.blocks.key_size} keys"
        ),
    ),
    dispatch.Backend("flex", run=_run_flex, why_not=_flex_why_not, only_by_name=True),
    dispatch.Backend(
        "xformers",
        run=_run_xformers,
        why_not=_xformers_why_not,
        missing=peers.xformers_missing,
        only_by_name=True,
    ),
    dispatch.Backend(
        "reference",
        run=lambda call: reference.block_sparse_attention(
            call.q, call.k, call.v, call.blocks, call.scale, call.bias
        ),
        why_not=lambda call: None,
    ),
)
