"""Measure a trained model on images it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from zoo.errors import ConfigError
from zoo.recipes.config import all_keys, build, check, override
from zoo.recipes.data.loader import BadImages
from zoo.recipes.run_folder import Trained, finding_data, load_trained
from zoo.recipes.schema import Recipe, pick
from zoo.recipes.tasks import task_of
from zoo.recipes.tasks.base import Evaluation

# What measuring reads of a recipe: the rest has made the network or trained it. Of the data, what the
# network sees of an image came with its weights and is made anew where it is overridden.
READ = ("data.", "inference.", "sampling.", "diffusion.", "lora.guidance")
INPUT = {"data.image_size", "data.mean", "data.std", "data.crop_pct", "data.interpolation"}


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
    with. `overrides` (`key=value`) change where the images are and how they are seen, such as
    data.image_size=288 or inference.flip=true. Raises ZooError.
    """
    trained = source if isinstance(source, Trained) else load_trained(source)
    if trained.recipe is None and data is None:
        raise ConfigError(f"{trained.source} comes without data; name a folder of images (data=..., --data)")
    made, changed = _evaluation_recipe(trained, overrides)
    _refuse_idle(trained, made, changed, data)
    task = task_of(made)
    if changed & INPUT:
        trained = replace(trained, settings=task.settings(made, trained.model))
    if data is None:
        with finding_data(made):
            images = task.load_half(made, train=False)
    else:
        images = task.other_images(trained, made, data)
    on_bad = BadImages(made.data.max_bad) if made.data.bad_images == "skip" else None
    try:
        return task.measure(trained, images, made, device=device, on_bad=on_bad)
    except AssertionError as error:
        if "data.image_size" not in changed:
            raise
        # What timm's networks of one size say.
        raise ConfigError(
            f"{trained.name} does not take data.image_size={made.data.image_size}: {error}"
        ) from None


def _evaluation_recipe(trained: Trained, overrides: Sequence[str]) -> tuple[Recipe, set[str]]:
    """Return the recipe of an evaluation and the keys in which it is not that of the training."""
    raw = trained.recipe.plain() if trained.recipe is not None else {"data": {"name": "folder"}}
    raw.setdefault("model", {})["name"] = trained.name
    before = build(raw, source=str(trained.source)).plain()
    for text in overrides:
        override(raw, text)
    made = build(raw, source=str(trained.source))
    check(made, names=False)
    after = made.plain()
    return made, {key for key in all_keys(type(made)) if pick(before, key) != pick(after, key)}


def _refuse_idle(trained: Trained, made: Recipe, changed: set[str], data: str | Path | None) -> None:
    """Raise ConfigError for an override that would change nothing, as if it had been measured."""
    for key in sorted(changed):
        given = f"{key}={made.shown(key)}"
        if key == "data.balance":
            raise ConfigError(f"{given} has no effect on an evaluation of {trained.source}; leave it out")
        if not key.startswith(READ):
            groups = [
                part + "*" * part.endswith(".") for part in READ if hasattr(made, part.partition(".")[0])
            ]
            raise ConfigError(
                f"{given} is of the network or its training, and {trained.source} is trained; an evaluation "
                f"takes {', '.join(groups)}"
            )
        if data is not None and key in ("data.name", "data.root"):
            raise ConfigError(f"{given} and data={data} are both given; choose one")
