"""The modulated norm on a CPU: PyTorch's norm, then one pass; a single image has it all in one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Return norm(x) (1 + scale) + shift for x [B, N, C], scale and shift [B, C], in at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, factor, shift = x.to(dtype), 1 + scale.to(dtype), shift.to(dtype)
    if x.shape[0] == 1:  # len() would fix the batch of an exported graph
        return F.layer_norm(x, x.shape[-1:], factor[0], shift[0], eps)
    return torch.addcmul(shift[:, None], F.layer_norm(x, x.shape[-1:], eps=eps), factor[:, None])
