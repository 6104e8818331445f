"""Segmentation: the class of every pixel; cross-entropy and dice, mean IoU, overlays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.errors import ConfigError, DataError
from zoo.heads import Segmenter, resize, segment
from zoo.recipes import pictures
from zoo.recipes.data import masks
from zoo.recipes.data.joint import JointTraining, Views
from zoo.recipes.data.loader import BadImage, EpochLoader, Images
from zoo.recipes.data.masks import IGNORE
from zoo.recipes.data.transforms import InputSettings, JointTransform
from zoo.recipes.run_folder import Trained, build_backbone, choose_device
from zoo.recipes.schema import SegmentationLoss, SegmentationRecipe
from zoo.recipes.tasks import base

SHOWN = 8  # images in a picture of overlays
MAX_CONFUSION = 60  # classes in a picture of confusions


@dataclass(frozen=True, kw_only=True)
class Evaluation(base.Evaluation):
    """Shares in 0..1; `confusion[true, predicted]` counts the pixels that have a class."""

    confusion: np.ndarray = field(repr=False)
    worst: list[tuple[str, float]] = field(repr=False)  # image and its mean IoU, worst first

    @property
    def class_iou(self) -> list[float | None]:
        """Intersection over union of each class; None where neither truth nor prediction has it."""
        return [None if np.isnan(each) else float(each) for each in iou(self.confusion)]

    @property
    def miou(self) -> float:
        """The mean of `class_iou`."""
        return mean_iou(self.confusion)

    @property
    def pixel_accuracy(self) -> float:
        """The share of pixels that got their class."""
        return float(np.trace(self.confusion) / max(1, self.confusion.sum()))

    def headline(self, of: str = "images") -> str:
        return (
            f"mIoU {100 * self.miou:.2f} % on {self.images:,} {of}, "
            f"{100 * self.pixel_accuracy:.2f} % of the pixels right"
        )

    def metrics(self) -> dict[str, float]:
        return {"val_miou": self.miou, "val_pixel_accuracy": self.pixel_accuracy, "val_loss": self.loss}

    def facts(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "images": self.images,
            "skipped": self.skipped,
            "miou": self.miou,
            "pixel_accuracy": self.pixel_accuracy,
            "loss": self.loss,
            "class_iou": dict(zip(self.classes, self.class_iou, strict=True)),
            "confusion": self.confusion.tolist(),
            "worst": [{"image": image, "miou": miou} for image, miou in self.worst],
        }


@dataclass(frozen=True, kw_only=True)
class Prediction(base.Prediction):
    """The class numbers `mask` [height, width] of an image; `shares` of its pixels, largest first."""

    classes: list[str]
    shares: list[float]
    mask: np.ndarray | None = field(default=None, repr=False)
    image: Image.Image | None = field(default=None, repr=False)

    def line(self) -> str:
        shares = zip(self.classes, self.shares, strict=True)
        return ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares)

    def facts(self) -> dict[str, Any]:
        return {"file": self.file, "classes": self.classes, "shares": self.shares, "error": self.error}

    def save(self, folder: Path, name: str) -> list[Path]:
        """Write the mask, whose values are the class numbers, and the image under its colours."""
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{name}_mask.png", folder / f"{name}_overlay.png"]
        pictures.mask_image(self.mask).save(files[0])
        pictures.overlay(self.image, self.mask).save(files[1])
        return files


def iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, NaN where neither truth nor prediction has it."""
    hit = np.diagonal(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - hit
    return np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)


def mean_iou(confusion: np.ndarray) -> float:
    """The mean over the classes that truth or prediction have; 0 where there is none."""
    each = iou(confusion)
    return float(np.nanmean(each)) if not np.isnan(each).all() else 0.0


# ---- loss


def cross_entropy(log_probabilities: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean over pixels that have a class, each by its class's weight; 0 where none has one."""
    share = (targets != IGNORE).to(log_probabilities.dtype)
    if weights is not None:
        share = share * weights[targets.clamp(min=0)]
    return -(share * _of_the_truth(log_probabilities, targets)).sum() / share.sum().clamp(min=1e-6)


def dice_loss(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """One minus the mean Dice coefficient of the classes in a batch; 0 where no pixel has a class.

    Source: Milletari et al. 2016 (arXiv:1606.04797) Sec. 3, with plain sums below the line.
    """
    known = (targets != IGNORE).to(log_probabilities.dtype)
    numbers = targets.clamp(min=0).flatten()
    empty = log_probabilities.new_zeros(log_probabilities.shape[1])
    hits = _of_the_truth(log_probabilities, targets).exp() * known
    both = empty.index_add(0, numbers, hits.flatten())
    truth = empty.index_add(0, numbers, known.flatten())
    guess = (log_probabilities.exp() * known[:, None]).sum((0, 2, 3))
    present = (truth > 0).float()
    return (present * (1 - 2 * both / (guess + truth).clamp(min=1e-6))).sum() / present.sum().clamp(min=1)


def _of_the_truth(scores: Tensor, targets: Tensor) -> Tensor:
    """[B, classes, y, x] to [B, y, x]: those of the class that is right; of the first where none is given."""
    return scores.gather(1, targets.clamp(min=0)[:, None])[:, 0]


class Segmentation(base.Objective):
    """Cross-entropy and dice at the resolution of the masks, and the confusion of all classes."""

    def __init__(self, recipe: SegmentationRecipe, num_classes: int) -> None:
        from torchmetrics import MeanMetric
        from torchmetrics.classification import MulticlassConfusionMatrix

        super().__init__()
        self.recipe, self.parts = recipe, recipe.loss
        self.register_buffer("class_weights", _class_weights(recipe.loss, num_classes), persistent=False)
        self.val_loss = MeanMetric()
        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORE)

    def refuse(self, loader: EpochLoader) -> None:
        if self.recipe.head.name == "upernet" and len(loader.images) == 1:
            raise ConfigError("one training image is too few for the batch norm of head.name=upernet")

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, targets = batch
        if self.recipe.head.auxiliary and self.parts.auxiliary:
            logits, second = model(images, auxiliary=True)
            second = cross_entropy(_log_probabilities(second, targets), targets, self.class_weights)
            return self._main(logits, targets) + self.parts.auxiliary * second
        return self._main(model(images), targets)

    def _main(self, logits: Tensor, targets: Tensor) -> Tensor:
        found = _log_probabilities(logits, targets)
        loss = self.parts.cross_entropy * cross_entropy(found, targets, self.class_weights)
        return loss + self.parts.dice * dice_loss(found, targets) if self.parts.dice else loss

    def update(self, model: nn.Module, batch: tuple[list[Tensor], Tensor], number: int) -> None:
        views, targets = batch
        scores = look(model, views, targets.shape[-2:], self.recipe)
        self.val_loss.update(cross_entropy(scores, targets), weight=len(targets))
        self.confusion.update(scores.argmax(1), targets)

    def compute(self) -> dict[str, float]:
        counts = self.confusion.compute().cpu().numpy()
        result = {
            "val_loss": self.val_loss.compute().item(),
            "val_miou": mean_iou(counts),
            "val_pixel_accuracy": float(np.trace(counts) / max(1, counts.sum())),
        }
        self.val_loss.reset(), self.confusion.reset()
        return result


def _class_weights(loss: SegmentationLoss, num_classes: int) -> Tensor | None:
    if loss.class_weights is None:
        return None
    if len(loss.class_weights) != num_classes:
        raise ConfigError(
            f"loss.class_weights has {len(loss.class_weights)} numbers and the data {num_classes} classes; "
            "give one for each class"
        )
    return torch.tensor(loss.class_weights)


def _log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    return resize(logits.float(), targets).log_softmax(1)


def look(model: nn.Module, views: list[Tensor], size: tuple[int, int], recipe: SegmentationRecipe) -> Tensor:
    """Return log-probabilities at `size` in the way that a recipe looks at images."""
    how = recipe.inference
    return segment(model, views, size, window=how.window, stride=how.stride, flip=how.flip)


# ---- the task


class SegmentationTask(base.Task):
    """The class of every pixel."""

    metrics = ("val_loss", "val_miou", "val_pixel_accuracy")
    monitor = "val_miou"
    label = "mIoU"

    def load_half(self, recipe: SegmentationRecipe, *, train: bool) -> Images:
        return masks.load_half(recipe, train=train)

    def build_model(self, recipe: SegmentationRecipe, num_classes: int) -> nn.Module:
        head = recipe.head
        return Segmenter(
            build_backbone(recipe, 0),
            num_classes,
            head=head.name,
            channels=head.channels,
            stages=head.stages,
            norm=head.norm,
            dropout=head.dropout,
            auxiliary=head.auxiliary,
        )

    def transforms(
        self, recipe: SegmentationRecipe, settings: InputSettings
    ) -> tuple[JointTransform, JointTransform]:
        return JointTraining(settings, recipe.augment, recipe.data.max_side), _views(recipe, settings)

    def objective(self, recipe: SegmentationRecipe, classes: Sequence[str]) -> Segmentation:
        return Segmentation(recipe, len(classes))

    def other_images(self, trained: Trained, recipe: SegmentationRecipe, data: str | Path) -> Images:
        if str(data) == "digit_scenes":
            recipe.data.name = "digit_scenes"
            return self.load_half(recipe, train=False)
        listed = (Path(data) / "classes.txt").exists()
        classes = masks.folder_classes(data, None, None) if listed else trained.classes
        return masks.half_of_folder(recipe, data, classes, "val", whole=True)

    @torch.inference_mode()
    def measure(
        self,
        trained: Trained,
        images: Images,
        recipe: SegmentationRecipe,
        *,
        device: str | torch.device | None = None,
        on_bad: Any = None,
    ) -> Evaluation:
        if images.classes != trained.classes:
            raise DataError(
                f"the data has the classes {', '.join(images.classes[:5])}, ... ({len(images.classes)}) and "
                f"{trained.source} {', '.join(trained.classes[:5])}, ... ({len(trained.classes)}); "
                "they must be the same"
            )
        data, count = recipe.data, len(trained.classes)
        where = choose_device(device)
        model = trained.model.to(where)
        skipped: set[int] = set()

        def skip(source: Images, bad: BadImage) -> None:
            skipped.add(bad.index)
            on_bad(source, bad)

        loader = EpochLoader(
            images,
            _views(recipe, trained.settings),
            batch_size=data.val_batch_size if data.val_batch_size is not None else data.batch_size,
            workers=data.workers,
            on_bad=skip if on_bad is not None else None,
        )
        losses, each = [], []
        try:
            for views, targets in loader:
                if views is None:  # nothing of it could be read
                    continue
                scores = look(model, [view.to(where) for view in views], targets.shape[-2:], recipe).cpu()
                losses.append(cross_entropy(scores, targets).item() * len(targets))
                each += [
                    _count(*pair, count)
                    for pair in zip(targets.numpy(), scores.argmax(1).numpy(), strict=True)
                ]
        finally:
            loader.close()
        order = [index for index in range(len(images)) if index not in skipped]
        ranked = sorted(
            ((images.short(i), mean_iou(one)) for i, one in zip(order, each, strict=True)), key=_second
        )
        return Evaluation(
            source=str(trained.source),
            images=len(each),
            loss=sum(losses) / max(1, len(each)),
            classes=trained.classes,
            confusion=np.sum(each, axis=0),
            worst=ranked,
            skipped=len(skipped),
        )

    @torch.inference_mode()
    def predict(
        self, trained: Trained, files: Sequence[str], images: Sequence[Image.Image], *, top_k: int
    ) -> list[Prediction]:
        views = _views(trained.recipe, trained.settings)
        where = next(trained.model.parameters()).device
        found = []
        for file, image in zip(files, images, strict=True):
            seen = [view[None].to(where) for view in views(image)]
            scores = look(trained.model, seen, (image.height, image.width), trained.recipe)
            mask = scores.argmax(1)[0].cpu().numpy().astype(np.uint16)
            shares = np.bincount(mask.ravel(), minlength=len(trained.classes)) / mask.size
            largest = [i for i in np.argsort(-shares, kind="stable")[:top_k] if shares[i]]
            found.append(
                Prediction(
                    file=file,
                    classes=[trained.classes[i] for i in largest],
                    shares=[float(shares[i]) for i in largest],
                    mask=mask,
                    image=image,
                )
            )
        return found

    def unreadable(self, file: str, error: str) -> Prediction:
        return Prediction(file=file, classes=[], shares=[], error=error)

    def pictures(self, folder: Path, trained: Trained, result: Evaluation, images: Images) -> None:
        pictures.class_iou(result.classes, result.class_iou, folder / "iou.png")
        if len(result.classes) <= MAX_CONFUSION:
            pictures.confusion(result.confusion, result.classes, folder / "confusion.png", counts=False)
        names = {images.short(index): index for index in range(len(images))}
        ranks = np.linspace(0, len(result.worst) - 1, min(SHOWN, len(result.worst))).round().astype(int)
        shown = [(names[result.worst[rank][0]], result.worst[rank][1]) for rank in ranks]
        loaded = [images.load(index) for index, _ in shown]
        predicted = self.predict(trained, [images.short(index) for index, _ in shown], loaded, top_k=1)
        pictures.overlays(
            [
                (image, images.target(index), one.mask, f"{images.short(index)}: mIoU {100 * score:.0f} %")
                for image, (index, score), one in zip(loaded, shown, predicted, strict=True)
            ],
            result.classes,
            folder / "overlays.png",
        )


def _views(recipe: SegmentationRecipe, settings: InputSettings) -> Views:
    return Views(settings, recipe.data.max_side, tuple(recipe.inference.scales))


def _count(truth: np.ndarray, guess: np.ndarray, classes: int) -> np.ndarray:
    known = truth != IGNORE
    pairs = truth[known].astype(np.int64) * classes + guess[known]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def _second(pair: tuple[str, float]) -> float:
    return pair[1]


TASK = SegmentationTask()
