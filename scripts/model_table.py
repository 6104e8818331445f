"""Write the table of models into README.md, or with --check say whether it is up to date.

Speeds are those that scripts/bench/models.py measured last; a model without one has an empty cell.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import zoo

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
SPEEDS = ROOT / "scripts" / "bench" / "results" / "models_cpu.json"
START, END = "<!-- models -->", "<!-- /models -->"


def tables() -> str:
    """All backbones and, apart, the diffusion transformers, which have other columns."""
    return f"{backbones()}\n\n{generators()}"


def backbones() -> str:
    """The table in Markdown, one row for each."""
    rows = [
        "| model | params, M | MACs, G | input | top-1 | images/s | attention | paper | weights | licence |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- | --- | --- |",
    ]
    speeds = json.loads(SPEEDS.read_text())["models"] if SPEEDS.is_file() else {}
    for name in zoo.list_models(task="classification"):
        info = zoo.model_info(name)
        weights = ", ".join(map(_place, info.weights))
        cells = (
            f"`{name}`",
            f"{info.params / 1e6:.3f}",
            f"{info.macs / 1e9:.3f}",
            str(info.input_size[-1]),
            "" if info.top1 is None else f"{info.top1:g}",
            f"{speeds[name]['relative_images_per_s']:.2f}x" if name in speeds else "",
            info.attention,
            _papers(info),
            weights,
            "" if not weights else info.licence or "not stated",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def generators() -> str:
    """The table in Markdown, one row for each; the input are latents."""
    rows = [
        "| transformer | params, M | MACs, G | latents | attention | paper | weights | licence |",
        "| --- | ---: | ---: | ---: | --- | --- | --- | --- |",
    ]
    for name in zoo.list_models(task="generation"):
        info = zoo.model_info(name)
        size = " x ".join(map(str, info.input_size))
        weights = ", ".join(map(_place, info.weights))
        cells = (
            f"`{name}`", f"{info.params / 1e6:.1f}", f"{info.macs / 1e9:.2f}", size, info.attention,
            _papers(info), weights, "" if not weights else info.licence or "not stated",
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _papers(info: zoo.ModelInfo) -> str:
    """The papers of a model, as links."""
    numbers = (paper.partition(":")[2] for paper in info.paper.split(", "))
    return ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in numbers)


def _place(entry: dict[str, Any]) -> str:
    """Where a weights file is, as a link."""
    if "file" in entry:
        return "in the package"
    if "hub" in entry:
        return f"[{entry['tag']}](https://huggingface.co/{'/'.join(entry['hub'].split('/')[:2])})"
    return f"[{entry['tag']}]({entry['url']})" + (" (dead)" if "dead" in entry else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if the table is out of date"
    )
    arguments = parser.parse_args()
    text = README.read_text()
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    updated = f"{before}{START}\n{tables()}\n{END}{after}"
    if updated == text:
        return 0
    if arguments.check:
        print(
            "error: the model table in README.md is out of date; run python scripts/model_table.py",
            file=sys.stderr,
        )
        return 1
    README.write_text(updated)
    return 0


if __name__ == "__main__":
    sys.exit(main())
