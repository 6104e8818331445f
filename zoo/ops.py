"""The operations of the zoo, one import away: tensors in, tensors out, heads last."""

from __future__ import annotations

from zoo.errors import did_you_mean
from zoo.kernels.agent import op as _agent
from zoo.kernels.agent.op import agent_attention
from zoo.kernels.aligned import op as _aligned
from zoo.kernels.aligned.op import aligned_attention
from zoo.kernels.bilevel import op as _bilevel
from zoo.kernels.bilevel.op import bilevel_routing_attention, region_means, route
from zoo.kernels.block_sparse import op as _block_sparse
from zoo.kernels.block_sparse.blocks import BlockList
from zoo.kernels.block_sparse.op import block_sparse_attention
from zoo.kernels.channel import op as _channel
from zoo.kernels.channel.op import channel_attention
from zoo.kernels.deformable import op as _deformable
from zoo.kernels.deformable.op import deformable_attention, deformable_sample
from zoo.kernels.dense import op as _dense
from zoo.kernels.dense.op import attention
from zoo.kernels.dispatch import Availability, Explanation, backends, current_backend, use_backend
from zoo.kernels.gated_residual import op as _gated_residual
from zoo.kernels.gated_residual.op import gated_residual
from zoo.kernels.merge.op import merge_attentions
from zoo.kernels.modulated_norm import op as _modulated_norm
from zoo.kernels.modulated_norm.op import modulated_norm
from zoo.kernels.neighborhood import op as _neighborhood
from zoo.kernels.neighborhood.natten import na1d, na2d, na3d
from zoo.kernels.neighborhood.op import neighborhood_attention, neighborhood_indices
from zoo.kernels.rotary_norm import op as _rotary_norm
from zoo.kernels.rotary_norm.op import rotary_norm
from zoo.kernels.window import op as _window
from zoo.kernels.window.op import window_attention

_EXPLAIN = {
    "agent_attention": _agent.explain,
    "aligned_attention": _aligned.explain,
    "attention": _dense.explain,
    "bilevel_routing_attention": _bilevel.explain,
    "block_sparse_attention": _block_sparse.explain,
    "channel_attention": _channel.explain,
    "deformable_attention": _deformable.explain_attention,
    "deformable_sample": _deformable.explain_sample,
    "gated_residual": _gated_residual.explain,
    "modulated_norm": _modulated_norm.explain,
    "neighborhood_attention": _neighborhood.explain,
    "rotary_norm": _rotary_norm.explain,
    "window_attention": _window.explain,
}

__all__ = [
    "Availability",
    "BlockList",
    "Explanation",
    "agent_attention",
    "aligned_attention",
    "attention",
    "backends",
    "bilevel_routing_attention",
    "block_sparse_attention",
    "channel_attention",
    "current_backend",
    "deformable_attention",
    "deformable_sample",
    "explain",
    "gated_residual",
    "merge_attentions",
    "modulated_norm",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
    "neighborhood_indices",
    "region_means",
    "rotary_norm",
    "route",
    "use_backend",
    "window_attention",
]


def explain(op: str, *args: object, **kwargs: object) -> Explanation:
    """Say which backend the operation `op` would use for these arguments, with which configuration, and why.

    Raises: ValueError for an unknown operation; what the operation itself raises for wrong arguments.
    """
    if op not in _EXPLAIN:
        raise ValueError(f"unknown operation {op!r}; use {', '.join(_EXPLAIN)}{did_you_mean(op, _EXPLAIN)}")
    try:
        return _EXPLAIN[op](*args, **kwargs)
    except TypeError as error:  # arguments that the operation does not have
        raise TypeError(str(error).replace("_check()", f"{op}()")) from None
