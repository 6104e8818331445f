"""Activation checkpointing that recomputes with the backend of the first computation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from zoo.ops import current_backend, use_backend


def checkpoint(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` without keeping its activations; backward computes them again.

    Backward often runs after a `use_backend` block has ended, so the block's choice is taken along. (A
    compiled graph has made the choice already.)
    """
    if torch.compiler.is_compiling():
        return torch_checkpoint(function, *arguments, use_reentrant=False)
    backend = current_backend()
    return torch_checkpoint(
        function, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), use_backend(backend))
    )
