"""A folder of images with masks, and a small recipe on it that uses everything random there is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

RECIPE = """
task: segmentation
model: {name: nat_digits, drop_path_rate: 0.2}
head: {name: upernet, channels: 8, auxiliary: 8}
data: {name: folder, root: ROOT, image_size: 32, batch_size: 4, workers: 0}
augment: {rotate: 20}
loss: {dice: 1.0, class_weights: [0.5, 1, 2]}
inference: {window: 32, flip: true, scales: [1.0, 1.25]}
optim: {epochs: 2, warmup_epochs: 1, ema: 0.9, clip_grad: 1.0}
trainer: {log_every: 1, save_every: 2}
"""


def write_pair(root: Path, name: str, pixels: np.ndarray, mask: np.ndarray) -> tuple[Path, Path]:
    """Write an image and its mask below root/images and root/masks."""
    files = root / "images" / f"{name}.png", root / "masks" / f"{name}.png"
    for file, values in zip(files, (pixels, mask), strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.astype(np.uint8)).save(file)
    return files


@pytest.fixture(scope="session")
def masked_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ with 13 and val/ with 5 images of several sizes: bright squares and dark ones on grey."""
    root = tmp_path_factory.mktemp("masked")
    noise = np.random.default_rng(0)
    for split, count in (("train", 13), ("val", 5)):
        for number in range(count):
            height, width = 24 + 3 * (number % 3), 26 + 2 * (number % 2)
            pixels = noise.integers(100, 140, (height, width, 3))
            mask = np.zeros((height, width))
            for label, level in ((1, 230), (2, 20)):
                y, x = noise.integers(0, height - 10), noise.integers(0, width - 10)
                pixels[y : y + 10, x : x + 10], mask[y : y + 10, x : x + 10] = level, label
            mask[:2] = 255
            write_pair(root / split, f"{number:02d}", pixels, mask)
    (root / "classes.txt").write_text("ground\nlight\ndark\n")
    return root


@pytest.fixture(scope="session")
def masked_recipe(masked_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of three steps an epoch and two epochs on that folder."""
    file = tmp_path_factory.mktemp("recipe") / "squares.yaml"
    file.write_text(RECIPE.replace("ROOT", str(masked_folder)))
    return file


@pytest.fixture(scope="session")
def segmented(masked_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, for reading only."""
    from zoo.recipes import api

    folder = tmp_path_factory.mktemp("runs") / "segmented"
    api.train(api.recipe(masked_recipe), run_dir=folder)
    return folder
