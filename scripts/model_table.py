"""Write the table of models into README.md, or with --check say whether it is up to date."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import zoo

README = Path(__file__).resolve().parent.parent / "README.md"
START, END = "<!-- models -->", "<!-- /models -->"


def table() -> str:
    """The table in Markdown, one row for each registered model."""
    rows = [
        "| model | parameters (M) | MACs (G) | input | top-1 | attention | paper | weights |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- | --- |",
    ]
    for name in zoo.list_models():
        info = zoo.model_info(name)
        weights = ", ".join(
            "in the package" if "file" in entry else f"[{entry['tag']}]({entry['url']})"
            for entry in info.weights
        )
        papers = ", ".join(
            f"[{p.partition(':')[2]}](https://arxiv.org/abs/{p.partition(':')[2]})"
            for p in info.paper.split(", ")
        )
        cells = (
            f"`{name}`",
            f"{info.params / 1e6:.3f}",
            f"{info.macs / 1e9:.3f}",
            str(info.input_size[-1]),
            "" if info.top1 is None else f"{info.top1:g}",
            info.attention,
            papers,
            weights,
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if the table is out of date"
    )
    arguments = parser.parse_args()
    text = README.read_text()
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    updated = f"{before}{START}\n{table()}\n{END}{after}"
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
