"""`zoo choose`: which model to take within limits, measured on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from zoo.analysis.choosing import Candidate, Choice

NAMED = 4  # candidates named for each kind of reason


def choose(
    task: Annotated[str, typer.Option(help="classification, segmentation or generation.")] = "classification",
    size: Annotated[
        int | None, typer.Option(help="Side of the images in pixels; else each model's own.")
    ] = None,
    latency: Annotated[float | None, typer.Option(help="Milliseconds that a pass may take here.")] = None,
    memory: Annotated[float | None, typer.Option(help="MB for weights and the peak of a pass.")] = None,
    among: Annotated[str, typer.Option(help="Only these names; * and ? match, as in 'nat*'.")] = "*",
    most: Annotated[int, typer.Option(min=1, help="How many models to find.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 1,
    training: Annotated[bool, typer.Option("--training", help="With the backward pass.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for each candidate.")] = 1.0,
    patience: Annotated[float, typer.Option(min=0.0, help="Seconds for all of them.")] = 120.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to a file.")] = None,
) -> None:
    """Rank the models that keep within limits on this machine: zoo choose --size 224 --latency 100

    Figures are those that the models' authors publish; times and memory are measured now, with random
    weights.
    """
    import json

    from rich.console import Console

    from zoo.analysis.choosing import choose as find
    from zoo.weights.files import write_text

    errors = Console(stderr=True)
    made = find(
        task, size=size, latency=latency, memory=memory, among=among, most=most, batch=batch,
        training=training, device=device, seconds=seconds, patience=patience,
        told=lambda line: errors.print(line, style="dim", highlight=False, markup=False),
    )  # fmt: skip
    _show(made)
    if json_file is not None:
        write_text(json_file, json.dumps(made.plain(), indent=2) + "\n")
        print(json_file)


def _show(made: Choice) -> None:
    from rich.console import Console

    from zoo.cli.runs import print_table

    console = Console()
    about = made.about
    metric = {"top1": "top-1 (%)", "fid": "FID"}[(made.ranked + made.missed + made.unmeasured)[0].metric]
    what = "training step" if made.limits["training"] else "forward pass"
    head = ["model", metric, "pixels", "p50", "p90 (ms)", "memory (MB)", "parameters (M)"]
    rows = [
        [
            each.name,
            "-" if each.published is None else f"{each.published:g}",
            str(each.size),
            f"{each.milliseconds['p50']:.1f}",
            f"{each.milliseconds['p90']:.1f}",
            "-" if each.memory is None else f"{each.memory / 2**20:.0f}",
            f"{each.parameters / 1e6:.1f}",
        ]
        for each in made.ranked
    ]
    if made.ranked:
        print(f"{what} of {made.limits['batch']}, {about['device']}, torch {about['torch']}")
        print_table(head, rows, figures=True)
        console.print(f"{metric}: as the authors publish it; everything else was measured now")
        for each in made.ranked:
            where = f"{each.source}; licence {each.licence or 'not stated'}" if each.source else "none"
            console.print(f"published for {each.name}: {where}", highlight=False, soft_wrap=True)
    else:
        console.print("nothing that was measured keeps within these limits")
    for head, rows in (("measured, too much", made.missed), ("not measured", made.unmeasured)):
        for reason, names in _by_reason(rows):
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            line = f"{head}: {', '.join(names[:NAMED])}{more}: {reason}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if "load" in about:
        console.print(f"load of the machine at the start: {about['load']}", highlight=False)


def _by_reason(rows: list[Candidate]) -> list[tuple[str, list[str]]]:
    """Names that share a reason, apart from its figures."""
    found: dict[str, tuple[str, list[str]]] = {}
    for each in rows:
        key = "".join(character for character in each.reason if not character.isdigit())
        found.setdefault(key, (each.reason, []))[1].append(each.name)
    return [(_of_first(reason, names), names) for reason, names in found.values()]


def _of_first(reason: str, names: list[str]) -> str:
    """A reason with figures is that of the first one."""
    shared = len(names) > 1 and any(character.isdigit() for character in reason)
    return f"{reason} ({names[0]})" if shared else reason
