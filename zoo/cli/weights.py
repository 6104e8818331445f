"""`zoo weights`: which published files there are, and fetching, converting and verifying them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

weights = typer.Typer(no_args_is_help=True, help="Published weights: list, get, convert, verify, pin.")

Name = Annotated[str, typer.Argument(help="A model, or model.tag as `zoo weights list` shows it.")]


@weights.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="Names to show; * and ? match, as in 'dinat*'.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List the published weights: where they lie, what was published of them, and whether they are here."""
    import json
    from fnmatch import fnmatchcase

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from zoo.errors import ConfigError
    from zoo.weights.download import cached, expected_hash
    from zoo.weights.manifest import all_entries

    rows = [
        entry.summary()
        | {
            "where": entry.where,
            "here": (entry.packaged or cached(entry)).is_file(),
            "hash": "manifest" if entry.sha256 else "first use" if expected_hash(entry) else "unknown",
        }
        for entry in all_entries()
        if fnmatchcase(entry.model, pattern) or fnmatchcase(f"{entry.model}.{entry.tag}", pattern)
    ]
    if not rows:
        raise ConfigError(f"no weights match {pattern!r}; `zoo weights list` shows all")
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("weights", "from", "top-1", "licence", "hash", "here")
    for row in rows:
        table.add_row(
            f"{row['model']}.{row['tag']}",
            f"{escape(row['where'])}{' (dead)' if row.get('dead') else ''}",
            str((row.get("metric") or row.get("measured") or {}).get("top1", "-")),
            row.get("license", "unknown"),
            row["hash"],
            "yes" if row["here"] else "no",
        )
    Console().print(table)


@weights.command("get")
def get(name: Name) -> None:
    """Fetch weights into the cache, verified, and print where they are."""
    from zoo.checkpoints import get_weights

    print(get_weights(name))


@weights.command("convert")
def convert(
    source: Annotated[Path, typer.Argument(help="A published or own weights file.")],
    model: Annotated[str, typer.Argument(help="The model it is for.")],
    output: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    num_classes: Annotated[int | None, typer.Option(help="Where the file has another number.")] = None,
) -> None:
    """Write a weights file as safetensors with the model's own keys, its source in the metadata."""
    from zoo.checkpoints import convert_checkpoint

    arguments = {} if num_classes is None else {"num_classes": num_classes}
    print(convert_checkpoint(source, model, output, **arguments))


@weights.command("verify")
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Weights or files; all that are here.")] = None,
    model: Annotated[str | None, typer.Option(help="The model that files are for.")] = None,
) -> None:
    """Check hashes, every number and the fit of weights files; status 4 where one is wrong."""
    from zoo.checkpoints import verify_weights
    from zoo.errors import IntegrityError
    from zoo.weights.manifest import all_entries

    every = [f"{entry.model}.{entry.tag}" for entry in all_entries()]
    wrong, fetched = 0, False
    for name in names or every:
        verdict = verify_weights(name, model)
        if verdict.file is None:
            if names:
                print(f"{verdict.name}: not on this machine")
            continue
        print(f"{verdict.name}: {verdict.problem or f'sound, sha256 {verdict.sha256}'}")
        for warning in verdict.warnings:
            print(f"  note: {warning}")
        wrong += verdict.problem is not None
        fetched |= verdict.problem is not None and str(verdict.name) in every
    if wrong:
        again = "; delete what was fetched to fetch it again" if fetched else ""
        raise IntegrityError(f"{wrong} of the weights files {'is' if wrong == 1 else 'are'} wrong{again}")


@weights.command("pin")
def pin(name: Name) -> None:
    """Print sha256 and size of fetched weights, as a manifest states them."""
    from zoo.checkpoints import pin_weights

    sha256, size = pin_weights(name)
    print(f"  sha256: {sha256}\n  size: {size}")
