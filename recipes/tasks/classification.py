"""Classification of images: one class each; cross-entropy, mixup and cutmix, top-1 and top-5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import ConfigError, DataError
from zoo.recipes import pictures
from zoo.recipes.data import load_half
from zoo.recipes.data.loader import BadImage, EpochLoader, Images
from zoo.recipes.data.shards import images_in
from zoo.recipes.data.transforms import (
    ImageOnly,
    InputSettings,
    JointTransform,
    eval_transform,
    train_transform,
)
from zoo.recipes.run_folder import Trained, choose_device
from zoo.recipes.schema import Recipe
from zoo.recipes.tasks import base

MAX_CONFUSION = 5000


@dataclass(frozen=True, kw_only=True)
class Evaluation(base.Evaluation):
    """Accuracies in 0..1; `confusion[true, predicted]` counts."""

    top1: float
    top5: float | None  # None where there are at most five classes
    confusion: np.ndarray | None = field(repr=False)  # None for more than MAX_CONFUSION classes
    mistakes: list[tuple[str, str, str, float]] = field(
        repr=False
    )  # image, true, predicted, confidence; worst first

    def headline(self, of: str = "images") -> str:
        top5 = f", top-5 {100 * self.top5:.2f} %" if self.top5 is not None else ""
        return f"{100 * self.top1:.2f} % of {self.images:,} {of} right{top5}"

    def metrics(self) -> dict[str, float]:
        metrics = {"val_top1": self.top1, "val_loss": self.loss}
        return metrics if self.top5 is None else {**metrics, "val_top5": self.top5}

    def facts(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "images": self.images,
            "skipped": self.skipped,
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "classes": self.classes,
            "confusion": self.confusion.tolist() if self.confusion is not None else None,
            "mistakes": [
                dict(zip(("image", "true", "predicted", "probability"), mistake, strict=True))
                for mistake in self.mistakes
            ],
        }


@dataclass(frozen=True, kw_only=True)
class Prediction(base.Prediction):
    """The most probable classes of one image, most probable first."""

    classes: list[str]
    probabilities: list[float]

    def line(self) -> str:
        shares = zip(self.classes, self.probabilities, strict=True)
        return ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares)

    def facts(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "classes": self.classes,
            "probabilities": self.probabilities,
            "error": self.error,
        }


class Classification(base.Objective):
    """Cross-entropy, of mixed images where the recipe mixes them, and accuracies."""

    def __init__(self, recipe: Recipe, num_classes: int) -> None:
        # Only training needs these two, which take a second to import.
        from timm.data import Mixup
        from torchmetrics import MeanMetric
        from torchmetrics.classification import MulticlassAccuracy

        super().__init__()
        augment = recipe.augment
        self.smoothing = augment.label_smoothing
        self.mixup = None
        if augment.mixup or augment.cutmix:
            self.mixup = Mixup(
                augment.mixup,
                augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.mix_switch,
                label_smoothing=augment.label_smoothing,
                num_classes=num_classes,
            )
        self.val_loss = MeanMetric()
        self.top1 = MulticlassAccuracy(num_classes, average="micro")
        self.top5 = MulticlassAccuracy(num_classes, average="micro", top_k=5) if num_classes > 5 else None

    def refuse(self, loader: EpochLoader) -> None:
        if self.mixup is not None and len(loader.images) < loader.batches.batch_size:
            raise ConfigError(
                f"data.batch_size={loader.batches.batch_size} is more than the {len(loader.images)} training "
                "images; mixup and cutmix need whole batches"
            )

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, targets = batch
        if self.mixup is None:
            return F.cross_entropy(model(images).float(), targets, label_smoothing=self.smoothing)
        images, targets = self.mixup(images, targets)
        return F.cross_entropy(model(images).float(), targets)

    def update(self, model: nn.Module, batch: tuple[Tensor, Tensor], number: int) -> None:
        images, targets = batch
        logits = model(images).float()
        self.val_loss.update(F.cross_entropy(logits, targets), weight=len(targets))
        for metric in filter(None, (self.top1, self.top5)):
            metric.update(logits, targets)

    def compute(self) -> dict[str, float]:
        result = {}
        for name, metric in (("val_loss", self.val_loss), ("val_top1", self.top1), ("val_top5", self.top5)):
            if metric is not None:
                result[name] = metric.compute().item()
                metric.reset()
        return result


class ClassificationTask(base.Task):
    """One class for each image."""

    metrics = ("val_loss", "val_top1", "val_top5")
    monitor = "val_top1"
    label = "top-1"

    def load_half(self, recipe: Recipe, *, train: bool) -> Images:
        return load_half(recipe, train=train)

    def transforms(self, recipe: Recipe, settings: InputSettings) -> tuple[JointTransform, JointTransform]:
        return ImageOnly(train_transform(settings, recipe.augment)), ImageOnly(eval_transform(settings))

    def objective(self, recipe: Recipe, classes: Sequence[str]) -> Classification:
        return Classification(recipe, len(classes))

    def other_images(self, trained: Trained, recipe: Recipe, data: str | Path) -> Images:
        if str(data) == "digits":
            recipe.data.name = "digits"
            return load_half(recipe, train=False)
        root = Path(data)
        return images_in(root / "val" if (root / "val").is_dir() else root)

    @torch.inference_mode()
    def measure(
        self,
        trained: Trained,
        images: Images,
        recipe: Recipe,
        *,
        device: str | torch.device | None = None,
        on_bad: Any = None,
    ) -> Evaluation:
        if images.classes != trained.classes:
            images = _Renumbered(images, _numbers(images.classes, trained))
        data = recipe.data
        count = len(trained.classes)
        where = choose_device(device)
        model = trained.model.to(where)
        skipped: set[int] = set()

        def skip(source: Images, bad: BadImage) -> None:
            skipped.add(bad.index)
            on_bad(source, bad)

        loader = EpochLoader(
            images,
            ImageOnly(eval_transform(trained.settings)),
            batch_size=data.val_batch_size if data.val_batch_size is not None else data.batch_size,
            workers=data.workers,
            on_bad=skip if on_bad is not None else None,
        )
        losses, best, labels, sure = [], [], [], []
        try:
            for batch, truth in loader:
                if batch is None:  # nothing of it could be read
                    continue
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

    @torch.inference_mode()
    def predict(
        self, trained: Trained, files: Sequence[str], images: Sequence[Image.Image], *, top_k: int
    ) -> list[Prediction]:
        transform = eval_transform(trained.settings)
        where = next(trained.model.parameters()).device
        batch = torch.stack([transform(image) for image in images]).to(where)
        best = trained.model(batch).float().softmax(1).cpu().topk(min(top_k, len(trained.classes)))
        return [
            Prediction(
                file=file, classes=[trained.classes[i] for i in winners], probabilities=shares.tolist()
            )
            for file, shares, winners in zip(files, best.values, best.indices, strict=True)
        ]

    def unreadable(self, file: str, error: str) -> Prediction:
        return Prediction(file=file, classes=[], probabilities=[], error=error)

    def pictures(self, folder: Path, trained: Trained, result: Evaluation, images: Images) -> None:
        if result.confusion is not None:
            pictures.confusion(result.confusion, result.classes, folder / "confusion.png")
        wrong = result.mistakes[:24]
        names = {images.short(index): index for index in range(len(images))}
        pictures.mistakes(
            [images.load(names[name]) for name, *_ in wrong],
            [f"{true}, not {guess} ({100 * sure:.0f} %)" for _, true, guess, sure in wrong],
            folder / "mistakes.png",
        )


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
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Image.Image:
        return self.images.load(index)

    def target(self, index: int) -> int:
        return self.numbers[self.images.target(index)]

    def describe(self, index: int) -> str:
        return self.images.describe(index)

    def short(self, index: int) -> str:
        return self.images.short(index)


TASK = ClassificationTask()
