"""Join attention over parts of the keys into attention over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.kernels.checks import floating


def merge_attentions(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return what one softmax over all the keys would have given, from attention over disjoint parts of them.

    Every output is weighted by exp(lse - lse of all). A part in which a query sees nothing (LSE -inf) has no
    weight; where no part sees anything the result is 0 with LSE -inf and finite gradients.

    Shapes: outputs [.., H, Dv] and their natural-log LSEs [.., H], equal shapes. Returns one of each.
    Numerics: weights and sums in at least float32; the output in the dtype of the first, the LSE in the
        widest of all. Differentiable in outputs and LSEs.
    Raises: ValueError for lists of different lengths and tensors that do not fit each other.
    """
    if len(outputs) == 0 or len(outputs) != len(lses):
        raise ValueError(
            f"outputs and lses must be as many, at least one, found {len(outputs)} and {len(lses)}"
        )
    for number, (out, lse) in enumerate(zip(outputs, lses, strict=True)):
        floating(f"outputs[{number}]", out)
        floating(f"lses[{number}]", lse)
        if out.shape != outputs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"part {number} must have an output {tuple(outputs[0].shape)} and an LSE "
                f"{tuple(outputs[0].shape[:-1])}, found {tuple(out.shape)} and {tuple(lse.shape)}"
            )
    dtype = torch.float32
    for x in (*outputs, *lses):
        dtype = torch.promote_types(dtype, x.dtype)
    every = torch.stack([lse.to(dtype) for lse in lses])
    some = (every != float("-inf")).any(dim=0)
    # Filled where no part sees anything, so that no gradient is -inf minus -inf.
    total = every.masked_fill(~some, 0.0).logsumexp(dim=0)
    weights = (every - total).exp()
    unseen = (every == float("-inf"))[..., None]  # whatever stands in the output there, NaN too, is not read
    parts = (part.to(dtype).masked_fill(none, 0.0) for part, none in zip(outputs, unseen, strict=True))
    out = sum(weight[..., None] * part for weight, part in zip(weights, parts, strict=True))
    return out.to(outputs[0].dtype), total.masked_fill(~some, float("-inf"))
