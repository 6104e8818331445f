"""The pictures of a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from zoo.recipes.logs import read_metrics


def curves(metrics: Path, path: Path) -> None:
    """Draw losses, the metrics of validation and learning rate over the steps."""
    rows = read_metrics(metrics)
    scores = [name for name in (rows[0] if rows else ()) if name.startswith("val_") and name != "val_loss"]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    loss, score, rate = figure.subplots(1, 3)
    for axes, title, names in (
        (loss, "loss", ("train_loss", "val_loss")),
        (score, "validation", scores),
        (rate, "learning rate", ("lr",)),
    ):
        for name in names:
            points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        axes.set(title=title, xlabel="step")
        if axes.lines:
            axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def confusion(matrix: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix, rows are the truth; with up to 30 classes also the numbers and names."""
    side = min(12.0, 3.5 + 0.35 * len(classes))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the class", fraction=0.04)
    axes.set(xlabel="predicted", ylabel="true", title=f"{np.trace(matrix)} of {matrix.sum()} right")
    if len(classes) <= 30:
        ticks = range(len(classes))
        axes.set_xticks(ticks, classes, rotation=45 if max(map(len, classes)) > 2 else 0, ha="center")
        axes.set_yticks(ticks, classes)
        for row, column in zip(*matrix.nonzero(), strict=True):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(
                column, row, str(matrix[row, column]), ha="center", va="center", fontsize=8, color=colour
            )
    figure.savefig(path, dpi=120)


def mistakes(images: Sequence[Image.Image], titles: Sequence[str], path: Path) -> None:
    """Draw the images that a model got most wrong, at most 24."""
    count = min(24, len(images))
    columns = min(8, max(count, 1))
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(1.5 * columns, 1.9 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, image, title in zip(figure.axes, images, titles, strict=False):
        axes.imshow(image)
        axes.set_title(title, fontsize=7)
    figure.suptitle("most confident mistakes" if count else "no mistakes", fontsize=9)
    figure.savefig(path, dpi=120)
