"""What one place of an image attends to: its neighborhood and the attention weights in it, block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from zoo.attention import capture_attention
from zoo.errors import ConfigError, ResourceError, did_you_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_PANELS = 4


def explain_neighborhood(
    model: nn.Module,
    image: torch.Tensor,
    *,
    query: tuple[float, float] = (0.5, 0.5),
    blocks: tuple[str, ...] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the image, the query's neighborhood in it, and the attention weights of some blocks.

    Shapes: `image` is [3, height, width] or [1, 3, height, width], normalised as the model wants it.
    Units: `query` is (down, right) as fractions of the image, 0 to 1; weights are means over the heads.
    `blocks` names attention modules as `capture_attention` does; by default at most four, spread in depth.
    Raises: ConfigError for a query outside the image, an unknown block or a model without neighborhood
    attention; ResourceError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ResourceError("pictures need matplotlib: pip install 'attnzoo[recipes]'") from error
    if len(query) != 2 or not all(0.0 <= fraction <= 1.0 for fraction in query):
        raise ConfigError(f"query must be two fractions between 0 and 1 (down, right), found {query}")
    batch = image if image.ndim == 4 else image[None]
    if batch.ndim != 4 or batch.shape[0] != 1:
        raise ConfigError(f"image must be [3, height, width] of one image, found shape {tuple(image.shape)}")

    with torch.no_grad(), capture_attention(model) as records:
        model(batch)
    names = [name for name, record in records.items() if record.keys is not None and len(record.grid) == 2]
    if not names:
        raise ConfigError(f"{type(model).__name__} has no neighborhood attention to draw")
    for name in blocks or ():
        if name not in names:
            raise ConfigError(f"no attention block {name!r} in this model{did_you_mean(name, names)}")
    chosen = list(blocks) if blocks else [names[i] for i in _spread(len(names), MAX_PANELS)]

    height, width = batch.shape[-2:]
    picture = _displayable(batch[0])
    figure = Figure(figsize=(2.6 * (len(chosen) + 1), 3.0), layout="constrained")
    axes = figure.subplots(1, len(chosen) + 1, squeeze=False)[0]
    axes[0].imshow(picture)
    axes[0].set_title(title or "query", fontsize=9)
    axes[0].plot(query[1] * width - 0.5, query[0] * height - 0.5, "r+", markersize=12, markeredgewidth=2)
    for axis, name in zip(axes[1:], chosen, strict=True):
        record = records[name]
        rows, columns = record.grid
        y, x = (min(int(f * side), side - 1) for f, side in zip(query, record.image, strict=True))
        weights = record.weights[0, y, x].float().mean(dim=0).cpu().numpy()
        keys = (record.keys if record.keys.ndim == 2 else record.keys[0])[y * columns + x].cpu().numpy()
        heat = np.zeros(rows * columns)
        heat[keys[keys >= 0]] = weights[keys >= 0]
        cell = (width / record.image[1], height / record.image[0])
        axis.imshow(picture)
        # A padded grid reaches beyond the image at the bottom and right.
        extent = (-0.5, columns * cell[0] - 0.5, rows * cell[1] - 0.5, -0.5)
        axis.imshow(heat.reshape(rows, columns), extent=extent, cmap="magma", alpha=0.65)
        axis.set_xlim(-0.5, max(width, columns * cell[0]) - 0.5)
        axis.set_ylim(max(height, rows * cell[1]) - 0.5, -0.5)
        for key in keys[keys >= 0]:
            corner = (key % columns * cell[0] - 0.5, key // columns * cell[1] - 0.5)
            axis.add_patch(Rectangle(corner, *cell, fill=False, edgecolor="white", linewidth=0.6))
        corner = (x * cell[0] - 0.5, y * cell[1] - 0.5)
        axis.add_patch(Rectangle(corner, *cell, fill=False, edgecolor="red", linewidth=1.6))
        axis.set_title(f"{name}\n{record.image[0]} x {record.image[1]} tokens", fontsize=7)
    for axis in axes:
        axis.set_axis_off()
    return figure


def _spread(count: int, most: int) -> list[int]:
    """Indices of at most `most` of `count` blocks, evenly spread in depth and ending with the last."""
    if count <= most:
        return list(range(count))
    return [round((i + 1) * count / most) - 1 for i in range(most)]


def _displayable(image: torch.Tensor) -> np.ndarray:
    """A normalised [3, height, width] image as [height, width, 3] between 0 and 1."""
    image = image.detach().float().cpu()
    low, high = image.amin(), image.amax()
    image = (image - low) / (high - low).clamp_min(1e-12)
    return image.expand(3, -1, -1).permute(1, 2, 0).numpy()
