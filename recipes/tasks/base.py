"""The seams between a run, which is the same for every task, and what a task has to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from zoo.recipes.data.loader import EpochLoader, Images
from zoo.recipes.data.transforms import InputSettings, JointTransform
from zoo.recipes.run_folder import Trained
from zoo.recipes.schema import Recipe


class Objective(nn.Module, ABC):
    """Loss and validation metrics of a task. It has no weights, and what is random in it follows the step."""

    def refuse(self, loader: EpochLoader) -> None:
        """Raise ConfigError where the batches of a loader cannot be trained on; called before the first."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the training loss of a batch."""

    @abstractmethod
    def update(self, model: nn.Module, batch: Any, number: int) -> None:
        """Take a validation batch into the metrics, which is `number` of those that one process would see."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Return the metrics of all processes' batches since the last call, by the names of the task."""

    def show(self, model: nn.Module, folder: Path, step: int, *, first: bool) -> dict[str, float]:
        """Look at the network after a validation, leaving pictures if this is the `first` process.

        Returns further metrics. It must not draw from the global random state.
        """
        return {}


@dataclass(frozen=True, kw_only=True)
class Evaluation(ABC):
    """What a measurement found over `images` images, of which `skipped` more could not be read."""

    source: str
    images: int
    loss: float
    classes: list[str]
    skipped: int = 0

    @abstractmethod
    def headline(self, of: str = "images") -> str:
        """Return the result in a few words; `of` says of which images."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Return the metrics by the names that a run's files have for them."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return all of the result as plain containers."""


@dataclass(frozen=True, kw_only=True)
class Prediction(ABC):
    """What a model says of one image; `error` where it could not be read."""

    file: str
    error: str | None = None

    def save(self, folder: Path, name: str) -> list[Path]:
        """Write the pictures of the prediction, whose names begin with `name`, and return their paths."""
        return []

    @abstractmethod
    def line(self) -> str:
        """Return the prediction in a few words."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return the prediction as plain containers."""


class Task(ABC):
    """What a run asks of a task."""

    metrics: ClassVar[tuple[str, ...]]  # columns of metrics.csv
    monitor: ClassVar[str]  # the metric in 0..1 by which checkpoints are ranked, the larger the better
    label: ClassVar[str]  # its name for people
    keeps_base: ClassVar[bool] = False  # the weights of a run are additions to those of model.checkpoint

    @abstractmethod
    def load_half(self, recipe: Recipe, *, train: bool) -> Images:
        """Return the training or the validation images. Raises ConfigError, DataError."""

    def build_model(self, recipe: Recipe, num_classes: int) -> nn.Module:
        """Return the network with its first weights. Raises ConfigError, IntegrityError."""
        from zoo.recipes.run_folder import build_backbone

        return build_backbone(recipe, num_classes)

    def settings(self, recipe: Recipe, model: nn.Module) -> InputSettings:
        """Return what the network sees of an image."""
        return InputSettings.of(model, recipe.data)

    @abstractmethod
    def transforms(self, recipe: Recipe, settings: InputSettings) -> tuple[JointTransform, JointTransform]:
        """Return what becomes of image and target in training and in validation."""

    @abstractmethod
    def objective(self, recipe: Recipe, classes: Sequence[str]) -> Objective:
        """Return loss and metrics."""

    @abstractmethod
    def other_images(self, trained: Trained, recipe: Recipe, data: str | Path) -> Images:
        """Return the images of a folder, or of data that ships with a library, to measure a model on."""

    @abstractmethod
    def measure(
        self,
        trained: Trained,
        images: Images,
        recipe: Recipe,
        *,
        device: str | torch.device | None = None,
        on_bad: Any = None,
    ) -> Evaluation:
        """Run a model over images, with the batch size and workers of a recipe; bad images go to `on_bad`."""

    @abstractmethod
    def predict(
        self, trained: Trained, files: Sequence[str], images: Sequence[Image.Image], *, top_k: int
    ) -> list[Prediction]:
        """Return what a model, which is on its device, says of some upright RGB images."""

    @abstractmethod
    def unreadable(self, file: str, error: str) -> Prediction:
        """Return the prediction that stands for an image that could not be read."""

    @abstractmethod
    def pictures(self, folder: Path, trained: Trained, result: Evaluation, images: Images) -> None:
        """Leave the pictures of a finished run in its folder, beside the curves."""
