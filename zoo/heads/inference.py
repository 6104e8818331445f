"""From logits on a coarse map to the class of every pixel: whole or in windows, several views averaged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn

from zoo.errors import ConfigError, at_least
from zoo.heads.layers import resize


def segment(
    model: nn.Module,
    views: Sequence[Tensor],
    size: tuple[int, int],
    *,
    window: int | None = None,
    stride: int | None = None,
    flip: bool = False,
) -> Tensor:
    """Return log-probabilities [B, classes, height, width] at `size` from views of the same images.

    `views` are the images [B, C, y, x] at one or several sizes; their probabilities are averaged, and with
    `flip` those of the mirrored views with them. `window` pixels at a time are seen, `stride` pixels apart
    (None: two thirds of the window), and logits are averaged where windows overlap; None sees all at once. A
    model of one input size sees windows of that size, with zeros beyond the image, as it does in training.
    Raises: ConfigError for a window or stride below 1, and for a stride that leaves pixels out.
    """
    only = only_size(model)
    window = only if window is None else window
    for name, length in (("window", window), ("stride", stride)):
        if length is not None:
            at_least(1, **{name: length})
    if window is not None and stride is not None and stride > window:
        raise ConfigError(f"stride must be at most the window of {window} pixels, found {stride}")
    total: Tensor | None = None
    count = 0
    for view in views:
        for mirrored in (False, True) if flip else (False,):
            images = view.flip(-1) if mirrored else view
            logits = _padded(model, images, only, window, stride)
            logits = resize(logits.flip(-1) if mirrored else logits, size)
            if len(views) == 1 and not flip:
                return logits.log_softmax(1)
            probabilities = logits.softmax(1)
            total = probabilities if total is None else total + probabilities
            count += 1
    return (total / count).log()


def only_size(model: nn.Module) -> int | None:
    """Return the side in pixels of the squares that a model takes, None where it takes images of any size."""
    facts = getattr(model, "pretrained_cfg", None) or {}
    if not facts.get("fixed_input_size"):
        return None
    # timm's configuration is that of the published weights, whatever size a model was built for.
    embed = next((module for module in model.modules() if isinstance(module, PatchEmbed)), None)
    if embed is None or embed.img_size is None:
        return facts["input_size"][-1]
    return embed.img_size[-1] if embed.strict_img_size else None


def _padded(
    model: nn.Module, images: Tensor, least: int | None, window: int | None, stride: int | None
) -> Tensor:
    if window is None:
        return _whole(model, images)
    height, width = images.shape[-2:]
    below, right = (max(0, (least or 0) - length) for length in (height, width))
    images = F.pad(images, (0, right, 0, below))
    return _windows(model, images, window, stride)[..., :height, :width]


def _whole(model: nn.Module, images: Tensor) -> Tensor:
    return resize(model(images).float(), images)


def _windows(model: nn.Module, images: Tensor, window: int, stride: int | None) -> Tensor:
    step = stride if stride is not None else max(1, window * 2 // 3)
    height, width = images.shape[-2:]
    total: Tensor | None = None
    seen = torch.zeros(height, width, device=images.device)
    for y in _starts(height, window, step):
        for x in _starts(width, window, step):
            area = (..., slice(y, y + window), slice(x, x + window))
            logits = _whole(model, images[area])
            if total is None:
                total = logits.new_zeros(len(images), logits.shape[1], height, width)
            total[area] += logits
            seen[area] += 1
    return total / seen


def _starts(length: int, window: int, step: int) -> Iterator[int]:
    """Where windows begin: `step` apart, and the last one ends at the border."""
    last = max(0, length - window)
    yield from range(0, last, step)
    yield last
