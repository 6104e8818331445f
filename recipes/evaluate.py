"""Measure a trained model on images it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from zoo.errors import ConfigError, DataError
from zoo.recipes.config import Recipe, build, check, override
from zoo.recipes.data import load_half
from zoo.recipes.data.images import ImageFolder
from zoo.recipes.data.loader import BadImage, BadImages, EpochLoader, Images
from zoo.recipes.data.transforms import eval_transform
from zoo.recipes.run_folder import Trained, choose_device, load_trained

MAX_CONFUSION = 5000


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Accuracies in 0..1 over `images` images; `confusion[true, predicted]` counts."""

    source: str
    images: int
    top1: float
    top5: float | None  # None where there are at most five classes
    loss: float
    classes: list[str]
    confusion: np.ndarray | None = field(repr=False)  # None for more than MAX_CONFUSION classes
    mistakes: list[tuple[str, str, str, float]] = field(
        repr=False
    )  # image, true, predicted, confidence; worst first
    skipped: int = 0


def evaluate(
    source: str | Path | Trained,
    data: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    device: str | torch.device | None = None,
) -> Evaluation:
    """Measure a trained model on images it was not trained on.

    `source` is a run folder, a model.safetensors or .ckpt of one, or a model name with weights. `data` is a
    folder with one sub-folder for each class (or with val/ inside), or `digits`; by default the validation
    images of the recipe it was trained with, to which `overrides` (`key=value`) apply. Raises ZooError.
    """
    trained = source if isinstance(source, Trained) else load_trained(source)
    if trained.recipe is None and data is None:
        raise ConfigError(f"{trained.source} comes without data; name a folder of images (data=..., --data)")
    made = _evaluation_recipe(trained, overrides)
    if data is not None and str(data) != "digits":
        root = Path(data)
        images: Images = ImageFolder(root / "val" if (root / "val").is_dir() else root)
    else:
        if data is not None:
            made.data.name = "digits"
        images = load_half(made, train=False)
    if images.classes != trained.classes:
        images = _Renumbered(images, _numbers(images.classes, trained))
    on_bad = BadImages(made.data.max_bad) if made.data.bad_images == "skip" else None
    return measure(trained, images, made, device=device, on_bad=on_bad)


def _evaluation_recipe(trained: Trained, overrides: Sequence[str]) -> Recipe:
    raw = trained.recipe.plain() if trained.recipe is not None else {"data": {"name": "folder"}}
    for text in overrides:
        override(raw, text)
    raw.setdefault("model", {})["name"] = trained.name
    made = build(raw, source=str(trained.source))
    check(made, names=False)
    return made


def _numbers(classes: Sequence[str], trained: Trained) -> list[int]:
    """Return the model's number of each class, by its name or by what data sets call its folder."""
    for names in (trained.classes, trained.folders):
        numbers = {name: number for number, name in enumerate(names)}
        if all(name in numbers for name in classes):
            return [numbers[name] for name in classes]
    unknown = [name for name in classes if name not in trained.classes]
    raise DataError(
        f"the data has classes that {trained.source} does not know: {', '.join(unknown[:5])}"
        f"{', ...' if len(unknown) > 5 else ''}; it knows {', '.join(trained.classes[:5])}"
        f"{', ...' if len(trained.classes) > 5 else ''}"
    )


class _Renumbered:
    """The images of a data set, labelled as a model counts."""

    def __init__(self, images: Images, numbers: list[int]) -> None:
        self.images, self.classes, self.notes = images, images.classes, images.notes
        self.labels = [numbers[label] for label in images.labels]

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Image.Image:
        return self.images.load(index)

    def describe(self, index: int) -> str:
        return self.images.describe(index)

    def short(self, index: int) -> str:
        return self.images.short(index)


@torch.inference_mode()
def measure(
    trained: Trained,
    images: Images,
    made: Recipe,
    *,
    device: str | torch.device | None = None,
    on_bad: Any = None,
) -> Evaluation:
    """Run a model over images, with the batch size and workers of a recipe; bad images go to `on_bad`."""
    data = made.data
    count = len(trained.classes)
    where = choose_device(device)
    model = trained.model.to(where)
    batch_size = data.val_batch_size if data.val_batch_size is not None else data.batch_size
    skipped: set[int] = set()

    def skip(source: Images, bad: BadImage) -> None:
        skipped.add(bad.index)
        on_bad(source, bad)

    loader = EpochLoader(
        images,
        eval_transform(trained.settings),
        batch_size=batch_size,
        workers=data.workers,
        on_bad=skip if on_bad is not None else None,
    )
    losses, best, labels, sure = [], [], [], []
    try:
        for batch, truth in loader:
            logits = model(batch.to(where)).float().cpu()
            losses.append(F.cross_entropy(logits, truth, reduction="none"))
            best.append(logits.topk(min(5, count)).indices)
            sure.append(logits.softmax(1).amax(1))
            labels.append(truth)
    finally:
        loader.close()
    loss, top, truth, certainty = map(torch.cat, (losses, best, labels, sure))
    guesses = top[:, 0]
    order = [index for index in range(len(images)) if index not in skipped]
    wrong = (guesses != truth).nonzero()[:, 0].tolist()
    wrong.sort(key=lambda i: -certainty[i].item())
    confusion = None
    if count <= MAX_CONFUSION:
        confusion = np.bincount(truth * count + guesses, minlength=count**2).reshape(count, count)
    return Evaluation(
        source=str(trained.source),
        images=len(truth),
        top1=(guesses == truth).double().mean().item(),
        top5=(top == truth[:, None]).any(1).double().mean().item() if count > 5 else None,
        loss=loss.double().mean().item(),
        classes=trained.classes,
        confusion=confusion,
        mistakes=[
            (
                images.short(order[i]),
                trained.classes[truth[i]],
                trained.classes[guesses[i]],
                certainty[i].item(),
            )
            for i in wrong
        ],
        skipped=len(skipped),
    )
