"""`zoo bench`: what models and operations cost on this machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from zoo.analysis.bench import Report


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME... | report FILE...",
            help="Models or operations; NAME@backend names a backend. Or report and files of earlier runs.",
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="A peer that runs in turns with them; it comes first.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="attention=neighborhood,global,... : cost over resolution.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Side of images in pixels or of maps in tokens; several with commas.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images or maps at once.")] = 1,
    training: Annotated[bool, typer.Option("--training", help="With the backward pass.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Each also through torch.compile.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for each size, at least three turns.")] = 5.0,
    no_memory: Annotated[bool, typer.Option("--no-memory", help="Do not measure memory.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for bench.json and charts; a .json or, for report, .html file."),
    ] = None,
) -> None:
    """Measure time, memory and multiply-adds: zoo bench nat_mini --against swin_tiny_patch4_window7_224

    Cost over resolution: zoo bench --compare attention=neighborhood,window,global --output bench
    One page of earlier runs: zoo bench report bench/bench.json
    """
    from zoo.errors import ConfigError, ResourceError, ZooError

    names = list(names or ())
    if names[:1] == ["report"]:
        _write_page(names[1:], output)
        return
    if bool(names) == bool(compare):
        raise ConfigError("name models or operations, or use --compare attention=..., one of the two")
    options = {"batch": batch, "training": training, "device": device, "dtype": _dtype(dtype)}
    sizes = _sizes(size)
    if compare:
        if against or compiled:
            raise ConfigError(
                "--compare takes neither --against nor --compile; what is compared is its own peer"
            )
        run = partial(_over_resolution, compare, sizes, seconds, not no_memory, options)
    else:
        specs = [*([against] if against else []), *names]
        run = partial(_in_turns, specs, sizes, seconds, not no_memory, compiled, options)
    try:
        made = run()
    except RuntimeError as error:
        if not str(error).startswith("backend "):
            raise
        raise ResourceError(str(error)) from None
    except ValueError as error:  # what an operation does not take, such as a map that windows do not divide
        if isinstance(error, ZooError):
            raise
        raise ConfigError(str(error)) from None
    _show(made)
    if output is not None:
        _write(made, output)


def _in_turns(
    specs: list[str],
    sizes: list[int],
    seconds: float,
    memory: bool,
    compiled: bool,
    options: dict[str, Any],
) -> Report:
    import torch

    from zoo.analysis import bench as measuring

    rows = []
    for side in sizes or [None]:
        torch.manual_seed(0)
        subjects = []
        for spec in dict.fromkeys(specs):
            for way in (False, True) if compiled else (False,):
                subjects.append(measuring.subject(spec, size=side, compiled=way, **options))
        what = "training" if options["training"] else "forward"
        common = {"device": options["device"], "batch": options["batch"], "what": what}
        rows += measuring.measure(subjects, seconds=seconds, memory=memory, **common)
    return measuring.Report(", ".join(specs), measuring.machine(options["device"]), rows)


def _over_resolution(
    text: str, sizes: list[int], seconds: float, memory: bool, options: dict[str, Any]
) -> Report:
    from zoo.analysis import bench as measuring
    from zoo.errors import ConfigError

    key, _, values = text.partition("=")
    mechanisms = [name.strip() for name in values.split(",") if name.strip()]
    if key != "attention" or not mechanisms:
        raise ConfigError(
            f"--compare must be attention=NAME,NAME with names of {', '.join(measuring.MECHANISMS)}, "
            f"found {text!r}"
        )
    given = {"sides": sizes} if sizes else {}
    return measuring.compare(
        list(dict.fromkeys(mechanisms)), seconds=seconds, memory=memory, **given, **options
    )


def _show(made: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    from zoo.analysis.report import table_of

    about = made.about
    heads, rows = table_of(made)
    # What fits 80 columns; the file and the page have the rest.
    shown = [i for i, head in enumerate(heads) if head not in ("pass", "least", "p10", "turns")]
    heads, rows = [heads[i] for i in shown], [[row[i] for i in shown] for row in rows]
    what = made.rows[0].what if made.rows else ""
    table = Table(
        title=f"{what}, {about['device']} of {about['processor']}, torch {about['torch']}, {about['date']}"
    )
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    for name, fitted in made.exponents.items():
        told = ", ".join(f"{quantity} {value:.2f}" for quantity, value in fitted.items())
        console.print(f"{name}: exponents in the number of tokens: {told}", highlight=False)


def _write(made: Report, output: Path) -> None:
    import json

    from zoo.analysis.report import draw_costs
    from zoo.weights.files import write_text

    file = output if output.suffix == ".json" else output / "bench.json"
    write_text(file, json.dumps(made.plain(), indent=2) + "\n")
    written = [file]
    if made.exponents:
        written.append(file.with_suffix(".png"))
        draw_costs(made).savefig(written[-1], dpi=110)
    print(", ".join(map(str, written)))


def _write_page(files: list[str], output: Path | None) -> None:
    import json

    from zoo.analysis.bench import Report
    from zoo.analysis.report import report_page
    from zoo.errors import ConfigError, DataError
    from zoo.weights.files import write_text

    if not files:
        raise ConfigError("zoo bench report needs files written by zoo bench ... --output")
    reports = []
    for file in map(Path, files):
        if not file.is_file():
            raise DataError(f"no file {file}; zoo bench NAME --output folder writes folder/bench.json")
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{file} is no JSON: {error}") from None
        try:
            reports.append(Report.from_plain(data))
        except ConfigError as error:
            raise DataError(f"{file}: {error}") from None
    page = output if output is not None else Path("bench.html")
    page = page if page.suffix == ".html" else page / "bench.html"
    write_text(page, report_page(reports))
    print(page)


def _sizes(text: str | None) -> list[int]:
    from zoo.errors import ConfigError

    if text is None:
        return []
    sides = text.split(",")
    if not all(side.strip().isdecimal() and int(side) > 0 for side in sides):
        raise ConfigError(f"--size must be positive numbers such as 28,56, found {text!r}")
    return [int(side) for side in sides]


def _dtype(name: str) -> Any:
    import torch

    from zoo.errors import ConfigError

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigError(f"--dtype must be {', '.join(known)}, found {name!r}")
    return known[name]
