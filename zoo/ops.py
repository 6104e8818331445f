"""The operations of the zoo, one import away: tensors in, tensors out, heads last."""

from __future__ import annotations

from zoo.errors import did_you_mean
from zoo.kernels.dispatch import Availability, Explanation, backends, current_backend, use_backend
from zoo.kernels.neighborhood import op as _neighborhood
from zoo.kernels.neighborhood.natten import na1d, na2d, na3d
from zoo.kernels.neighborhood.op import neighborhood_attention, neighborhood_indices

_EXPLAIN = {"neighborhood_attention": _neighborhood.explain}

__all__ = [
    "Availability",
    "Explanation",
    "backends",
    "current_backend",
    "explain",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
    "neighborhood_indices",
    "use_backend",
]


def explain(op: str, *args: object, **kwargs: object) -> Explanation:
    """Say which backend the operation `op` would use for these arguments, with which configuration, and why.

    Raises: ValueError for an unknown operation; what the operation itself raises for wrong arguments.
    """
    if op not in _EXPLAIN:
        raise ValueError(f"unknown operation {op!r}; use {', '.join(_EXPLAIN)}{did_you_mean(op, _EXPLAIN)}")
    return _EXPLAIN[op](*args, **kwargs)
