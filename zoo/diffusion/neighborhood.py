"""Neighborhood attention in a pretrained generator: an image token sees the tokens near it and all text.

Source: Hassani et al. 2025, Generalized Neighborhood Attention (arXiv:2504.16922), applied without training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from zoo import ops
from zoo.diffusion.adapters import Adapter
from zoo.diffusion.handle import Handle, apply
from zoo.diffusion.processor import Config, Processor, check_backend
from zoo.errors import ConfigError
from zoo.layers.tokens import TokenLayout

Window = dict[str, tuple[int, ...]]  # grid, kernel_size, dilation and stride, clamped to each other


@dataclass(frozen=True, kw_only=True)
class NeighborhoodConfig(Config):
    """Kernel size, dilation and stride in tokens: one number for all axes of the grid, or one per axis."""

    kernel_size: int | tuple[int, ...]
    dilation: int | tuple[int, ...] = 1
    stride: int | tuple[int, ...] = 1
    backend: str = "auto"

    def per_axis(self, name: str, axes: int) -> tuple[int, ...]:
        """Return a setting as one number for each of the axes, or raise ConfigError."""
        value, least = getattr(self, name), 2 if name == "kernel_size" else 1
        numbers = tuple(value) if isinstance(value, Sequence) else (value,) * axes
        if len(numbers) != axes or not all(type(number) is int and number >= least for number in numbers):
            raise ConfigError(
                f"{name} must be one whole number >= {least} or {axes} of them, found {value!r}"
            )
        return numbers

    def check(self, axes: int) -> None:
        """Raise ConfigError for settings that do not suit a token grid of so many axes."""
        kernel_size, stride = self.per_axis("kernel_size", axes), self.per_axis("stride", axes)
        self.per_axis("dilation", axes)
        if any(s > k for s, k in zip(stride, kernel_size, strict=True)):
            raise ConfigError(f"stride must not exceed kernel_size {kernel_size}, found {stride}")
        check_backend(self.backend, "neighborhood_attention")

    def window(self, grid: tuple[int, ...]) -> Window:
        """Return grid, kernel_size, dilation and stride such that no window reaches beyond the grid.

        An axis of one token is left out: there is nothing to choose along it.
        """
        settings = [self.per_axis(name, len(grid)) for name in ("kernel_size", "dilation", "stride")]
        axes = []
        for size, kernel_size, dilation, stride in zip(grid, *settings, strict=True):
            if size > 1:
                dilation = min(dilation, size // 2)
                kernel_size = min(kernel_size, size // dilation)
                axes.append((size, kernel_size, dilation, min(stride, kernel_size)))
        sizes, kernel_sizes, dilations, strides = zip(*axes, strict=True)
        return {"grid": sizes, "kernel_size": kernel_sizes, "dilation": dilations, "stride": strides}

    def plan(
        self, adapter: Adapter, layout: TokenLayout, text: int, device: torch.device, phase: Any
    ) -> Window | None:
        """Return the window on this grid; None where it is the whole grid or there is but one token."""
        if layout.image == 1:
            return None
        window = self.window(layout.grid)
        return None if window["kernel_size"] == window["grid"] else window

    def pairs(self, layout: TokenLayout, text: int, plan: Window | None) -> int:
        """Query-key pairs of one head: text sees everything, an image token its neighborhood and the text."""
        neighborhood = layout.image if plan is None else prod(plan["kernel_size"])
        return layout.text * (layout.image + text) + layout.image * (neighborhood + text)

    def arguments(
        self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, plan: Window
    ) -> dict[str, Any]:
        """Return what `ops.neighborhood_attention` takes for a joint sequence, [B, N, H, D]."""
        window = dict(plan)
        grid = window.pop("grid")
        images = {name: layout.split(x)[1] for name, x in (("q", query), ("k", key), ("v", value))}
        images = {name: x.unflatten(1, grid) for name, x in images.items()}  # [B, Y, X, H, D]
        text = {"extra_k": layout.split(key)[0], "extra_v": layout.split(value)[0]}
        return {**images, **window, **text, "backend": self.backend}

    def chosen_backend(self, query: Tensor, key: Tensor, layout: TokenLayout, plan: Window) -> str:
        """Name of the backend for a joint sequence [B, N, H, D] of this type and device."""
        arguments = self.arguments(query, key, key, layout, plan)
        return ops.explain("neighborhood_attention", **arguments).backend


class NeighborhoodProcessor(Processor):
    """Image tokens attend to their neighborhood and the text in one softmax, text tokens to everything."""

    config: NeighborhoodConfig

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, plan: Window | None
    ) -> Tensor:
        if plan is None:
            return self.dense(query, key, value)
        image = ops.neighborhood_attention(**self.config.arguments(query, key, value, layout, plan))
        image = image.flatten(1, -3)
        if layout.text == 0:
            return image
        return layout.join(self.dense(layout.split(query)[0], key, value), image)  # [B, N, H, D]


def apply_neighborhood(
    pipe_or_transformer: Any,
    kernel_size: int | tuple[int, ...],
    *,
    dilation: int | tuple[int, ...] = 1,
    stride: int | tuple[int, ...] = 1,
    dense_steps: int = 0,
    dense_layers: int | Sequence[int | str] = 0,
    backend: str = "auto",
) -> Handle:
    """Let image tokens of a diffusers pipeline or transformer attend to their neighborhood and the text only.

    Units: `kernel_size`, `dilation` and `stride` in tokens of the grid, (rows, columns) or, in a video,
        (frames, rows, columns), clamped to it; a Flux token is 16 x 16 pixels. The first `dense_steps`
        denoising steps stay dense, and so do `dense_layers`: the first n layers, or a list of indices, names
        ("transformer_blocks.0") or patterns ("single_*").
    Returns: a handle with `remove()` and `stats()`, also a context manager. Sizes are read at every call.
    Raises: ConfigError, with nothing changed, for a class or a processor that is not supported, a wrong layer
        name or number, context parallelism, or a second call before `remove()`.
    Source: Hassani et al. 2025 (arXiv:2504.16922), Sec. 4.
    """
    config = NeighborhoodConfig(kernel_size=kernel_size, dilation=dilation, stride=stride, backend=backend)
    return apply(
        pipe_or_transformer,
        NeighborhoodProcessor,
        config,
        method="neighborhood",
        dense_steps=dense_steps,
        dense_layers=dense_layers,
    )
