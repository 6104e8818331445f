"""Window attention: check the arguments, choose a backend, compute."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import Any

from torch import Tensor

from zoo.kernels import dispatch, peers, tile
from zoo.kernels.checks import beside, same_kind, scale_or_default, without_autocast
from zoo.kernels.window import reference, schema, sdpa

OP = "window_attention"
WHOLE_WINDOW = 64  # tokens of a window, and channels of a head by bytes per number, that fit the registers
WIDEST = {2: 64, 4: 32, 8: 128}


@dataclass(frozen=True)
class Call:
    """A checked call; `window_size` and `shift` are rows and columns."""

    q: Tensor
    k: Tensor
    v: Tensor
    window_size: tuple[int, int]
    shift: tuple[int, int]
    scale: float
    bias: Tensor | None
    return_lse: bool


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | tuple[int, int],
    *,
    shift: int | tuple[int, int] = 0,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every token to all tokens of its window; the windows tile the map.

    With a `shift` the whole windows start that many tokens further right and down, and what they leave at the
    borders are windows too: the same as rolling the map by -shift, masking in the windows at its end what the
    roll brought together, and rolling back.

    Shapes: q [B, Y, X, H, D], k [B, Y, X, Hkv, D], v [B, Y, X, Hkv, Dv]; query head h reads key head
        h // (H // Hkv). bias [H, T, T], T = rows * columns of a window, is added to the logits of query and
        key by their places in a whole window, row by row; a query from which -inf hides everything gets
        exactly 0. Returns [B, Y, X, H, Dv] and, with `return_lse`, the natural-log LSE [B, Y, X, H].
    Units: window_size and shift in tokens, one number or (rows, columns); scale multiplies q.k and is D**-0.5
        by default.
    Numerics: logits and softmax in at least float32, result in q's dtype; PyTorch's fused attention on a GPU
        takes the bias in q's dtype.
    Raises: ValueError for arguments that do not fit each other, and for a map whose sides are no multiples of
        the window: pad it before the projection, since padded tokens carry its bias. RuntimeError when a
        named backend cannot run the call.
    Source: Liu et al. 2021 (arXiv:2103.14030) Sec. 3.2, Eq. 4.
    """
    call = _check(q, k, v, window_size, shift=shift, bias=bias, scale=scale, return_lse=return_lse)
    chosen, _ = dispatch.resolve(OP, backend, call)
    with without_autocast(q):
        out, lse = chosen.run(call)
    out = out.to(call.q.dtype)
    return (out, lse) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | tuple[int, int],
    *,
    backend: str = "auto",
    **options: Any,
) -> dispatch.Explanation:
    """Say which backend `window_attention` with these arguments would use, how, and why."""
    call = _check(q, k, v, window_size, **options)
    chosen, reason = dispatch.resolve(OP, backend, call)
    return dispatch.Explanation(OP, chosen.name, chosen.configuration(call), reason)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | tuple[int, int],
    *,
    shift: int | tuple[int, int] = 0,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Call:
    if q.ndim != 5 or 0 in q.shape[1:]:
        raise ValueError(f"q must be [B, Y, X, H, D] with no empty axis but B, found shape {tuple(q.shape)}")
    if k.ndim != 5 or k.shape[:3] != q.shape[:3] or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have q's batch, map and width {tuple(q.shape)}, found {tuple(k.shape)}")
    heads, kv_heads = q.shape[3], k.shape[3]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q's {heads} heads must be a multiple of k's {kv_heads} heads")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"v must have k's batch, map and heads {tuple(k.shape[:-1])}, found {tuple(v.shape)}"
        )
    window_size, shift = _pair("window_size", window_size), _pair("shift", shift)
    for length, window, by, axis in zip(q.shape[1:3], window_size, shift, ("rows", "columns"), strict=True):
        if window < 1:
            raise ValueError(f"window_size must be at least 1, found {window} {axis}")
        if not 0 <= by < window:
            raise ValueError(f"shift must be from 0 to {window - 1}, less than the window, found {by} {axis}")
        if length % window:
            raise ValueError(
                f"the map's {length} {axis} must be a multiple of window_size {window}; "
                f"pad them to {-(-length // window) * window} before the projection"
            )
    if bias is not None:
        tokens = window_size[0] * window_size[1]
        if tuple(bias.shape) != (heads, tokens, tokens):
            raise ValueError(
                f"bias must be [H, T, T] = {(heads, tokens, tokens)} for {heads} heads and windows of "
                f"{window_size}, found {tuple(bias.shape)}"
            )
        beside("bias", bias, "q", q)
    scale = scale_or_default(scale, q.shape[-1])
    q, k, v = same_kind(q=q, k=k, v=v)
    return Call(q, k, v, window_size, shift, scale, bias, return_lse)


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """Rows and columns."""
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2 or any(isinstance(each, bool) or not hasattr(each, "__index__") for each in pair):
        raise ValueError(f"{name} must be a whole number or (rows, columns), found {value!r}")
    return index(pair[0]), index(pair[1])


# Backends ---------------------------------------------------------------------------------------------------


def _arguments(call: Call) -> tuple:
    return call.q, call.k, call.v, call.window_size, call.shift, call.scale, call.bias


def _flex_why_not(call: Call) -> str | None:
    leaves = [x for x in (call.q, call.k, call.v, call.bias) if x is not None]
    return peers.flex_why_not(leaves, call.q.shape[-1])


def _run_flex(call: Call) -> tuple[Tensor, Tensor]:
    from zoo.kernels.window import peers

    return peers.flex(*_arguments(call))


def _run_xformers(call: Call) -> tuple[Tensor, None]:
    from zoo.kernels.window import peers

    return peers.xformers(*_arguments(call)[:-1]), None


def _triton_why_not(call: Call) -> str | None:
    tokens = call.window_size[0] * call.window_size[1]
    if tokens > WHOLE_WINDOW:
        return f"windows of more than {WHOLE_WINDOW} tokens, found {tokens}"
    width, widest = max(call.q.shape[-1], call.v.shape[-1]), WIDEST[call.q.element_size()]
    if width > widest:
        return f"heads of more than {widest} channels in {call.q.dtype}, found {width}"
    return tile.why_not(call.q, call.v)


def _run_triton(call: Call) -> tuple[Tensor, Tensor]:
    return schema.forward(
        call.q, call.k, call.v, call.bias, list(call.window_size), list(call.shift), call.scale, "triton"
    )


def _describe_triton(call: Call) -> str:
    from zoo.kernels.window import triton

    config = triton.config(call.q, call.v, call.window_size)
    return f"a window of at most {config.queries} tokens at once, {config.warps} warps"


dispatch.OPERATIONS[OP] = (
    dispatch.Backend(
        "triton",
        run=_run_triton,
        why_not=_triton_why_not,
        missing=tile.missing,
        configuration=_describe_triton,
    ),
    dispatch.Backend(
        "sdpa",
        run=lambda call: sdpa.window_attention(*_arguments(call), return_lse=call.return_lse),
        why_not=lambda call: dispatch.why_not_fused(),
    ),
    dispatch.Backend("flex", run=_run_flex, why_not=_flex_why_not, only_by_name=True),
    dispatch.Backend(
        "xformers",
        run=_run_xformers,
        why_not=lambda call: peers.xformers_why_not(call.q, call.v, call.bias, call.return_lse),
        missing=peers.xformers_missing,
        only_by_name=True,
    ),
    dispatch.Backend(
        "reference",
        run=lambda call: reference.window_attention(*_arguments(call)),
        why_not=lambda call: None,
    ),
)
