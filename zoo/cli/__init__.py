"""The command `zoo`: thin over the Python functions; one clear line and an exit code for every mistake."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

USAGE, DATA, RESOURCES, INTERRUPTED, TERMINATED = 2, 3, 5, 130, 143
EXTRAS = {  # of this package, and what each of them brings
    "recipes": ("pytorch_lightning", "torchmetrics", "sklearn", "skimage", "matplotlib", "tensorboard"),
    "diffusion": ("diffusers", "transformers", "peft"),
    "export": ("onnx", "onnxscript", "onnxruntime"),
}


def build() -> object:
    """Build the typer application; imported late so that a shell completion stays fast."""
    import typer

    from zoo.cli import bench, choose, data, generate, models, recipes, runs, visualize, weights

    app = typer.Typer(
        name="zoo",
        help="Attention for vision and diffusion: models by name, recipes to train them.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )

    def tell_version(wanted: bool) -> None:
        if wanted:
            from zoo import __version__

            print(f"zoo {__version__}")
            raise typer.Exit

    @app.callback(epilog="Every command takes --debug, which shows the full traceback of an error.")
    def common(
        version: bool = typer.Option(
            False, "--version", callback=tell_version, is_eager=True, help="Show the version."
        ),
    ) -> None: ...

    app.command("list")(models.list_)
    app.command("info")(models.info)
    app.command("train")(recipes.train)
    app.command("eval")(recipes.evaluate)
    app.command("predict")(recipes.predict)
    app.command("generate")(generate.generate)
    app.command("export")(runs.export)
    app.add_typer(runs.runs, name="runs")
    app.add_typer(recipes.recipes, name="recipes")
    app.add_typer(data.data, name="data")
    app.add_typer(weights.weights, name="weights")
    app.command("visualize")(visualize.visualize)
    app.command("bench")(bench.bench)
    app.command("choose")(choose.choose)
    app.command("doctor")(models.doctor)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status.

    0 done, 2 usage or configuration, 3 data, 4 integrity, 5 resources, 130 interrupted, 143 terminated.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that a terminal has no letters for is shown all the same
            stream.reconfigure(errors="backslashreplace")
    try:
        status = build()(args=arguments, prog_name="zoo", standalone_mode=False)
        if status == INTERRUPTED:  # what typer made of a KeyboardInterrupt, without a word
            raise KeyboardInterrupt
        sys.stdout.flush()  # here: when the interpreter ends, a closed pipe cannot be told any more
    except BaseException as error:
        if debug and not isinstance(error, SystemExit):
            raise
        return _report(error)
    return status if isinstance(status, int) else 0


def _report(error: BaseException) -> int:
    """Say in one line on stderr what went wrong, and return the exit status that belongs to it."""
    from zoo.errors import ZooError

    # typer's parser turns a closed pipe into an exit of its own.
    if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        return 0
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    # typer's exceptions are told by name and method: their module changed between its versions.
    if type(error).__name__ == "Exit":
        return error.exit_code
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message())
        return USAGE
    message, status = str(error), 1
    if hasattr(error, "format_message"):
        message, status = f"{error.format_message().rstrip('.')}; see zoo --help", USAGE
    elif isinstance(error, ZooError):
        status = error.exit_code
    elif isinstance(error, MemoryError) or "out of memory" in message.lower():
        message = f"not enough memory ({message or 'allocation failed'}); use a smaller batch or image size"
        status = RESOURCES
    elif isinstance(error, ModuleNotFoundError) and (extra := _extra_with(error.name or "")):
        message = f"this needs {error.name}, which is not installed; run: pip install 'attnzoo[{extra}]'"
        status = RESOURCES
    elif isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        told = f"{error.filename or 'file system'}: {error.strerror}" if error.strerror else message
        message, status = told, RESOURCES if full else DATA
    else:
        message = f"unexpected {type(error).__name__}: {message}; run again with --debug for the traceback"
    lines = [line.strip() for line in message.splitlines() if line.strip()] or [type(error).__name__]
    print("error:", "\n".join(lines[:3]), file=sys.stderr)
    return status


def _extra_with(module: str) -> str | None:
    """The extra of this package that brings a module of another one."""
    return next((extra for extra, names in EXTRAS.items() if module.partition(".")[0] in names), None)


def entry_point() -> None:
    """What the installed command calls."""
    sys.exit(main())
