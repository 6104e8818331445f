"""The attention weights of any block of any zoo model, computed beside an ordinary forward pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError


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


class _Eager:
    """Blocks in which no compiled graph runs, in any thread. They may overlap; PyTorch's own must not."""

    def __init__(self) -> None:
        self.lock, self.inside, self.stance = threading.Lock(), 0, ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            if not self.inside:
                self.stance.enter_context(torch.compiler.set_stance("force_eager"))
            self.inside += 1
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if not self.inside:
                    self.stance.close()


_eager = _Eager()


@contextmanager
def capture_attention(model: nn.Module) -> Iterator[dict[str, AttentionRecord]]:
    """Record the attention weights of every attention module that runs inside the block, by module name.

    The records are detached and hold the last forward pass of this thread; the model computes as it always
    does, with any backend, and is left as it was. What `torch.compile` has made of it waits outside: a graph
    without the recording would be run again.

        with capture_attention(model) as records:
            model(images)
        records["levels.0.blocks.0.attn"].weights  # [B, Y, X, H, keys]

    Raises: ConfigError for what has no attention module of the zoo's, a model that torch.jit has traced too.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    inside = getattr(model, "_orig_mod", model).named_modules()
    modules = {name: module for name, module in inside if hasattr(module, "attention_weights")}
    if not modules:
        raise ConfigError(
            f"{type(model).__name__} has no attention module of the zoo's to record; "
            "zoo.analysis shows what timm's transformers attend to"
        )
    records: dict[str, AttentionRecord] = {}
    ours = threading.get_ident()  # the hooks are the model's, which other threads may be running

    def recorder(name: str):  # noqa: ANN202
        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            if threading.get_ident() != ours:
                return
            with torch.no_grad():
                records[name] = module.attention_weights(*given, **named)

        return hook

    hooks = [
        module.register_forward_hook(recorder(name), with_kwargs=True) for name, module in modules.items()
    ]
    try:
        with _eager():
            yield records
    finally:
        for hook in hooks:
            hook.remove()
