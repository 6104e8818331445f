"""`zoo train`, `zoo eval`, `zoo predict` and `zoo recipes`: thin over `zoo.recipes`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from zoo.recipes.run_folder import Trained
    from zoo.recipes.tasks.classification import Prediction

recipes = typer.Typer(help="List, show, copy and check training recipes.", no_args_is_help=True)

Source = Annotated[
    str,
    typer.Argument(
        help="A run folder, a model.safetensors or .ckpt of one, or a model name with weights, timm/NAME too."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the GPU where there is one.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result as JSON to a file, or to - .")]


def train(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE [KEY=VALUE]...", help="A name from `zoo recipes list`, or a file."),
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a stopped run; a run folder or .ckpt may follow.")
    ] = False,
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of the run; the first free one of runs/NAME, runs/NAME-2, ...")
    ] = None,
) -> None:
    """Train a recipe: zoo train classification/digits optim.lr=1e-3

    To go on with a stopped run, exactly where it was: zoo train --resume runs/digits
    """
    import shlex

    from zoo.recipes.config import recipe
    from zoo.recipes.data import open_halves

    overrides = [text for text in arguments if _is_override(text, resume)]
    names = [text for text in arguments if not _is_override(text, resume)]
    # What is wrong with recipe or data is said before torch is imported, which takes seconds.
    if resume:
        (made, where), images = _resumed(names, overrides, run_dir), None
    else:
        made, where = recipe(_only(names), overrides, names=False), None
        images = open_halves(made)
    from zoo.recipes.train import train as run

    typed = ["zoo", "train", *arguments, *(["--resume"] if resume else [])]
    typed += ["--run-dir", str(run_dir)] if run_dir is not None else []
    result = run(made, run_dir=run_dir, resume=where, command=shlex.join(typed), images=images)
    pictures = ", ".join(sorted(file.name for file in result.folder.glob("*.png")))
    print(
        f"{made.model.name}: {result.evaluation.headline('validation images')} "
        f"(best of epoch {result.best_epoch}), {result.seconds:.0f} s\n"
        f"run folder {result.folder}: {result.model_file.name}, {pictures}, ..."
    )


def _is_override(text: str, resume: bool) -> bool:
    """Whether a text is key=value, not a file, or a folder to resume, that has a = in its name."""
    if re.match(r"\s*[A-Za-z_][\w.]*\s*=", text) is None or text.endswith((".yaml", ".yml")):
        return False
    return not (resume and os.path.exists(text))  # noqa: PTH110 - Path's own raises for a long value


def _only(names: list[str]) -> str:
    from zoo.errors import ConfigError

    if len(names) != 1:
        found = f"found {', '.join(names)}" if names else "none is given"
        raise ConfigError(f"one recipe is wanted, {found}; overrides are written key=value")
    return names[0]


def _resumed(names: list[str], overrides: list[str], run_dir: Path | None) -> tuple[Any, Path]:
    """Return the recipe of a stopped run with overrides, and where to go on; a recipe named too must fit."""
    from zoo.errors import ConfigError
    from zoo.recipes.config import recipe, recipe_names
    from zoo.recipes.run_folder import latest_run, refuse_another, resume_point

    given = [name for name in names if name.endswith((".yaml", ".yml")) or name in recipe_names()]
    paths = [name for name in names if name not in given]
    if len(paths) > 1 or len(given) > 1 or (paths and run_dir is not None and Path(paths[0]) != run_dir):
        raise ConfigError(f"--resume takes one run folder or checkpoint, found {', '.join(map(str, names))}")
    named = recipe(given[0], overrides) if given else None
    if paths:
        where = Path(paths[0])
    elif run_dir is not None:
        where = run_dir
    elif named is not None:
        where = latest_run(named.name)
    else:
        raise ConfigError("--resume needs a recipe, a run folder or a checkpoint")
    folder, _ = resume_point(where)
    saved = recipe(folder / "config.yaml", overrides)
    if named is not None:
        refuse_another(named, saved.plain(), folder)
    return saved, where


def evaluate(
    source: Source,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A folder: a sub-folder for each class, or images/ and masks/; or digits, digit_scenes."
        ),
    ] = None,
    device: Device = None,
    as_json: Json = None,
) -> None:
    """Measure a trained model on its validation images, or on others: zoo eval runs/digits"""
    from zoo.recipes.evaluate import evaluate as run

    result = run(source, data, overrides=overrides or (), device=device)
    line = f"{source}: {result.headline()}, loss {result.loss:.4f}"
    _print_or_write(line, result.facts(), as_json)


def predict(
    source: Source,
    images: Annotated[
        list[str], typer.Argument(help="Image files, folders, or patterns such as 'photos/*.jpg'.")
    ],
    top_k: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 5,
    as_json: Json = None,
    explain: Annotated[
        Path | None, typer.Option(help="Folder for pictures of what the centre of each image attends to.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for masks and overlays, where the model tells the class of pixels.")
    ] = Path("predictions"),
    device: Device = None,
) -> None:
    """Tell what images show: zoo predict runs/digits photos/ --top-k 3

    A segmenting model writes a mask, whose values are the class numbers, and an overlay for each image.

    An image that cannot be read gets one line, the others go on; the status is then 3.
    """
    import sys

    from zoo.errors import ConfigError
    from zoo.recipes.predict import predictions
    from zoo.recipes.run_folder import load_trained

    trained = load_trained(source)
    if explain is not None and trained.recipe is not None and trained.recipe.task != "classification":
        raise ConfigError(f"--explain is for models that classify; {source} does {trained.recipe.task}")
    facts, lines, files = [], [], []
    used: set[str] = set()
    unreadable = 0
    for result in predictions(trained, images, top_k=top_k, bad_images="skip", device=device):
        facts.append(result.facts())
        if result.error is not None:
            unreadable += 1
            print(f"error: {result.error}", file=sys.stderr)
            continue
        lines.append(f"{result.file}: {result.line()}")
        name = _unused(Path(result.file).stem, used)
        files += result.save(output, name)
        if explain is not None:
            _explain(trained, result, explain / f"{name}.png")
    whole = {"source": trained.source, "model": trained.name, "predictions": facts}
    _print_or_write("\n".join(lines), whole, as_json)
    if files:
        print(f"{len(files)} masks and overlays in {output}", file=sys.stderr)
    if explain is not None:
        print(f"{len(lines)} pictures of what the centre attends to in {explain}", file=sys.stderr)
    if unreadable:
        raise typer.Exit(3)


def _unused(name: str, used: set[str]) -> str:
    """Return a name for the pictures of an image, of which other folders may have one of the same name."""
    while name in used:
        name += "_"
    used.add(name)
    return name


def _explain(trained: Trained, result: Prediction, file: Path) -> None:
    from zoo.analysis import explain_neighborhood
    from zoo.recipes.data.images import read_image
    from zoo.recipes.data.transforms import eval_transform

    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = eval_transform(trained.settings)(read_image(result.file))
    title = f"{Path(result.file).name}: {result.classes[0]} {100 * result.probabilities[0]:.0f} %"
    device = next(trained.model.parameters()).device
    explain_neighborhood(trained.model, pixels.to(device), title=title).savefig(file, dpi=110)


def _print_or_write(text: str, facts: dict[str, Any], path: Path | None) -> None:
    if path is not None and str(path) == "-":
        write_json(facts, path)
        return
    if text:
        print(text)
    if path is not None:
        write_json(facts, path)


def write_json(facts: Any, path: Path) -> None:
    """Write facts to a file, or to standard output where it is `-`, as that output can hold them."""
    import json
    import sys

    from zoo.weights.files import write_text

    printed = str(path) == "-"
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    try:
        text.encode(printed and sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a terminal of other letters, or a file name that is no text
        text = json.dumps(facts, indent=2)
    if printed:
        print(text)
    else:
        write_text(path, text + "\n")


# ---- zoo recipes


@recipes.command("list")
def list_(pattern: Annotated[str, typer.Argument(help="Names to show, as in '*nat*'.")] = "*") -> None:
    """List the recipes that come with the zoo, each with the first line of what it says."""
    from fnmatch import fnmatchcase

    from zoo.errors import ConfigError
    from zoo.recipes.config import find_recipe, head_comment, recipe_names

    names = [name for name in recipe_names() if fnmatchcase(name, pattern)]
    if not names:
        raise ConfigError(f"no recipe matches {pattern!r}; `zoo recipes list` shows all")
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {head_comment(find_recipe(name)).partition(chr(10))[0]}")


@recipes.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A recipe name or .yaml file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Print a recipe with every key, as it would be trained."""
    from zoo.recipes.config import find_recipe, head_comment, recipe

    made = recipe(name, overrides or (), allow_missing=True)
    for line in head_comment(find_recipe(name)).splitlines():
        print(f"# {line}")
    print(made.yaml(), end="")


@recipes.command("copy")
def copy(
    name: Annotated[str, typer.Argument(help="A recipe name.")],
    target: Annotated[
        str | None, typer.Argument(help="The new file, or a folder for it, new if it ends in /; else here.")
    ] = None,
) -> None:
    """Copy a recipe to a file of your own, to change and train."""
    import shlex

    from zoo.errors import ConfigError
    from zoo.recipes.config import find_recipe

    source = find_recipe(name)
    file = Path(target) if target is not None else Path(source.name)
    if file.is_dir() or (target or "").endswith("/"):
        file = file / source.name
    if file.suffix != ".yaml":
        raise ConfigError(f"{file} must end in .yaml, so that `zoo train {file}.yaml` reads it as a file")
    if file.exists():
        raise ConfigError(f"{file} exists already; name another file")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(source.read_bytes())
    typed = shlex.quote(str(file) if len(file.parts) > 1 else f"./{file}")
    print(f"{file}; train it with: zoo train {typed}")


@recipes.command("check")
def check(
    names: Annotated[
        list[str] | None, typer.Argument(help="Recipe names or files; by default all of the zoo.")
    ] = None,
) -> None:
    """Check recipes: keys, types, values and names. No data is read and no model is built."""
    import sys

    from zoo.errors import ConfigError
    from zoo.recipes.config import recipe, recipe_names

    wrong = 0
    chosen = names or recipe_names()
    for name in chosen:
        try:
            recipe(name, allow_missing=True)
        except ConfigError as error:
            wrong += 1
            print(f"error: {error}", file=sys.stderr)
    print(f"{len(chosen) - wrong} of {len(chosen)} recipes are right")
    if wrong:
        raise typer.Exit(2)
