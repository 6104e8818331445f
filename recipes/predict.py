"""Tell what images show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from zoo.errors import ConfigError, DataError
from zoo.recipes.data.images import image_files, read_image, reason_of, to_rgb
from zoo.recipes.run_folder import Trained, choose_device, load_trained
from zoo.recipes.tasks import task_of
from zoo.recipes.tasks.base import Prediction


def predict(source: Any, images: Any, **options: Any) -> list[Prediction]:
    """Tell what images show, each as its task says it: files, folders, patterns with *, or PIL images.

    Arguments and errors are those of `predictions`, which gives one at a time.
    """
    return list(predictions(source, images, **options))


def predictions(
    source: str | Path | Trained,
    images: str | Path | Image.Image | Sequence[str | Path | Image.Image],
    *,
    top_k: int = 5,
    batch_size: int = 32,
    bad_images: str = "error",
    device: Any = None,
) -> Iterator[Prediction]:
    """Tell what images show, one after the other, so that not all results are in memory together.

    `source` is a run folder, a model.safetensors or .ckpt of one, or a model name with weights. `top_k` is
    how many classes to name. `bad_images="skip"` returns a prediction with `error` for an image that cannot
    be read instead of raising DataError. Raises ZooError.
    """
    if top_k < 1 or batch_size < 1:
        raise ConfigError(f"top_k={top_k} and batch_size={batch_size} must be at least 1")
    if bad_images not in ("error", "skip"):
        raise ConfigError(f"bad_images={bad_images!r} must be 'error' or 'skip'")
    trained = source if isinstance(source, Trained) else load_trained(source)
    trained.model.to(choose_device(device))
    task = task_of(trained.recipe)
    waiting: list[Prediction | Image.Image] = []  # in order: images to judge, and what cannot be read
    names: list[str] = []

    def flush() -> Iterator[Prediction]:
        good = [
            (name, each) for name, each in zip(names, waiting, strict=True) if isinstance(each, Image.Image)
        ]
        found = iter(task.predict(trained, *zip(*good, strict=True), top_k=top_k) if good else ())
        for each in waiting:
            yield next(found) if isinstance(each, Image.Image) else each
        waiting.clear(), names.clear()

    for number, image in enumerate(_images(images)):
        names.append(str(image) if not isinstance(image, Image.Image) else f"image {number}")
        try:
            waiting.append(_read(image, names[-1]))
        except DataError as error:
            if bad_images == "error":
                raise
            waiting.append(task.unreadable(names[-1], str(error)))
        if len(waiting) == batch_size:
            yield from flush()
    yield from flush()


def _read(image: str | Image.Image, name: str) -> Image.Image:
    """An image file, or an image that was opened, as upright 8-bit RGB. Raises DataError."""
    if not isinstance(image, Image.Image):
        return read_image(image)
    try:
        if 0 in image.size:
            raise ValueError("it has no pixels")
        return to_rgb(ImageOps.exif_transpose(image))
    except (ValueError, OSError) as error:
        raise DataError(f"{name} cannot be read as an image: {reason_of(error, name)}") from None


def _images(images: Any) -> list[str | Image.Image]:
    given = [images] if isinstance(images, str | Path | Image.Image) else list(images)
    if not given:
        raise DataError("no images given; name files, folders or patterns")
    found: list[str | Image.Image] = []
    for each in given:
        found += [each] if isinstance(each, Image.Image) else image_files([each])
    return found
