"""Norm and rotary positions on a CPU: a pair of channels is a complex number, and turning it one product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rotary_norm(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float
) -> Tensor:
    """Return what the definition does for the same arguments."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x = x.to(dtype)
    if weight is not None:
        x = F.rms_norm(x, x.shape[-1:], weight.to(dtype), eps)
    if cos is not None:
        turns = torch.complex(cos.to(dtype), sin.to(dtype))[:, None]
        x = x.unflatten(-1, (-1, 2)).contiguous()
        x = x.clone() if x.storage_offset() % 2 else x  # complex numbers begin at every second place
        pairs = torch.view_as_complex(x)
        x = torch.view_as_real(pairs * turns).flatten(-2)
    return x
