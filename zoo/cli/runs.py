"""`zoo runs` and `zoo export`: thin over `zoo.recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli.recipes import Json, Source, write_json

if TYPE_CHECKING:
    from zoo.recipes.runs import Run

runs = typer.Typer(help="List training runs, and compare some of them.", no_args_is_help=True)


@runs.command("list")
def list_(
    folder: Annotated[Path, typer.Argument(help="Where to look, in sub-folders too.")] = Path("runs"),
    as_json: Json = None,
) -> None:
    """List the runs of a folder, the latest first."""
    import sys

    from zoo.recipes.runs import find_runs

    found, wrong = find_runs(folder)
    for each in wrong:
        print(f"skipped: {each}", file=sys.stderr)
    if _is_json(as_json, [run.facts() for run in found]):
        return
    if not found:
        print(f"no runs in {folder}")
        return
    rows = [
        [
            str(run.folder),
            run.model,
            run.data,
            run.state,
            str(run.epoch),
            str(run.step),
            _score(run),
            run.started[:16],
        ]
        for run in found
    ]
    print_table(["folder", "model", "data", "state", "epoch", "step", "best", "started"], rows)


@runs.command("compare")
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Two run folders or more.")],
    chart: Annotated[Path | None, typer.Option(help="Draw losses and metrics into this picture.")] = None,
    as_json: Json = None,
) -> None:
    """Show in which keys of their recipes runs differ, and what came of it."""
    from zoo.errors import ConfigError
    from zoo.recipes.runs import differences, draw, read_run

    if len(folders) < 2:
        raise ConfigError(f"two runs or more are compared, found {len(folders)}")
    found = [read_run(folder) for folder in folders]
    keys = differences(found)
    if chart is not None:
        draw(found, chart)
    facts = [
        {**run.facts(), "differs": {key: values[i] for key, values in keys.items()}}
        for i, run in enumerate(found)
    ]
    if _is_json(as_json, facts):
        return
    rows = [[key, *(str(value) for value in values)] for key, values in keys.items()]
    rows += [["best", *map(_score, found)], ["step", *(str(run.step) for run in found)]]
    rows.append(["state", *(run.state for run in found)])
    print_table(["", *map(str, folders)], rows)


def export(
    source: Source,
    format: Annotated[str, typer.Option(help="torch-export, onnx, safetensors or timm.")],
    output: Annotated[
        Path | None, typer.Option(help="The file, or the folder of timm; beside the run's files by default.")
    ] = None,
) -> None:
    """Write a trained model for other programs, and compare: zoo export runs/digits --format onnx"""
    from zoo.recipes.export import export as run

    result = run(source, format, output)
    print(
        f"{result.path}: outputs differ by {result.difference:.1e} of the largest\nload it with: {result.use}"
    )


def _score(run: Run) -> str:
    return "" if run.best is None else f"{run.monitor} {run.best:.4f}"


def _is_json(path: Path | None, facts: list[dict[str, Any]]) -> bool:
    """Write facts where they are asked for; tell whether that was standard output."""
    if path is None:
        return False
    write_json(facts, path)
    return str(path) == "-"


def print_table(head: list[str], rows: list[list[str]], *, figures: bool = False) -> None:
    """Print columns as wide as they need; `figures` puts all but the first to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in [head, *rows]:
        cells = [f"{cell:{'>' if figures and i else '<'}{widths[i]}}" for i, cell in enumerate(row)]
        print("  ".join(cells).rstrip())
