"""Data sets by name: `digits`, `folder` (shards of one too), and those of torchvision in a closed list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from zoo.errors import ConfigError, DataError, ZooError
from zoo.recipes.data.torchvision_sets import SETS, TorchvisionSet

if TYPE_CHECKING:
    from zoo.recipes.data.loader import Images
    from zoo.recipes.schema import Recipe

NAMES = ("digits", "folder", *SETS)


def load_half(recipe: Recipe, *, train: bool) -> Images:
    """Return the training or the validation images of a recipe.

    Raises ConfigError where `data.root` is needed and not given, DataError for what is wrong with the files.
    """
    data = recipe.data
    if data.name == "digits":
        from zoo.recipes.data.digits import Digits

        return Digits(train=train)
    if data.root is None:
        wanted = "FOLDER with train/ and val/ inside" if data.name == "folder" else "a folder for its files"
        raise ConfigError(f"data.name={data.name} needs data.root={wanted}")
    if data.name == "folder":
        from zoo.recipes.data.images import split_of
        from zoo.recipes.data.shards import images_in

        return split_of(data.root, "train" if train else "val", images_in)
    return TorchvisionSet(data.name, data.root, train=train, download=data.download)


def load_halves(recipe: Recipe, load: Callable[..., Images] = load_half) -> tuple[Images, Images]:
    """Return the training and the validation images, of the same classes and as many as the recipe says."""
    train, val = load(recipe, train=True), load(recipe, train=False)
    if train.classes != val.classes:
        only = {
            "only in train": sorted(set(train.classes) - set(val.classes)),
            "only in val": sorted(set(val.classes) - set(train.classes)),
        }
        told = "; ".join(f"{where}: {_some(names)}" for where, names in only.items() if names)
        raise DataError(
            f"{recipe.data.root}: train and val hold different classes ({told}); make them the same"
        )
    if len(train.classes) < 2 and recipe.task in ("classification", "segmentation"):
        fix = "sort the images into a sub-folder of train/ and of val/ for each"
        if recipe.task == "segmentation":
            fix = "add one for the background to classes.txt or model.num_classes"
        where = recipe.data.root if recipe.data.root is not None else f"data.name={recipe.data.name}"
        raise DataError(
            f"{where} holds one class only ({_some(train.classes)}); two or more are wanted: {fix}"
        )
    wanted = recipe.model.num_classes
    if wanted is not None and wanted != len(train.classes):
        raise DataError(
            f"model.num_classes={wanted}, but the data has {len(train.classes)} classes "
            f"({_some(train.classes)}); correct it"
        )
    return train, val


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def open_halves(recipe: Recipe) -> tuple[Images, Images] | None:
    """Return the training and the validation images of a recipe without importing torch.

    None where that cannot be: torchvision's sets, latents, adapters. Raises ConfigError, DataError.
    """
    data = recipe.data
    if data.name in SETS or recipe.task == "lora" or getattr(data, "vae", None) is not None:
        return None
    load = load_half
    if recipe.task == "segmentation":
        from zoo.recipes.data import masks

        if data.name not in ("digit_scenes", "folder", "ade20k"):
            return None
        load = masks.load_half
    if recipe.task == "generation" and data.name == "digit_pairs":
        return None
    try:
        return load_halves(recipe, load)
    except ZooError as error:
        error.args = (recipe.conceal(str(error)),)
        raise
