"""Measure a trained model on images it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from zoo.errors import ConfigError
from zoo.recipes.config import build, check, override
from zoo.recipes.data.loader import BadImages
from zoo.recipes.run_folder import Trained, load_trained
from zoo.recipes.schema import Recipe
from zoo.recipes.tasks import task_of
from zoo.recipes.tasks.base import Evaluation


def evaluate(
    source: str | Path | Trained,
    data: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    device: str | torch.device | None = None,
) -> Evaluation:
    """Measure a trained model on images it was not trained on.

    `source` is a run folder, a model.safetensors or .ckpt of one, or a model name with weights. `data` is a
    folder as the task wants it (for classification one sub-folder for each class, or val/ with those), or
    the name of data that a library ships; by default the validation images of the recipe it was trained
    with, to which `overrides` (`key=value`) apply. Raises ZooError.
    """
    trained = source if isinstance(source, Trained) else load_trained(source)
    if trained.recipe is None and data is None:
        raise ConfigError(f"{trained.source} comes without data; name a folder of images (data=..., --data)")
    made = _evaluation_recipe(trained, overrides)
    task = task_of(made)
    if data is None:
        images = task.load_half(made, train=False)
    else:
        images = task.other_images(trained, made, data)
    on_bad = BadImages(made.data.max_bad) if made.data.bad_images == "skip" else None
    return task.measure(trained, images, made, device=device, on_bad=on_bad)


def _evaluation_recipe(trained: Trained, overrides: Sequence[str]) -> Recipe:
    raw = trained.recipe.plain() if trained.recipe is not None else {"data": {"name": "folder"}}
    for text in overrides:
        override(raw, text)
    raw.setdefault("model", {})["name"] = trained.name
    made = build(raw, source=str(trained.source))
    check(made, names=False)
    return made
