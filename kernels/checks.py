"""What operations ask of their tensors, whatever they compute."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from math import isfinite

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def same_kind(**tensors: Tensor | None) -> list[Tensor | None]:
    """Return the tensors in the dtype of the call, see `dtype_of_call`."""
    dtype = dtype_of_call(**tensors)
    return [x if x is None or x.dtype == dtype else x.to(dtype) for x in tensors.values()]


def dtype_of_call(**tensors: Tensor | None) -> torch.dtype:
    """Return the first tensor's dtype, or autocast's where that is at work.

    The arguments are named as in the operation, which the errors repeat. Raises: ValueError for a tensor of
    another device, of another dtype without autocast, or of a dtype that is no floating point number.
    """
    first, lead = next(iter(tensors.items()))
    floating(first, lead)
    dtype, device = lead.dtype, lead.device
    mixed = autocasts(lead) and dtype != torch.float64
    for name, x in tensors.items():
        if x is None or (x.dtype == dtype and x.device == device):
            continue
        beside(name, x, first, lead)
        if not mixed:
            raise ValueError(f"{name} must have {first}'s dtype {dtype}, found {x.dtype}")
    return torch.get_autocast_dtype(device.type) if mixed else dtype


def beside(name: str, x: Tensor, first: str, lead: Tensor) -> None:
    """Raise ValueError unless `x` is on the device of the argument `first`; its dtype may be another."""
    floating(name, x)
    if x.device != lead.device:
        raise ValueError(f"{name} must be on {first}'s device {lead.device}, found {x.device}")


def broadcasts(name: str, x: Tensor, axes: str, wanted: tuple[int, ...]) -> None:
    """Raise ValueError unless `x` broadcasts to the shape `wanted` of these axes."""
    pairs = zip(x.shape[::-1], wanted[::-1], strict=False)
    if x.ndim > len(wanted) or any(n not in (1, m) for n, m in pairs):
        raise ValueError(f"{name} must broadcast to {axes} = {wanted}, found {tuple(x.shape)}")


def floating(name: str, x: Tensor) -> None:
    """Raise ValueError for a tensor whose dtype the operations do not compute in."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be float64, float32, float16 or bfloat16, found {x.dtype}")


def tensors(**given: Tensor) -> None:
    """Raise ValueError for what is no tensor."""
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, found {type(x).__name__}")


def heads_last(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless these are [B, N, Hq, D], [B, M, Hkv, D] and [B, M, Hkv, Dv], Hq = n Hkv."""
    tensors(q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, N, H, D], found shape {tuple(x.shape)}")
    (batch, _, heads, width), kv_heads = q.shape, k.shape[2]
    if k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(f"k must have q's batch and width {batch}, {width}, found {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v must have k's batch, tokens and heads {tuple(k.shape[:3])}, found {tuple(v.shape)}"
        )
    if width == 0 or v.shape[3] == 0:
        raise ValueError(f"q and v must have channels, found {tuple(q.shape)} and {tuple(v.shape)}")
    if heads == 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"q's {heads} heads must be a multiple of k's {kv_heads} heads, and neither may be 0"
        )


def on_one_grid(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless these are [B, *grid, Hq, D], [B, *grid, Hkv, D] and [B, *grid, Hkv, Dv]."""
    tensors(q=q, k=k, v=v)
    if not 4 <= q.ndim <= 6:
        raise ValueError(f"q must be [B, one to three grid axes, H, D], found shape {tuple(q.shape)}")
    (*place, heads, width), kv_heads = q.shape, k.shape[-2] if k.ndim > 1 else 0
    if k.ndim != q.ndim or [*k.shape[:-2]] != place or k.shape[-1] != width:
        raise ValueError(f"k must have q's batch, grid and width {tuple(q.shape)}, found {tuple(k.shape)}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"v must have k's batch, grid and heads {tuple(k.shape[:-1])}, found {tuple(v.shape)}"
        )
    if width == 0:
        raise ValueError(f"q must have at least one channel per head, found shape {tuple(q.shape)}")
    if heads == 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"q's {heads} heads must be a multiple of k's {kv_heads} heads, and neither may be 0"
        )


def scale_or_default(scale: float | None, width: int) -> float:
    """Return the number that multiplies q.k, D**-0.5 where none is given."""
    if isinstance(scale, Tensor):
        raise ValueError("scale must be a number, found a tensor; multiply q by a learned scale instead")
    if isinstance(scale, bool | str) or not (scale is None or hasattr(scale, "__float__")):
        raise ValueError(f"scale must be a number, found {scale!r}")
    return width**-0.5 if scale is None else float(scale)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is at work on the device of `x`."""
    if not torch._C._is_any_autocast_enabled():  # most often, and asking about one device takes longer
        return False
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A block in which autocast does not change dtypes: those of the call are settled."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


def in_graph() -> bool:
    """Whether this run makes a graph: torch.compile, torch.export, torch.jit.trace."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_traced() -> bool:
    """Whether a graph is made or a functorch transform is at work."""
    return in_graph() or torch._C._are_functorch_transforms_active()


def learns(x: Tensor) -> bool:
    """Whether a gradient of `x` may be wanted: a trace of torch.jit serves with and without."""
    return torch.jit.is_tracing() or x.requires_grad and torch.is_grad_enabled()


def shows_values(x: Tensor) -> bool:
    """Whether Python may look at the numbers of `x`: it has some and nothing traces it."""
    return not (is_traced() or x.is_meta or is_fake(x))


def widened(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return tensors on a CPU in at least float32: half precision gains nothing there and rounds sums."""
    return [x.float() if x is not None and x.is_cpu and x.dtype.itemsize < 4 else x for x in tensors]


def all_finite(x: Tensor) -> bool:
    """Whether `x` holds no NaN or infinity; where a tracer hides the values, they count as finite."""
    # A sum is one cheap pass. It may overflow by itself; then the careful way is taken for nothing.
    dtype = torch.promote_types(x.dtype, torch.float32)
    return not shows_values(x) or isfinite(x.detach().sum(dtype=dtype).item())


def per_image(name: str, x: Tensor, of: Tensor) -> Tensor:
    """Return [B, C] of a condition [B, C] for `of` [B, *tokens, C]; axes of one token may lie between.

    Raises: ValueError for another shape.
    """
    batch, channels = of.shape[0], of.shape[-1]
    if x.ndim < 2 or tuple(x.shape) != (batch, *(1,) * (x.ndim - 2), channels):
        raise ValueError(
            f"{name} must be [{batch}, {channels}], also with axes of one token between, "
            f"found {tuple(x.shape)}"
        )
    return x.reshape(batch, channels)
