"""Other people's attention as backends, to compare with and on request only: why each cannot take a call.

Nothing here is imported before a call asks for it by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor


def flex_why_not(leaves: Sequence[Tensor], width: int) -> str | None:
    """Say why PyTorch's flex_attention cannot take tensors of such heads, None where it can."""
    device = leaves[0].device.type
    if device not in ("cpu", "cuda"):
        return f"the tensors are on {leaves[0].device}"
    if leaves[0].dtype == torch.float64:
        return "float64 tensors"
    if 0 in leaves[0].shape:
        return f"a tensor without entries, found {tuple(leaves[0].shape)}"
    if device == "cuda" and width < 16:
        return f"heads of less than 16 channels, found {width}"
    if device == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in leaves):
        return "flex_attention has no backward pass on a CPU"
    return None


@cache
def xformers_missing() -> str | None:
    """Say why xformers cannot run on this machine, None where it can."""
    if find_spec("xformers") is not None and not torch.cuda.is_available():
        return "no GPU that PyTorch can use"
    return not_loaded("xformers", "xformers.ops")


def not_loaded(package: str, module: str) -> str | None:
    """Say why a module of an optional package cannot be imported, None where it can."""
    if find_spec(package) is None:
        return f"{package} is not installed"
    try:
        import_module(module)
    except Exception as error:  # built for another PyTorch or CUDA
        return f"{package} does not load: {type(error).__name__}: {error}"
    return None


def xformers_why_not(q: Tensor, v: Tensor, bias: Tensor | None, return_lse: bool) -> str | None:
    """Say why xformers cannot take a call, None where it can."""
    if q.device.type != "cuda":
        return f"the tensors are on {q.device}"
    if q.dtype == torch.float64:
        return "float64 tensors"
    if 0 in q.shape:
        return f"a tensor without entries, found {tuple(q.shape)}"
    if bias is not None:
        return "a bias, which it takes only from padded memory"
    if return_lse:
        return "an LSE, which it does not differentiate"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] % 8:
        return (
            "heads of one width that 8 divides are needed, "
            f"found {q.shape[-1]} of queries and {v.shape[-1]} of values"
        )
    return None
