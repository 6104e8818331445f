"""Neighborhood attention by flex_attention and by NATTEN: only where they are named."""

from __future__ import annotations

import warnings
from functools import cache, lru_cache
from importlib import import_module
from importlib.metadata import version

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from zoo.kernels.neighborhood.geometry import Axis
from zoo.kernels.peers import attend, not_loaded

NATTEN = (0, 20)  # the first with these arguments


def flex(q: Tensor, k: Tensor, v: Tensor, axes: tuple[Axis, ...], scale: float) -> tuple[Tensor, Tensor]:
    """Return the output [B, *grid, Hq, Dv] and the natural-log LSE [B, *grid, Hq]."""
    grid = q.shape[1:-2]
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    out, lse = attend.with_flex(q, k, v, scale, None, _block_mask(axes, q.device))
    return out.unflatten(1, grid), lse.unflatten(1, grid)


@lru_cache(maxsize=16)
def _block_mask(axes: tuple[Axis, ...], device: torch.device) -> BlockMask:
    """Which keys every query sees, axis by axis: a grid is too large for a table of all pairs."""
    tables, tokens = [], 1
    with torch.inference_mode(False):
        for axis in axes:
            table = torch.from_numpy(axis.seen()).to(device)
            tables.append((table, axis.length))
            tokens *= axis.length

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = None
        for table, length in reversed(tables):
            here = table[i % length, j % length]
            seen = here if seen is None else seen & here
            i, j = i // length, j // length
        return seen

    return create_block_mask(allowed, None, None, tokens, tokens, device=device)


@cache
def natten_missing() -> str | None:
    """Say why NATTEN cannot run on this machine, None where it can."""
    missing = not_loaded("natten", "natten")
    if missing is None and tuple(map(int, version("natten").split(".")[:2])) < NATTEN:
        return f"natten {'.'.join(map(str, NATTEN))} or newer is needed, found {version('natten')}"
    return missing


def natten_why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Say why NATTEN has no kernel for these tensors, None where it has one."""
    try:
        import_module("natten.backends").choose_backend(q, k, v, torch_compile=False)
    except (NotImplementedError, ValueError) as error:
        return f"natten has no kernel for {q.dtype} heads of {q.shape[-1]} on {q.device}: {error}"
    return None


def natten(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: tuple[Axis, ...],
    scale: float,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the output [B, *grid, Hq, Dv] and the natural-log LSE [B, *grid, Hq]."""
    function = getattr(import_module("natten"), f"na{len(axes)}d")
    _, kernel_size, dilation, stride, is_causal = zip(*axes, strict=True)
    with warnings.catch_warnings():
        # Without its own kernels it calls flex_attention, in a way that PyTorch warns of.
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        warnings.filterwarnings("ignore", message="return_lse is deprecated", category=FutureWarning)
        return function(
            q, k, v, kernel_size, stride=stride, dilation=dilation, is_causal=is_causal, scale=scale,
            additional_keys=extra_k, additional_values=extra_v, return_lse=True,
        )  # fmt: skip
