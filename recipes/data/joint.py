"""From an upright RGB image and its classes to what a segmenting network sees: both change together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from zoo.recipes.data.masks import IGNORE
from zoo.recipes.data.transforms import InputSettings
from zoo.recipes.schema import SegmentationAugment

TRIES = 10  # for a crop in which no class has more than its share


def fitting(size: tuple[int, int], side: int, max_side: int | None) -> tuple[int, int]:
    """Return height and width with the shorter one `side`, or less where the longer would pass `max_side`."""
    scale = side / min(size)
    if max_side is not None:
        scale = min(scale, max_side / max(size))
    return tuple(max(1, round(each * scale)) for each in size)


@dataclass(frozen=True)
class Views:
    """Image and classes for evaluation: the image at each of `scales`, the classes untouched.

    Returns ([[3, y, x] for each scale], int64 [height, width]); without classes only the former.
    """

    settings: InputSettings
    max_side: int | None = None
    scales: tuple[float, ...] = (1.0,)

    def __call__(self, image: Image.Image, classes: np.ndarray | None = None) -> Any:
        pixels = F.pil_to_tensor(image)
        base = self.settings.size[1]
        views = []
        for scale in self.scales:
            longest = None if self.max_side is None else round(self.max_side * scale)
            size = fitting(tuple(pixels.shape[1:]), round(base * scale), longest)
            resized = F.resize(pixels, list(size), InterpolationMode.BILINEAR, antialias=True)
            views.append(normalised(resized, self.settings))
        return views if classes is None else (views, torch.from_numpy(classes.astype(np.int64)))


def normalised(pixels: Tensor, settings: InputSettings) -> Tensor:
    """Return pixels uint8 [3, y, x] as a network wants them."""
    return F.normalize(F.to_dtype(pixels, torch.float32, scale=True), settings.mean, settings.std)


class JointTraining:
    """Image and classes for training: scale, turn, crop, mirror, colours.

    Returns (float32 [3, crop, crop], int64 [crop, crop]); what a crop has beyond the image is filled
    with the mean colour and has no class.
    """

    def __init__(self, settings: InputSettings, augment: SegmentationAugment, max_side: int | None) -> None:
        self.settings = settings
        crop = augment.crop_size if augment.crop_size is not None else settings.size[1]
        fill = {
            tv_tensors.Image: [255 * value for value in settings.mean],
            tv_tensors.Mask: IGNORE,
        }
        steps: list[v2.Transform] = [RandomScale(settings.size[1], max_side, augment.scale)]
        if augment.rotate:
            steps.append(v2.RandomRotation(augment.rotate, InterpolationMode.BILINEAR, fill=fill))
        steps.append(RandomCrop(crop, augment.max_class_share, fill))
        if augment.hflip:
            steps.append(v2.RandomHorizontalFlip(augment.hflip))
        if augment.photometric:
            changes = {"brightness": 32 / 255, "contrast": 0.5, "saturation": 0.5, "hue": 0.05}
            steps += [
                v2.RandomApply([v2.ColorJitter(**{name: by})], augment.photometric)
                for name, by in changes.items()
            ]
        self.steps = v2.Compose(steps)

    def __call__(self, image: Image.Image, classes: np.ndarray) -> tuple[Tensor, Tensor]:
        pixels = tv_tensors.Image(F.pil_to_tensor(image))
        pixels, mask = self.steps(pixels, tv_tensors.Mask(torch.from_numpy(classes.copy())))
        return normalised(pixels.as_subclass(Tensor), self.settings), mask.as_subclass(Tensor).long()


class RandomScale(v2.Transform):
    """Resize so that the shorter side is `side` times a random number between those of `scale`."""

    def __init__(self, side: int, max_side: int | None, scale: Sequence[float]) -> None:
        super().__init__()
        self.side, self.max_side, self.scale = side, max_side, scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        by = torch.empty(1).uniform_(*self.scale).item()
        longest = None if self.max_side is None else round(self.max_side * by)
        return {"size": list(fitting(v2.query_size(flat_inputs), max(1, round(self.side * by)), longest))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Mask):
            return F.resize(inpt, params["size"], interpolation=InterpolationMode.BILINEAR, antialias=True)
        # For a mask torchvision takes the pixel above and to the left, not the nearest to the centre.
        values = inpt.as_subclass(Tensor)[None]
        exact = F.resize(
            values, params["size"], interpolation=InterpolationMode.NEAREST_EXACT, antialias=False
        )
        return tv_tensors.wrap(exact[0], like=inpt)


class RandomCrop(v2.Transform):
    """Cut out a square: of several tries the first in which no class has more than `max_share` of it."""

    def __init__(self, side: int, max_share: float, fill: dict[Any, Any]) -> None:
        super().__init__()
        self.side, self.max_share, self.fill = side, max_share, fill

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        mask = next(each for each in flat_inputs if isinstance(each, tv_tensors.Mask))
        spare = [max(0, length - self.side) for length in (height, width)]
        missing = [max(0, self.side - length) for length in (height, width)]
        for _ in range(TRIES):
            top, left = (int(torch.randint(each + 1, ())) for each in spare)
            cut = mask[top : top + self.side, left : left + self.side]
            counts = torch.bincount(cut[cut != IGNORE].flatten().int())
            if self.max_share >= 1 or (
                counts.count_nonzero() > 1 and counts.max() < self.max_share * counts.sum()
            ):
                break
        return {"area": (top, left, self.side - missing[0], self.side - missing[1]), "missing": missing}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        cut = F.crop(inpt, *params["area"])
        if not any(params["missing"]):
            return cut
        below, right = params["missing"]
        return F.pad(cut, [0, 0, right, below], fill=self.fill[type(inpt)])
