"""A small image folder and a recipe on it that uses everything random there is; one run takes two seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

RECIPE = """
model: {name: nat_digits, drop_path_rate: 0.2}
data: {name: folder, batch_size: 8, val_batch_size: 4, workers: 0}
augment: {mixup: 0.8, cutmix: 1.0, random_erasing: 0.5, auto_augment: rand-m9-mstd0.5, label_smoothing: 0.1}
optim: {epochs: 2, warmup_epochs: 1, ema: 0.9, clip_grad: 1.0}
trainer: {log_every: 1, save_every: 2}
"""


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ with 2 x 13 and val/ with 2 x 5 images of the classes dark and light."""
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for split, count in (("train", 13), ("val", 5)):
        for name, level in (("dark", 60), ("light", 190)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(level - 50, level + 50, (14, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return root


@pytest.fixture(scope="session")
def recipe_file(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of three steps an epoch and two epochs on that folder."""
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(RECIPE.replace("name: folder,", f"name: folder, root: {image_folder},"))
    return file


@pytest.fixture
def run(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Train the small recipe, without its pictures: run("folder", "key=value", ..., resume=...)."""
    from zoo.recipes import api, pictures

    for name in ("curves", "confusion", "mistakes"):
        monkeypatch.setattr(pictures, name, lambda *arguments: None)

    def train(name: str, *overrides: str, **keywords: object) -> object:
        made = api.recipe(recipe_file, overrides)
        if "resume" not in keywords:
            keywords["run_dir"] = tmp_path / name
        return api.train(made, **keywords)

    return train


@pytest.fixture(scope="session")
def finished(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, for reading only."""
    from zoo.recipes import api

    folder = tmp_path_factory.mktemp("runs") / "finished"
    api.train(api.recipe(recipe_file), run_dir=folder)
    return folder


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Do something in the forward pass of a step, or in the validation after an epoch."""

    def install(step: int, action, *, validating: bool = False) -> None:
        from zoo.recipes.training import Training

        name = "validation_step" if validating else "training_step"
        original = getattr(Training, name)

        def hooked(self, batch, batch_idx):
            where = self.current_epoch + 1 if validating else self.trainer.global_step + 1
            if where == step:
                monkeypatch.setattr(Training, name, original)
                action()
            return original(self, batch, batch_idx)

        monkeypatch.setattr(Training, name, hooked)

    return install
