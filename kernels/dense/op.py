"""Attention of all to all: check the arguments, choose a backend, compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.kernels import dispatch, tile
from zoo.kernels.checks import heads_last, same_kind, scale_or_default, without_autocast
from zoo.kernels.dense import reference, schema, sdpa

OP = "attention"


@dataclass(frozen=True)
class Call:
    """A checked call; keys and values that the mask hides are zero."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    scale: float
    return_lse: bool


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every query to every key, but for keys that a mask hides: padding.

    Where all keys of an image are hidden its output is exactly 0, the LSE -inf, and gradients are finite.
    Nothing leaks from behind the mask, neither NaN nor infinity.

    Shapes: q [B, N, Hq, D], k [B, M, Hkv, D], v [B, M, Hkv, Dv]; query head h reads key head
        h // (Hq // Hkv). key_mask bool [B, M], true where the key is seen. Returns [B, N, Hq, Dv] and, with
        `return_lse`, the natural-log LSE [B, N, Hq], differentiable too.
    Units: scale multiplies q.k and is D**-0.5 by default.
    Numerics: logits and softmax in at least float32, result in q's dtype.
    Raises: ValueError for arguments that do not fit each other; RuntimeError when a named backend cannot run
        the call.
    Source: Vaswani et al. 2017 (arXiv:1706.03762) Eq. 1.
    """
    call = _check(q, k, v, key_mask=key_mask, scale=scale, return_lse=return_lse)
    chosen, _ = dispatch.resolve(OP, backend, call)
    with without_autocast(q):
        out, lse = chosen.run(call)
    out = out.to(call.q.dtype)
    return (out, lse) if return_lse else out


def explain(
    q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", **options: Any
) -> dispatch.Explanation:
    """Say which backend `attention` with these arguments would use, how, and why."""
    call = _check(q, k, v, **options)
    chosen, reason = dispatch.resolve(OP, backend, call)
    return dispatch.Explanation(OP, chosen.name, chosen.configuration(call), reason)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Call:
    heads_last(q, k, v)
    if key_mask is not None:
        if key_mask.dtype != torch.bool or key_mask.shape != k.shape[:2]:
            raise ValueError(
                f"key_mask must be bool [B, M] = {tuple(k.shape[:2])}, found {key_mask.dtype} "
                f"{tuple(key_mask.shape)}"
            )
        if key_mask.device != q.device:
            raise ValueError(f"key_mask must be on q's device {q.device}, found {key_mask.device}")
    scale = scale_or_default(scale, q.shape[-1])
    q, k, v = same_kind(q=q, k=k, v=v)
    if key_mask is not None:  # a weight of 0 would keep NaN and infinity
        k, v = (x.masked_fill(~key_mask[..., None, None], 0.0) for x in (k, v))
    return Call(q, k, v, key_mask, scale, return_lse)


# Backends ---------------------------------------------------------------------------------------------------


def _run(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    bias = None
    if call.key_mask is not None:
        dtype = torch.promote_types(call.q.dtype, torch.float32)
        bias = torch.zeros(call.key_mask.shape, dtype=dtype, device=call.q.device)
        bias = bias.masked_fill(~call.key_mask, float("-inf"))[:, None, None]
    return schema.forward(call.q, call.k, call.v, bias, call.scale, backend)


def _cpu_why_not(call: Call) -> str | None:
    if call.q.device.type != "cpu":
        return f"the tensors are on {call.q.device}"
    return dispatch.why_not_opaque()


def _describe_triton(call: Call) -> str:
    from zoo.kernels.dense import triton

    return triton.describe(call.q, call.v, call.key_mask is not None)


dispatch.OPERATIONS[OP] = (
    dispatch.Backend(
        "sdpa",
        run=lambda call: (sdpa.attention(call.q, call.k, call.v, call.key_mask, call.scale), None),
        why_not=lambda call: (
            "PyTorch's attention returns no LSE" if call.return_lse else dispatch.why_not_fused()
        ),
    ),
    dispatch.Backend(
        "triton",
        run=lambda call: _run(call, "triton"),
        why_not=lambda call: tile.why_not(call.q, call.v),
        missing=tile.missing,
        configuration=_describe_triton,
    ),
    dispatch.Backend("cpu", run=lambda call: _run(call, "cpu"), why_not=_cpu_why_not),
    dispatch.Backend(
        "reference",
        run=lambda call: reference.attention(call.q, call.k, call.v, call.key_mask, call.scale),
        why_not=lambda call: None,
    ),
)
