"""Tell the most probable classes of image files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from zoo.errors import ConfigError, DataError
from zoo.recipes.data.images import image_files, read_image, to_rgb
from zoo.recipes.data.transforms import eval_transform
from zoo.recipes.run_folder import Trained, choose_device, load_trained


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The most probable classes of one image, most probable first; `error` where it could not be read."""

    file: str
    classes: list[str]
    probabilities: list[float]
    error: str | None = None


@torch.inference_mode()
def predict(
    source: str | Path | Trained,
    images: str | Path | Image.Image | Sequence[str | Path | Image.Image],
    *,
    top_k: int = 5,
    batch_size: int = 32,
    bad_images: str = "error",
    device: str | torch.device | None = None,
) -> list[Prediction]:
    """Tell the most probable classes of images: files, folders, patterns with *, or PIL images.

    `source` is a run folder, a model.safetensors or .ckpt of one, or a model name with weights.
    `bad_images="skip"` returns a Prediction with `error` for an image that cannot be read instead of raising
    DataError. Raises ZooError.
    """
    if top_k < 1 or batch_size < 1:
        raise ConfigError(f"top_k={top_k} and batch_size={batch_size} must be at least 1")
    if bad_images not in ("error", "skip"):
        raise ConfigError(f"bad_images={bad_images!r} must be 'error' or 'skip'")
    trained = source if isinstance(source, Trained) else load_trained(source)
    where = choose_device(device)
    model = trained.model.to(where)
    transform = eval_transform(trained.settings)
    results: dict[int, Prediction] = {}
    pending: list[tuple[int, str, torch.Tensor]] = []

    def flush() -> None:
        if not pending:
            return
        batch = torch.stack([tensor for _, _, tensor in pending]).to(where)
        best = model(batch).float().softmax(1).cpu().topk(min(top_k, len(trained.classes)))
        for (number, name, _), shares, winners in zip(pending, best.values, best.indices, strict=True):
            results[number] = Prediction(
                file=name, classes=[trained.classes[i] for i in winners], probabilities=shares.tolist()
            )
        pending.clear()

    for number, image in enumerate(_images(images)):
        name = str(image) if not isinstance(image, Image.Image) else f"image {number}"
        try:
            pixels = to_rgb(image) if isinstance(image, Image.Image) else read_image(image)
        except DataError as error:
            if bad_images == "error":
                raise
            results[number] = Prediction(file=name, classes=[], probabilities=[], error=str(error))
            continue
        pending.append((number, name, transform(pixels)))
        if len(pending) == batch_size:
            flush()
    flush()
    return [results[number] for number in sorted(results)]


def _images(images: Any) -> list[str | Image.Image]:
    given = [images] if isinstance(images, str | Path | Image.Image) else list(images)
    if not given:
        raise DataError("no images given; name files, folders or patterns")
    found: list[str | Image.Image] = []
    for each in given:
        found += [each] if isinstance(each, Image.Image) else image_files([each])
    return found
