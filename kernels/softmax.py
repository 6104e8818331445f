"""The softmax of all definitions: what a row that sees nothing gives is decided here."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of logits [.., M] and their natural-log LSE [..]; 0 and -inf where all are -inf.

    Such a row is filled before anything is computed, so that no gradient is -inf minus -inf. The weights are
    not exp(logits - LSE): of logits with no digits left after the point the LSE has lost the logarithm.
    """
    nothing = (logits == float("-inf")).all(dim=-1, keepdim=True)
    filled = logits.masked_fill(nothing, 0.0)
    weights = torch.softmax(filled, dim=-1).masked_fill(nothing, 0.0)
    lse = filled.logsumexp(dim=-1, keepdim=True).masked_fill(nothing, float("-inf"))
    return weights, lse.squeeze(-1)
