#!/usr/bin/env python
"""Charts and tables from what gpu_suite.py found.

python scripts/bench/plot.py RESULTS.json                    the tables, as Markdown
python scripts/bench/plot.py RESULTS.json --charts FOLDER    roofline.svg and ratios.svg as well
python scripts/bench/plot.py RESULTS.json --readme FILE      the tables between the marks of a README
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEGIN, END = "<!-- begin of the GPU tables -->", "<!-- end of the GPU tables -->"
STEPS = ("forward", "training")


# Tables -----------------------------------------------------------------------------------------------------


def times_table(found: dict[str, Any]) -> str:
    """Ours in milliseconds, its share of the floor, and every peer in milliseconds and as a ratio to ours."""
    lines = ["| case | step | triton | of the floor | peers |", "| --- | --- | --- | --- | --- |"]
    for (case, step), rows in _by_case(found).items():
        ours = rows.get("triton", {})
        cells = [_peer(name, row, ours) for name, row in rows.items() if name != "triton"]
        share = f"{ours['floor'] / ours['ms']:.0%} ({ours['bound']})" if "floor" in ours else "-"
        lines.append(f"| {case} | {step} | {_ms(ours)} | {share} | {'; '.join(cells) or '-'} |")
    return "\n".join(lines)


def goals_table(found: dict[str, Any]) -> str:
    """Every goal beside the ratio measured."""
    lines = ["| case | step | peer | goal | measured | |", "| --- | --- | --- | --- | --- | --- |"]
    for goal in found.get("goals", []):
        measured = "-" if goal["measured"] is None else f"{goal['measured']:.2f}x"
        verdict = {None: "not measured", True: "reached", False: "missed"}[goal["reached"]]
        cells = (goal["case"], goal["what"], goal["peer"], f"{goal['ratio']:.2f}x", measured, verdict)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(found: dict[str, Any]) -> str:
    """Device, ceilings, checks and both tables."""
    about, limits, checks = found["about"], found["ceilings"], found["checks"]
    right = sum(row["right"] for row in checks)
    parts = [
        f"{about['device']}, torch {about['torch']}, Triton {about['triton']}, {about['date']} UTC, "
        f"commit {about['commit'] or 'unknown'}: copies {limits['bytes'] / 1e12:.2f} TB/s, "
        f"multiplies {limits['flops'] / 1e12:.0f} TF/s in bfloat16. "
        f"{right} of {len(checks)} comparisons with float64 within bounds.",
        times_table(found),
        goals_table(found),
    ]
    if found["left_out"]:
        parts.append("Left out: " + "; ".join(f"{row['what']} ({row['why']})" for row in found["left_out"]))
    return "\n\n".join(parts)


def with_report(text: str, found: dict[str, Any]) -> str:
    """The text with the report between its marks.

    Raises: ValueError for a text without them.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"the file must hold the lines {BEGIN} and {END}; the tables go between them")
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n{report(found)}\n{END}{rest.partition(END)[2]}"


def _by_case(found: dict[str, Any]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    table: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in found["rows"]:
        table.setdefault((row["case"], row["step"]), {})[row["by"]] = row
    return table


def _ms(row: dict[str, Any]) -> str:
    return f"{row['ms']:.3g} ms" if "ms" in row else row.get("error", "not run")


def _peer(name: str, row: dict[str, Any], ours: dict[str, Any]) -> str:
    ratio = f" = {row['ms'] / ours['ms']:.2f}x" if "ms" in row and "ms" in ours else ""
    return f"{name} {_ms(row)}{ratio}"


# Charts -----------------------------------------------------------------------------------------------------


def roofline(found: dict[str, Any]) -> Figure:
    """Operations a second over operations a byte, under the two ceilings; forward passes."""
    from matplotlib.figure import Figure

    limits = found["ceilings"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    ridge = limits["flops"] / limits["bytes"]
    reach = [ridge / 100, ridge, ridge * 100]
    axes.plot(reach, [min(x * limits["bytes"], limits["flops"]) / 1e12 for x in reach], "k-", lw=1)
    points = [row for row in found["rows"] if row.get("flops") and "ms" in row]
    for row in points:
        (dot,) = axes.plot(row["flops"] / row["moved"], row["flops"] / row["ms"] / 1e9, "o")
        dot.set_label(row["case"])
    axes.set(xlabel="FLOP per byte", ylabel="TFLOP/s", title=f"forward, {found['about']['device']}")
    if points:
        axes.legend(fontsize=6, loc="lower right")
    return figure


def ratios(found: dict[str, Any]) -> Figure:
    """A bar for every goal: how many times as fast as the peer, the goal as a mark."""
    from matplotlib.figure import Figure

    goals = [goal for goal in found.get("goals", []) if goal["measured"] is not None]
    figure = Figure(figsize=(9, 1 + 0.3 * max(len(goals), 1)), layout="constrained")
    axes = figure.add_subplot(xscale="log")
    places = range(len(goals))
    colours = ["tab:green" if goal["reached"] else "tab:red" for goal in goals]
    axes.barh(places, [goal["measured"] for goal in goals], color=colours)
    axes.plot([goal["ratio"] for goal in goals], places, "k|", ms=10)
    axes.axvline(1, color="grey", lw=0.5)
    names = [f"{goal['case']}, {goal['what']}: {goal['peer']}" for goal in goals]
    axes.set_yticks(places, names, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the peer; the mark is the goal")
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; write charts and a README where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--charts", type=Path, metavar="FOLDER", help="write the charts there")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put the tables between its marks")
    given = parser.parse_args(arguments)
    found = json.loads(given.results.read_text())
    if given.charts:
        given.charts.mkdir(parents=True, exist_ok=True)
        for name, chart in (("roofline", roofline), ("ratios", ratios)):
            chart(found).savefig(given.charts / f"{name}.svg")
    if given.readme:
        given.readme.write_text(with_report(given.readme.read_text(), found))
    print(report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
