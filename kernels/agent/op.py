"""Agent attention: check the arguments, choose a backend, compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zoo.kernels import dispatch, tile
from zoo.kernels.agent import reference, sdpa
from zoo.kernels.checks import beside, broadcasts, same_kind, scale_or_default, without_autocast
from zoo.kernels.dense import schema

OP = "agent_attention"


@dataclass(frozen=True)
class Call:
    """A checked call."""

    q: Tensor
    k: Tensor
    v: Tensor
    agents: Tensor
    bias_in: Tensor | None
    bias_out: Tensor | None
    scale: float


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    *,
    bias_in: Tensor | None = None,
    bias_out: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend to all tokens through a few agents: they gather from the tokens, the queries from them.

    Agents are what queries are, most often an average of them. Each gathers the values by one softmax over
    all keys; each query takes what the agents gathered by one softmax over the agents. Cost is linear in
    tokens.

    Shapes: q [B, N, H, D], k [B, M, Hkv, D], v [B, M, Hkv, Dv], agents [B, A, H, D]; head h of q and of the
        agents reads key head h // (H // Hkv). bias_in broadcasts to [B, H, A, M] and is added to the logits
        of the agents, bias_out to [B, H, N, A] and is added to those of the queries; -inf hides. Returns
        [B, N, H, Dv]. There is no LSE: the result is not one softmax over the keys.
    Units: scale multiplies both agents.k and q.agents and is D**-0.5 by default.
    Numerics: logits and softmax in at least float32, result in q's dtype. A row that sees nothing is 0.
    Raises: ValueError for arguments that do not fit each other; RuntimeError when a named backend cannot run
        the call.
    Source: Han et al. 2023 (arXiv:2312.08874) Sec. 3.3, Eq. 5 and 6.
    """
    call = _check(q, k, v, agents, bias_in=bias_in, bias_out=bias_out, scale=scale)
    chosen, _ = dispatch.resolve(OP, backend, call)
    with without_autocast(q):
        out = chosen.run(call)
    return out if out.dtype == call.q.dtype else out.to(call.q.dtype)


def explain(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, *, backend: str = "auto", **options: Any
) -> dispatch.Explanation:
    """Say which backend `agent_attention` with these arguments would use, and why."""
    call = _check(q, k, v, agents, **options)
    chosen, reason = dispatch.resolve(OP, backend, call)
    return dispatch.Explanation(OP, chosen.name, chosen.configuration(call), reason)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    *,
    bias_in: Tensor | None = None,
    bias_out: Tensor | None = None,
    scale: float | None = None,
) -> Call:
    if q.ndim != 4 or 0 in q.shape[1:]:
        raise ValueError(
            f"q must be [B, N, H, D] with no empty axis but B, found shape {tuple(q.shape)}; "
            "flatten a map of tokens first"
        )
    batch, queries, heads, width = q.shape
    if k.ndim != 4 or k.shape[0] != batch or k.shape[-1] != width or k.shape[1] == 0:
        raise ValueError(
            f"k must be [B, M, Hkv, D] with q's batch {batch} and width {width} and at least one token, "
            f"found shape {tuple(k.shape)}"
        )
    if v.ndim != 4 or v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"v must have k's batch, tokens and heads {tuple(k.shape[:-1])}, found {tuple(v.shape)}"
        )
    keys, kv_heads = k.shape[1:3]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q's {heads} heads must be a multiple of k's {kv_heads} heads")
    if (
        agents.ndim != 4
        or (agents.shape[0], *agents.shape[2:]) != (batch, heads, width)
        or not agents.shape[1]
    ):
        raise ValueError(
            f"agents must be [B, A, H, D] with q's batch {batch}, {heads} heads and width {width} and at "
            f"least one agent, found shape {tuple(agents.shape)}"
        )
    count = agents.shape[1]
    for name, bias, axes, wanted in (
        ("bias_in", bias_in, "[B, H, A, M]", (batch, heads, count, keys)),
        ("bias_out", bias_out, "[B, H, N, A]", (batch, heads, queries, count)),
    ):
        if bias is not None:
            broadcasts(name, bias, axes, wanted)
            beside(name, bias, "q", q)
    scale = scale_or_default(scale, width)
    q, k, v, agents = same_kind(q=q, k=k, v=v, agents=agents)
    return Call(q, k, v, agents, bias_in, bias_out, scale)


# Backends ---------------------------------------------------------------------------------------------------


def _arguments(call: Call) -> tuple:
    return call.q, call.k, call.v, call.agents, call.bias_in, call.bias_out, call.scale


def _run_triton(call: Call) -> Tensor:
    gathered = _attend(call.agents, call.k, call.v, call.bias_in, call.scale)
    return _attend(call.q, call.agents, gathered, call.bias_out, call.scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)].expand(-1, -1, q.shape[1], k.shape[1])
    return schema.forward(q, k, v, bias, scale, "triton")[0]


def _describe_triton(call: Call) -> str:
    from zoo.kernels.dense import triton

    return f"twice in {triton.describe(call.q, call.v, call.bias_out is not None)}"


dispatch.OPERATIONS[OP] = (
    dispatch.Backend(
        "triton",
        run=_run_triton,
        why_not=lambda call: tile.why_not(call.q, call.v),
        missing=tile.missing,
        configuration=_describe_triton,
    ),
    dispatch.Backend(
        "sdpa",
        run=lambda call: sdpa.agent_attention(*_arguments(call)),
        why_not=lambda call: dispatch.why_not_opaque(),
    ),
    dispatch.Backend(
        "reference",
        run=lambda call: reference.agent_attention(*_arguments(call)),
        why_not=lambda call: None,
    ),
)
