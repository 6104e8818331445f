"""Start the template's kernels: sizes, strides and configurations, the same for every policy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.configs import Config, choose
from zoo.kernels.tile import kernels, policies

LOG2_E = 1.4426950408889634


class Policy(NamedTuple):
    """Which tiles meet: data and constants for the jit functions of `policies.py`, and those functions."""

    data: tuple[Any, ...]
    shape: tuple[Any, ...]  # begins with the tokens of a query tile and of a key tile
    query_tiles: int
    key_tiles: int
    own_q: Any
    own_k: Any
    keys_of: Any
    queries_of: Any
    visit_k: Any
    visit_q: Any
    allow: Any | None  # None where every pair of tokens of two tiles that meet is allowed


class Bias(NamedTuple):
    """What is added to the logits: a jit function of `policies.py` and its data."""

    function: Any
    data: tuple[Any, ...]
    config: Config | None = None  # in place of the table's, where the bias itself needs the registers


Tiling = Callable[[int, int], Policy]  # from the tokens wanted in a query and a key tile

NO_BIAS = Bias(None, ())


def tile_size(wanted: int, tokens: int) -> int:
    """Tokens of a tile: a power of two that the matrix unit takes, not much more than there are."""
    return max(16, min(wanted, triton.next_power_of_2(tokens)))


def config_of(kernel: str, q: Tensor, v: Tensor, biased: bool = False) -> Config:
    """The tile size and launch options of a kernel for these tensors on their device."""
    width = max(_padded(q.shape[-1]), _padded(v.shape[-1]))
    kernel = f"{kernel} with bias" if biased else kernel
    return choose(kernel, _architecture(q.device), width, q.element_size())


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiling: Tiling,
    scale: float,
    bias: Bias = NO_BIAS,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output [B, N, Hq, Dv], in q's dtype unless said, and the natural-log LSE [B, N, Hq]."""
    q, k, v = (dense_rows(x) for x in (q, k, v))
    batch, queries, heads, _ = q.shape
    out = q.new_empty(batch, queries, heads, v.shape[-1], dtype=out_dtype)
    lse = q.new_empty(batch, queries, heads, dtype=_sums(q))
    config = bias.config or config_of("forward", q, v, bias.function is not None)
    policy = tiling(config.queries, config.keys)
    launch(
        kernels.forward_kernel, policy.query_tiles * batch * heads, config, q,
        q, k, v, out, lse, bias.data, policy.data, *exact(scale * LOG2_E), policy.query_tiles, heads,
        heads // k.shape[2], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        *lse.stride()[:2], SHAPE=policy.shape, OWN=policy.own_q, KEYS_OF=policy.keys_of,
        VISIT=policy.visit_k, ALLOW=policy.allow, BIAS=bias.function, TQ=policy.shape[0],
        **constants(q, v),
    )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tiling: Tiling,
    scale: float,
    bias: Bias = NO_BIAS,
    tiling_of_keys: Tiling | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, and LSE (base 2) and delta of every row [2, B, Hq, N].

    `tiling_of_keys` is for dk and dv, where other tiles than those for dq are better.
    """
    q, k, v, grad_out = (dense_rows(x) for x in (q, k, v, grad_out))
    batch, queries, heads, _ = q.shape
    shared = heads // k.shape[2]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    rows = q.new_empty(2, batch, heads, queries, dtype=_sums(q))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    scales = (*exact(scale * LOG2_E), *exact(scale))
    config = bias.config or config_of("dq", q, v, bias.function is not None)
    policy = tiling(config.queries, config.keys)
    launch(
        kernels.dq_kernel, policy.query_tiles * batch * heads, config, q,
        q, k, v, out, grad_out, dq, lse, grad_lse, rows, bias.data, policy.data, *scales,
        policy.query_tiles, heads, shared, queries, rows[0].numel(), *strides, *out.stride()[:3],
        *grad_out.stride()[:3], *dq.stride()[:3], *lse.stride()[:2],
        *((0, 0, 0) if grad_lse is None else grad_lse.stride()), SHAPE=policy.shape, OWN=policy.own_q,
        KEYS_OF=policy.keys_of, VISIT=policy.visit_k, ALLOW=policy.allow, BIAS=bias.function,
        TQ=policy.shape[0], **constants(q, v),
    )  # fmt: skip
    config = bias.config or config_of("dkv", q, v, bias.function is not None)
    policy = (tiling_of_keys or tiling)(config.queries, config.keys)
    launch(
        kernels.dkv_kernel, policy.key_tiles * batch * k.shape[2], config, q,
        q, k, v, grad_out, dk, dv, rows, bias.data, policy.data, *scales, policy.key_tiles, heads,
        shared, queries, rows[0].numel(), *strides, *grad_out.stride()[:3], *dk.stride()[:3],
        *dv.stride()[:3], SHAPE=policy.shape, OWN=policy.own_k, QUERIES_OF=policy.queries_of,
        VISIT=policy.visit_q, ALLOW=policy.allow, BIAS=bias.function, TK=policy.shape[1],
        **constants(q, v),
    )  # fmt: skip
    return dq, dk, dv, rows


def table_gradient(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    table: Tensor,
    tiling: Tiling,
    scale: float,
    bias: Bias,
) -> Tensor:
    """Return the gradient of a bias [B or 1, Hq or 1, N, M], summed over what shares it."""
    q, k, v, grad_out = (dense_rows(x) for x in (q, k, v, grad_out))
    batch, queries, heads, _ = q.shape
    dtable = torch.zeros(table.shape, dtype=_sums(q), device=q.device)
    config = config_of("dtable", q, v)
    policy = tiling(config.queries, config.keys)
    launch(
        kernels.dtable_kernel, policy.query_tiles * table.shape[0] * table.shape[1] * bool(batch), config, q,
        q, k, v, grad_out, rows, dtable, bias.data, policy.data, *exact(scale * LOG2_E),
        policy.query_tiles, batch, heads, heads // k.shape[2], queries, rows[0].numel(), *table.shape[:2],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3], *dtable.stride(),
        SHAPE=policy.shape, OWN=policy.own_q, KEYS_OF=policy.keys_of, VISIT=policy.visit_k,
        ALLOW=policy.allow, BIAS=bias.function, **constants(q, v),
    )  # fmt: skip
    return dtable.to(table.dtype)


def pair_gradient(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    table: Tensor,
    tiling: Tiling,
    scale: float,
    bias: Bias,
) -> Tensor:
    """Return what `table_gradient` does where all tiles meet, also in parallel where queries are few."""
    q, k, v, grad_out = (dense_rows(x) for x in (q, k, v, grad_out))
    batch, queries, heads, _ = q.shape
    if batch == 0:
        return torch.zeros_like(table)
    dtable = q.new_empty(table.shape, dtype=_sums(q))
    config = config_of("dpairs", q, v)
    policy = tiling(config.queries, config.keys)
    tiles = policy.query_tiles, policy.key_tiles
    launch(
        kernels.dpairs_kernel, tiles[0] * tiles[1] * table.shape[0] * table.shape[1], config, q,
        q, k, v, grad_out, rows, dtable, bias.data, policy.data, *exact(scale * LOG2_E), *tiles, batch, heads,
        heads // k.shape[2], queries, rows[0].numel(), *table.shape[:2], *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], *grad_out.stride()[:3], *dtable.stride(), SHAPE=policy.shape, OWN_Q=policy.own_q,
        OWN_K=policy.own_k, ALLOW=policy.allow, BIAS=bias.function, TQ=policy.shape[0], TK=policy.shape[1],
        **constants(q, v),
    )  # fmt: skip
    return dtable.to(table.dtype)


def dense(q: Tensor, k: Tensor) -> Tiling:
    """Every query sees every key."""
    queries, keys = q.shape[1], k.shape[1]

    def tiling(wanted_queries: int, wanted_keys: int) -> Policy:
        tq, tk = tile_size(wanted_queries, queries), tile_size(wanted_keys, keys)
        return Policy(
            (queries, keys),
            (tq, tk),
            -(-queries // tq),
            -(-keys // tk),
            policies.dense_own_q,
            policies.dense_own_k,
            policies.dense_keys_of,
            policies.dense_queries_of,
            policies.dense_visit_k,
            policies.dense_visit_q,
            policies.dense_allow if keys % tk else None,
        )

    return tiling


def table(bias: Tensor | None) -> Bias:
    """A number for each pair of tokens [B or 1, Hq or 1, N, M], or none."""
    if bias is None:
        return NO_BIAS
    shared = [0 if bias.shape[axis] == 1 else bias.stride(axis) for axis in (0, 1)]
    return Bias(policies.table_bias, (bias, *shared, *bias.stride()[2:]))


def constants(q: Tensor, v: Tensor) -> dict[str, Any]:
    """Widths, padded to powers of two, and the precision of products and sums."""
    # Of float32 tensors only. With "highest", PyTorch's default, three TF32 products make a float32 one;
    # exact products would not use the matrix unit, and their code takes minutes to compile for wide heads.
    if torch.version.hip is not None:
        precision = "ieee"
    else:
        precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
    return {
        "D": q.shape[-1],
        "DV": v.shape[-1],
        "PD": _padded(q.shape[-1]),
        "PDV": _padded(v.shape[-1]),
        "PREC": precision,
        "ACC": accumulator(q),
    }


def accumulator(x: Tensor) -> tl.dtype:
    """What sums over numbers of this kind are in."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def shares(tokens: int, tile: int, programs: int) -> tuple[int, int]:
    """Tokens of a share, whole tiles, and how many shares, such that about so many programs have one."""
    share = max(1, -(-tokens // (max(1, programs) * tile))) * tile
    return share, max(1, -(-tokens // share))


def exact(number: float) -> tuple[float, float]:
    """A number as the sum of two float32: a float argument of a kernel is one float32."""
    high = torch.tensor(number, dtype=torch.float32).item()
    return high, number - high


def dense_rows(x: Tensor) -> Tensor:
    """The kernels take any strides but along the channels."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def launch(kernel: Any, programs: int, config: Config, q: Tensor, *args: Any, **constants: Any) -> None:
    """Start so many programs on q's device, none if there is nothing to do."""
    if programs:
        options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
            kernel[(programs,)](*args, **constants, **options)


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _sums(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@cache
def _architecture(device: torch.device) -> str:
    """As the tables are named: sm_90, gfx942."""
    if interpreted():
        return "sm_90"
    if device.type != "cuda":  # kernels are compiled for a GPU that is not there
        target = triton.runtime.driver.active.get_current_target()
        return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on the CPU."""
    return not isinstance(kernels.forward_kernel, triton.JITFunction)
