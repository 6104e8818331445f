"""The attention weights of any block of any zoo model, computed beside an ordinary forward pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionRecord:
    """Attention weights of one module in one forward pass, and what their axes mean."""

    weights: Tensor
    axes: tuple[str, ...]  # one word for every axis of `weights`
    grid: tuple[int, ...]  # the token grid the queries lie on, padding included
    image: tuple[int, ...]  # the part of the grid that is the image, from its first corner
    keys: Tensor | None = None  # [queries, slots], or [B, queries, slots]: flat token of every key, -1: none
    positions: Tensor | None = None  # [B, groups, keys, 2] rows and columns, -1 first token, 1 last
    agents: Tensor | None = None  # [B, agents, H, tokens] where the keys are agents: what these take


def weights_under(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """Weights of queries over keys where a mask [N, M] or [B, N, M] allows: [B, N, H, D] to [B, N, H, M]."""
    with torch.autocast(query.device.type, enabled=False):
        logits = torch.einsum("bnhd,bmhd->bnhm", query.float(), key.float()) * query.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask.to(logits.device)[..., :, None, :], float("-inf"))
    return logits.softmax(dim=-1)


@contextmanager
def capture_attention(model: nn.Module) -> Iterator[dict[str, AttentionRecord]]:
    """Record the attention weights of every attention module that runs inside the block, by module name.

    The records are detached and hold the last forward pass of this thread; the model computes as it always
    does, with any backend, and is left as it was. What `torch.compile` has made of it waits outside: a graph
    without the recording would be run again.

        with capture_attention(model) as records:
            model(images)
        records["levels.0.blocks.0.attn"].weights  # [B, Y, X, H, keys]
    """
    records: dict[str, AttentionRecord] = {}
    ours = threading.get_ident()  # the hooks are the model's, which other threads may be running

    def recorder(name: str):  # noqa: ANN202
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if threading.get_ident() != ours:
                return
            with torch.no_grad():
                records[name] = module.attention_weights(*arguments)

        return hook

    hooks = [
        module.register_forward_hook(recorder(name))
        for name, module in getattr(model, "_orig_mod", model).named_modules()
        if hasattr(module, "attention_weights")
    ]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield records
    finally:
        for hook in hooks:
            hook.remove()
