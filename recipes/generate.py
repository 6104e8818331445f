"""Make images with a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from zoo.errors import ConfigError, at_least
from zoo.recipes.run_folder import Trained, choose_device, load_trained

BATCH = 64
STEPS = 1000  # at most, as in recipes: a scheduler has no more times


def generate(
    source: str | Path | Trained,
    *,
    classes: Sequence[int | str] | None = None,
    prompt: str | Sequence[str] | None = None,
    count: int = 1,
    guidance: float | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> list[tuple[str, Image.Image]]:
    """Make `count` images of each class or prompt, by default of every class; returned with what they show.

    `source` is a run folder, a model.safetensors or .ckpt of one, a folder that a diffusers pipeline of the
    zoo was saved to, or a model name with weights. Guidance, steps and sampler are by default those of its
    recipe; a seed makes the same images on every machine, up to rounding. Raises ZooError.
    """
    if count < 1:
        raise ConfigError(f"count={count} must be at least 1")
    if steps is not None and not 1 <= steps <= STEPS:
        raise ConfigError(f"steps={steps} must be from 1 to {STEPS}")
    if guidance is not None and not 0 <= guidance < float("inf"):
        raise ConfigError(f"guidance={guidance} must be a number from 0 on; 1 is none")
    pipe, how = _pipeline(source, sampler)
    pipe.to(choose_device(device))
    pipe.set_progress_bar_config(disable=True)
    if prompt is not None:
        given: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
    else:
        known = [str(name) for name in pipe.config.classes] or range(
            getattr(pipe.transformer, "num_classes", 0)
        )
        given = list(classes) if classes is not None else list(known)
    if not given and prompt is None and not pipe.config.words:
        raise ConfigError("no class is given; such as classes=[3, 5]")
    asked = [each for each in given for _ in range(count)]
    keyword = "prompt" if prompt is not None or (classes is None and pipe.config.words) else "class_labels"
    if not asked:
        raise ConfigError(f"{source} makes what a prompt says; such as prompt='a seven left of a three'")
    at_least(0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    images: list[Image.Image] = []
    for start in range(0, len(asked), BATCH):
        images += pipe(
            **{keyword: asked[start : start + BATCH]},
            guidance_scale=how["guidance"] if guidance is None else guidance,
            guidance_interval=tuple(how["interval"]),
            num_inference_steps=how["steps"] if steps is None else steps,
            generator=generator,
        ).images
    names = [str(name) for name in pipe.config.classes]
    titles = [names[each] if isinstance(each, int) and each < len(names) else str(each) for each in asked]
    return list(zip(titles, images, strict=True))


def _pipeline(source: str | Path | Trained, sampler: str | None) -> tuple[Any, dict[str, Any]]:
    """Return the pipeline of a source and how its recipe samples."""
    from zoo.diffusion.sampling import ImagePipeline
    from zoo.recipes.tasks.generation import pipeline_of

    if not isinstance(source, Trained) and (Path(source) / "model_index.json").exists():
        if sampler is not None:
            raise ConfigError(f"{source} has a scheduler of its own; a sampler is for run folders")
        try:
            pipe = ImagePipeline.from_pretrained(source, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{source} is no pipeline that the zoo saved ({reason})") from None
        return pipe, {"guidance": 2.0, "steps": 25, "interval": (0.0, 1.0)}
    trained = source if isinstance(source, Trained) else load_trained(source)
    if sampler is not None and trained.recipe is not None and trained.recipe.task == "generation":
        trained = replace(trained, recipe=deepcopy(trained.recipe))
        trained.recipe.sampling.sampler = sampler
    pipe = pipeline_of(trained)
    how = trained.recipe.sampling
    return pipe, {"guidance": how.guidance[0], "steps": how.steps, "interval": how.interval}


def sheet(images: Sequence[Image.Image], path: Path, *, columns: int) -> None:
    """Write images of one size as one picture."""
    from zoo.recipes import pictures

    pixels = np.stack([np.atleast_3d(np.asarray(image)) for image in images])
    pictures.tiles(pixels, path, columns=columns)
