"""PyTorch's fused attention as the operations call it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import in_graph

VECTOR = 16  # float32 numbers that a CPU takes at once, at most


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, **options: bool
) -> Tensor:
    """Attend to all keys, those behind the last whole vector as fast as the others.

    In float32 a CPU's kernel takes those one by one: 9 keys take three times as long as 16. Where that pays,
    hidden keys fill the vector.

    Shapes: q [B, H, N, D], k [B, H, M, D], v [B, H, M, Dv]; bias [B or 1, H or 1, N or 1, M], added or, if
        bool, True where a key is seen. Returns [B, H, N, Dv]. Options are those of PyTorch's function.
    """
    keys = k.shape[2]
    if breaks_vectors(q, keys):
        more = -keys % VECTOR
        k, v = F.pad(k, (0, 0, 0, more)), F.pad(v, (0, 0, 0, more))
        bias = q.new_zeros(1, 1, 1, keys) if bias is None else bias
        bias = F.pad(bias, (0, more), value=False if bias.dtype == torch.bool else float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, **options)


def breaks_vectors(q: Tensor, keys: int) -> bool:
    """Whether queries [B, H, N, D] lose more to keys beside whole vectors than copies of the keys take."""
    if in_graph():  # a graph of any length cannot depend on it
        return False
    pays = keys % VECTOR > 5 and q.shape[2] >= 4 * keys and q.shape[:3].numel() > 512
    return pays and q.is_cpu and q.dtype == torch.float32
