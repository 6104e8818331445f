"""Data sets by name: `digits`, `folder`, and those of torchvision in a closed list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.errors import ConfigError, DataError
from zoo.recipes.data.torchvision_sets import SETS, TorchvisionSet

if TYPE_CHECKING:
    from zoo.recipes.config import Recipe
    from zoo.recipes.data.loader import Images

NAMES = ("digits", "folder", *SETS)


def load_halves(recipe: Recipe) -> tuple[Images, Images]:
    """Return the training and the validation images of a recipe.

    Raises ConfigError where `data.root` is needed and not given, DataError for what is wrong with the files.
    """
    data = recipe.data
    if data.name == "digits":
        from zoo.recipes.data.digits import Digits

        train, val = Digits(train=True), Digits(train=False)
    elif data.root is None:
        wanted = "FOLDER with train/ and val/ inside" if data.name == "folder" else "a folder for its files"
        raise ConfigError(f"data.name={data.name} needs data.root={wanted}")
    elif data.name == "folder":
        from zoo.recipes.data.images import train_and_val

        train, val = train_and_val(data.root)
    else:
        train, val = (
            TorchvisionSet(data.name, data.root, train=half, download=data.download) for half in (True, False)
        )
    wanted = recipe.model.num_classes
    if wanted is not None and wanted != len(train.classes):
        raise DataError(
            f"model.num_classes={wanted}, but the data has {len(train.classes)} classes "
            f"({', '.join(train.classes[:5])}{', ...' if len(train.classes) > 5 else ''}); correct it"
        )
    return train, val
