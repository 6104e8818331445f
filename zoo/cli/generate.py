"""`zoo generate`: thin over `zoo.generate`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[
    str,
    typer.Argument(help="A run folder, a model file of one, a saved pipeline, or a model name with weights."),
]


def generate(
    source: Source,
    classes: Annotated[
        str | None, typer.Option(help="Names or numbers with commas between, as in 0,3,7; all by default.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to show, where the model takes prompts; may be repeated.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images of each class or prompt.")] = 8,
    guidance: Annotated[
        float | None, typer.Option(help="How much the class or prompt counts; 1 is no guidance.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the sampler.")] = None,
    sampler: Annotated[str | None, typer.Option(help="euler, heun, dpm, unipc, ddim or ddpm.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed makes the same images.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for grid.png and the single images.")] = Path(
        "generated"
    ),
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the GPU where there is one.")
    ] = None,
) -> None:
    """Make images with a trained model: zoo generate runs/digits --classes 3,5 --guidance 2"""
    import re

    from zoo.errors import ConfigError
    from zoo.recipes.generate import generate as run
    from zoo.recipes.generate import sheet

    # Said now, while there is nothing to lose.
    there = next((each for each in (output, *output.parents) if each.exists()), output)
    if not there.is_dir() or not os.access(there, os.W_OK):
        found = "cannot be written to" if there.is_dir() else "is a file"
        raise ConfigError(f"--output {output}: {there} {found}; name another folder")
    wanted = [each.strip() for each in classes.split(",") if each.strip()] if classes is not None else None
    found = run(
        source, classes=wanted, prompt=prompt or None, count=count, guidance=guidance, steps=steps,
        sampler=sampler, seed=seed, device=device,
    )  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    for number, (title, image) in enumerate(found):
        image.save(output / f"{number:04d}_{re.sub(r'[^0-9A-Za-z]+', '-', title)[:60]}.png")
    sheet([image for _, image in found], output / "grid.png", columns=count)
    print(f"{len(found)} images and grid.png, a row for each class or prompt, in {output}")
