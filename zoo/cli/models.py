"""`zoo list`, `zoo info` and `zoo doctor`: what there is, and what can run here."""

from __future__ import annotations

from typing import Annotated

import typer


def list_(
    pattern: Annotated[str, typer.Argument(help="Names to show; * and ? match, as in 'nat*'.")] = "*",
    family: Annotated[str | None, typer.Option(help="Only models of this family, such as nat.")] = None,
    task: Annotated[str | None, typer.Option(help="Only models for this task.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Only models with weights.")] = False,
) -> None:
    """List the models, one name a line."""
    from zoo import list_models
    from zoo.errors import ConfigError

    names = list_models(pattern, family=family, task=task, pretrained=pretrained)
    if not names:
        raise ConfigError(f"no model matches {pattern!r}; `zoo list` shows all names")
    print("\n".join(names))


def info(
    name: Annotated[str, typer.Argument(help="A model name from `zoo list`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what is known of a model: size, cost, paper, weights, recipes."""
    import dataclasses
    import json

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from zoo import model_info

    facts = dataclasses.asdict(model_info(name))
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in facts.items():
        table.add_row(key.replace("_", " "), escape(_readable(key, value)))
    Console().print(table)


def _readable(key: str, value: object) -> str:
    if value is None or value == () or value == []:
        return "-"
    if key == "params":
        return f"{value / 1e6:.3f} M"
    if key == "macs":
        return f"{value / 1e9:.3f} G"
    if key == "input_size":
        return " x ".join(str(side) for side in value)
    if isinstance(value, list | tuple):
        return "\n".join(_readable("", item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v}" for k, v in value.items() if v is not None)
    return str(value)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell what is installed, what each backend can run here, and why not."""
    import json
    import platform
    from importlib import metadata

    import torch
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from zoo import ops

    packages = {}
    for package in _PACKAGES:
        try:
            packages[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            packages[package] = None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    backends = [
        {"op": row.op, "backend": row.backend, "runs": row.reason is None, "reason": row.reason}
        for row in ops.backends()
    ]
    report = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "packages": packages,
        "backends": backends,
    }
    if as_json:
        print(json.dumps(report, indent=2))
        return
    console = Console()
    console.print(f"python {report['python']} on {report['platform']}, {report['threads']} threads")
    console.print(f"GPUs: {', '.join(gpus) if gpus else 'none; everything runs on the CPU'}")
    table = Table("package", "version", "needed for")
    for package, purpose in _PACKAGES.items():
        table.add_row(package, packages[package] or "[dim]not installed[/]", escape(purpose))
    console.print(table)
    table = Table("operation", "backend", "here")
    for row in backends:
        state = "[green]runs[/]" if row["runs"] else f"no: {escape(row['reason'])}"
        table.add_row(row["op"], row["backend"], state)
    console.print(table)


_PACKAGES = {
    "torch": "everything",
    "torchvision": "everything",
    "timm": "everything",
    "triton": "GPU kernels",
    "pytorch-lightning": "recipes: pip install 'attnzoo[recipes]'",
    "torchmetrics": "recipes",
    "scikit-learn": "recipes: the digits",
    "matplotlib": "recipes: pictures",
    "tensorboard": "recipes: logs",
    "diffusers": "diffusion: pip install 'attnzoo[diffusion]'",
    "transformers": "diffusion",
    "peft": "diffusion",
    "natten": "an optional peer of the neighborhood operation",
    "xformers": "an optional peer: pip install 'attnzoo[xformers]'",
}
