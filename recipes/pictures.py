"""The pictures of a run folder."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
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


def confusion(matrix: np.ndarray, classes: Sequence[str], path: Path, *, counts: bool = True) -> None:
    """Draw a confusion matrix, rows are the truth; with up to 30 classes also names, `counts` or shares."""
    side = min(12.0, 3.5 + 0.35 * len(classes))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the class", fraction=0.04)
    axes.set(xlabel="predicted", ylabel="true", title=f"{np.trace(matrix):,} of {matrix.sum():,} right")
    if len(classes) <= 30:
        ticks = range(len(classes))
        axes.set_xticks(ticks, classes, rotation=45 if max(map(len, classes)) > 2 else 0, ha="center")
        axes.set_yticks(ticks, classes)
        for row, column in zip(*matrix.nonzero(), strict=True):
            colour = "white" if share[row, column] > 0.5 else "black"
            text = str(matrix[row, column]) if counts else f"{100 * share[row, column]:.0f}"
            if text != "0":
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
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


# ---- masks


def palette(count: int) -> np.ndarray:
    """Return that many colours, uint8 [count, 3], neighbours far apart; more add to them."""
    colours = [
        colorsys.hsv_to_rgb((0.6 + 0.618034 * i) % 1, (0.85, 0.55)[i % 2], (0.95, 0.7, 0.85)[i % 3])
        for i in range(count)
    ]
    return np.round(255 * np.array(colours).reshape(-1, 3)).astype(np.uint8)


def mask_image(mask: np.ndarray) -> Image.Image:
    """Return a mask as an image whose values are the class numbers, with colours where they fit a palette."""
    if mask.max(initial=0) > 255:
        return Image.fromarray(mask.astype(np.uint16))
    image = Image.fromarray(mask.astype(np.uint8)).convert("P")
    image.putpalette(palette(256).tobytes())
    return image


def overlay(image: Image.Image, mask: np.ndarray, strength: float = 0.5) -> Image.Image:
    """Return an image under the colours of its classes; pixels without one (negative) stay as they are."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    colours = palette(int(mask.max(initial=0)) + 1)[mask.clip(0)]
    mixed = np.where((mask >= 0)[..., None], (1 - strength) * pixels + strength * colours, pixels)
    return Image.fromarray(np.round(mixed).astype(np.uint8))


def overlays(
    rows: Sequence[tuple[Image.Image, np.ndarray, np.ndarray, str]], classes: Sequence[str], path: Path
) -> None:
    """Draw images (image, truth, prediction, title) with both masks, and what the colours mean."""
    figure = Figure(figsize=(2 * max(1, len(rows)), 7), layout="constrained")
    axes = figure.subplots(3, max(1, len(rows)), squeeze=False)
    for each in axes.flat:
        each.set_axis_off()
    for column, (image, truth, found, title) in zip(axes.T, rows, strict=False):
        for place, picture in zip(column, (image, overlay(image, truth), overlay(image, found)), strict=True):
            place.imshow(picture)
        column[0].set_title(title, fontsize=7)
    for place, name in zip(axes[:, 0], ("image", "truth", "prediction"), strict=True):
        place.text(
            -0.05, 0.5, name, transform=place.transAxes, rotation=90, va="center", ha="right", fontsize=8
        )
    seen = sorted({int(i) for _, truth, found, _ in rows for i in np.union1d(truth[truth >= 0], found)})
    colours = palette(len(classes)) / 255
    figure.legend(
        handles=[Patch(color=colours[i], label=classes[i]) for i in seen[:40]],
        loc="outside lower center", ncols=min(len(seen), 11) or 1, fontsize=7, frameon=False,
    )  # fmt: skip
    figure.savefig(path, dpi=120)


def class_iou(classes: Sequence[str], values: Sequence[float | None], path: Path) -> None:
    """Draw the intersection over union of each class, best first; classes that do not occur are left out."""
    known = sorted(((v, n) for v, n in zip(values, classes, strict=True) if v is not None), reverse=True)
    figure = Figure(figsize=(max(4, 0.25 * len(known) + 2), 3.6), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(known)), [100 * value for value, _ in known], color="tab:blue")
    axes.set_xticks(range(len(known)), [name for _, name in known], rotation=90, fontsize=7)
    mean = 100 * sum(value for value, _ in known) / max(1, len(known))
    axes.axhline(mean, color="black", linewidth=0.8)
    axes.set(ylabel="IoU (%)", ylim=(0, 100), title=f"mean {mean:.2f} %")
    figure.savefig(path, dpi=120)


# ---- generated images


def tiles(images: np.ndarray, path: Path, *, columns: int, side: int = 48) -> None:
    """Draw images uint8 [N, y, x, 1 or 3] in rows, small ones enlarged without blurring to about `side`."""
    count, height, width, channels = images.shape
    factor, gap = max(1, side // max(height, width)), 2
    height, width = height * factor + gap, width * factor + gap
    sheet = np.full((-(-count // columns) * height + gap, min(count, columns) * width + gap, 3), 64, np.uint8)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        y, x = row * height + gap, column * width + gap
        large = image.repeat(factor, 0).repeat(factor, 1)
        sheet[y : y + height - gap, x : x + width - gap] = large
    Image.fromarray(sheet).save(path)
