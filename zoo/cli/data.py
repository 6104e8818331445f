"""`zoo data`: thin over `zoo.recipes.data.shards`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

data = typer.Typer(
    help="Put large image folders into tar shards, which recipes read as folders.", no_args_is_help=True
)


@data.command("shard")
def shard(
    folder: Annotated[Path, typer.Argument(help="train/ and val/ with a sub-folder for each class.")],
    out: Annotated[Path, typer.Argument(help="The new folder of the shards.")],
    size: Annotated[str, typer.Option(help="Of a shard, about: 256MB, 1.5GB ...")] = "256MB",
) -> None:
    """Write an image folder as tar shards that WebDataset reads too: zoo data shard photos shards

    Then train from them with data.name=folder data.root=shards. The image files are copied as they are.
    """
    from zoo.recipes.data.shards import write_shards

    write_shards(folder, out, size=_bytes_of(size), tell=print)
    print(f"{out}; train from it with: data.name=folder data.root={out}")


@data.command("index")
def index(
    folder: Annotated[
        Path, typer.Argument(help="train/ and val/ with .tar files, and classes.txt if classes have names.")
    ],
) -> None:
    """Make shards trainable that another WebDataset writer wrote: images with a .cls number each."""
    from zoo.recipes.data.shards import index_shards

    index_shards(folder, tell=print)
    print(f"{folder}; train from it with: data.name=folder data.root={folder}")


@data.command("check")
def check(folder: Annotated[Path, typer.Argument(help="A folder of shards with their index.")]) -> None:
    """Compare the SHA-256 of every shard with its index, as after copying; reads all of them."""
    import sys

    from zoo.recipes.data.shards import check_shards

    right, wrong = check_shards(folder)
    for each in wrong:
        print(f"error: {each}", file=sys.stderr)
    print(f"{right} of {right + len(wrong)} shards are right")
    if wrong:
        raise typer.Exit(3)


def _bytes_of(text: str) -> int:
    from zoo.errors import ConfigError

    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(k|M|G|T)B", text)
    count = int(float(match[1]) * 1000 ** (" kMGT".index(match[2]))) if match else 0
    if count < 1:
        raise ConfigError(f"--size {text!r} is no size of a shard; wanted one such as 256MB or 1.5GB")
    return count
