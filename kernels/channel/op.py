"""Channel attention: check the arguments, choose a backend, compute."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from zoo.kernels import dispatch, tile
from zoo.kernels.channel import cpu, reference, schema
from zoo.kernels.checks import in_graph, same_kind, scale_or_default, without_autocast

OP = "channel_attention"
# Channels of a head, by bytes per number: a map of them stays in registers.
WIDEST = {2: 128, 4: 64, 8: 128}


@dataclass(frozen=True)
class Call:
    """A checked call, its tokens in one axis: q [B, N, H, D], k and v [B, N, H, E]."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


def channel_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Attend from every channel of a head to all channels of that head, over all tokens.

    With the tokens as rows, the weights are softmax(scale q^T k) over the channels of k, and every token's
    output is the weights times its v: linear in tokens. DaViT's published models call it with
    (k, v, q, scale=D**-0.5), Florence-2's with (q, k, v, scale=N**-0.5).

    Shapes: q [B, *tokens, H, D], k and v [B, *tokens, H, E], any number of token axes. Returns
        [B, *tokens, H, D].
    Units: scale multiplies q.k and is D**-0.5 by default, although the product runs over the tokens.
    Numerics: products and softmax in at least float32, also for half precision: the logits grow with the
        root of the token count and leave its range. Result in q's dtype.
    Raises: ValueError for arguments that do not fit each other; RuntimeError when a named backend cannot run
        the call.
    Source: Ding et al. 2022 (arXiv:2204.03645) Sec. 3.2, Eq. 4.
    """
    call = _check(q, k, v, scale)
    chosen, _ = dispatch.resolve(OP, backend, call)
    with without_autocast(q):
        out = chosen.run(call)
    return out.to(call.q.dtype).unflatten(1, q.shape[1:-2])


def explain(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str = "auto"
) -> dispatch.Explanation:
    """Say which backend `channel_attention` with these arguments would use, how, and why."""
    call = _check(q, k, v, scale)
    chosen, reason = dispatch.resolve(OP, backend, call)
    return dispatch.Explanation(OP, chosen.name, chosen.configuration(call), reason)


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Call:
    if q.ndim < 4 or 0 in q.shape[-2:]:
        raise ValueError(
            f"q must be [B, *tokens, H, D] with a head and a channel, found shape {tuple(q.shape)}"
        )
    if k.ndim != q.ndim or k.shape[:-1] != q.shape[:-1] or k.shape[-1] == 0:
        raise ValueError(
            f"k must have q's batch, tokens and heads {tuple(q.shape[:-1])}, found {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, found {tuple(v.shape)}")
    scale = scale_or_default(scale, q.shape[-1])
    q, k, v = same_kind(q=q, k=k, v=v)
    return Call(*(x.flatten(1, -3) for x in (q, k, v)), scale)


# Backends ---------------------------------------------------------------------------------------------------


def _cpu_why_not(call: Call) -> str | None:
    q = call.q
    if q.device.type != "cpu":
        return f"the tensors are on {q.device}"
    if in_graph():
        return "a graph over one image after the other would fix the batch"
    if q.shape[0] == 0:
        return "there is no image"
    return None


def _triton_why_not(call: Call) -> str | None:
    width, widest = max(call.q.shape[-1], call.k.shape[-1]), WIDEST[call.q.element_size()]
    if width > widest:
        return f"heads of more than {widest} channels in {call.q.dtype}, found {width}"
    return tile.why_not(call.q, call.k)


def _describe_triton(call: Call) -> str:
    from zoo.kernels.channel import triton

    config = triton.config(call.q, call.k)
    return f"tiles of {config.queries} tokens, {config.warps} warps, {config.stages} stages"


dispatch.OPERATIONS[OP] = (
    dispatch.Backend(
        "triton",
        run=lambda call: schema.forward(call.q, call.k, call.v, call.scale, "triton")[0],
        why_not=_triton_why_not,
        missing=tile.missing,
        configuration=_describe_triton,
    ),
    dispatch.Backend(
        "cpu",
        run=lambda call: cpu.channel_attention(call.q, call.k, call.v, call.scale),
        why_not=_cpu_why_not,
    ),
    dispatch.Backend(
        "reference",
        run=lambda call: reference.channel_attention(call.q, call.k, call.v, call.scale),
        why_not=lambda call: None,
    ),
)
