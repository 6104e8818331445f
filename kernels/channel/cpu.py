"""Channel attention on a CPU: one image at a time, so that the products read the tokens where they lie.

The heads of one image are evenly spaced in memory and those of a batch are not: a product over both at once
copies q, k and v first. With gradients it is no slower, since backward would join the images again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def channel_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return the output [B, N, H, D] for q [B, N, H, D] and k, v [B, N, H, E], in at least float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    if torch.is_grad_enabled():
        q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
        weights = _normal((scale * (q.mT @ k)).softmax(dim=-1))
        return (v @ weights.mT).transpose(1, 2)
    out, unused = [], q.new_zeros((), dtype=dtype)
    for queries, keys, values in zip(*(x.to(dtype).unbind(0) for x in (q, k, v)), strict=True):
        logits = torch.baddbmm(unused, queries.permute(1, 2, 0), keys.transpose(0, 1), beta=0, alpha=scale)
        weights = _normal(logits.softmax(dim=-1))
        out.append(torch.bmm(values.transpose(0, 1), weights.transpose(1, 2)).transpose(0, 1))
    return torch.stack(out)


def _normal(weights: Tensor) -> Tensor:
    """Weights too small for a normal number as 0.

    Sums over many tokens make logits large and some weights subnormal, which slows a processor's product
    tenfold; below 1e-37 of a value nothing is lost.
    """
    return F.threshold(weights, torch.finfo(weights.dtype).tiny, 0.0)
