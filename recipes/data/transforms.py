"""From an upright RGB image to the tensor a network sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.transforms import str_to_interp_mode
from timm.data.transforms_factory import transforms_imagenet_train
from torchvision import transforms

from zoo.recipes.schema import AnyData, Augment

Transform = Callable[[Image.Image], torch.Tensor]
JointTransform = Callable[[Image.Image, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class ImageOnly:
    """Change the image and leave its target as it is."""

    transform: Transform

    def __call__(self, image: Image.Image, target: Any) -> tuple[torch.Tensor, Any]:
        return self.transform(image), target


@dataclass(frozen=True, kw_only=True)
class InputSettings:
    """What a network expects: `size` is channels, height, width; `crop_pct` the share of the side kept."""

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float

    @classmethod
    def of(cls, model: torch.nn.Module, data: AnyData | None = None) -> InputSettings:
        """Return the model's own settings, overridden by those that the data section gives."""
        own = resolve_data_config(model=model, verbose=False)
        settings = {key: own[key] for key in ("mean", "std", "interpolation", "crop_pct")}
        settings["size"] = own["input_size"]
        if data is not None:
            given = {key: getattr(data, key, None) for key in ("mean", "std", "interpolation", "crop_pct")}
            settings |= {key: value for key, value in given.items() if value is not None}
            if data.image_size is not None:
                settings["size"] = (own["input_size"][0], data.image_size, data.image_size)
        return cls.from_plain(settings)

    @classmethod
    def from_plain(cls, settings: dict[str, Any]) -> InputSettings:
        """Return the settings that `plain` wrote."""
        return cls(
            size=tuple(int(side) for side in settings["size"]),
            mean=tuple(float(value) for value in settings["mean"]),
            std=tuple(float(value) for value in settings["std"]),
            interpolation=str(settings["interpolation"]),
            crop_pct=float(settings["crop_pct"]),
        )

    def plain(self) -> dict[str, Any]:
        """Return plain containers for a file."""
        return {
            "size": list(self.size),
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
        }


def eval_transform(settings: InputSettings) -> Transform:
    """Resize the shorter side, crop the centre, scale: the same for validation and prediction."""
    return create_transform(
        input_size=settings.size,
        interpolation=settings.interpolation,
        mean=settings.mean,
        std=settings.std,
        crop_pct=settings.crop_pct,
    )


def train_transform(settings: InputSettings, augment: Augment) -> Transform:
    """Crop or resize, move, flip, change colours, scale, erase: timm's steps, ours after the crop."""
    size = settings.size[1:]
    first, colours, last = transforms_imagenet_train(
        size,
        scale=augment.crop_scale,
        ratio=augment.crop_ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.auto_augment,
        interpolation=augment.interpolation,
        mean=settings.mean,
        std=settings.std,
        re_prob=augment.random_erasing,
        re_mode="pixel",
        separate=True,
    )
    crop, *flips = first.transforms
    if augment.crop_scale is None:
        crop = transforms.Resize(size, str_to_interp_mode(settings.interpolation))
    moves = []
    if augment.rotate or augment.shift or augment.zoom or augment.shear:
        moves.append(
            transforms.RandomAffine(
                augment.rotate,
                translate=(augment.shift, augment.shift),
                scale=(1 - augment.zoom, 1 + augment.zoom),
                shear=augment.shear,
                interpolation=transforms.InterpolationMode.BILINEAR,
            )
        )
    return transforms.Compose([crop, *moves, *flips, *colours.transforms, *last.transforms])
