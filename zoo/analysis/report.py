"""Benchmarks to look at: charts of cost over resolution, and one HTML page of tables and charts."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from zoo.analysis.bench import Measurement, Report
from zoo.analysis.pictures import COLOURS, MARKERS, _figure
from zoo.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 64rem; padding: 0 1rem;
       color: #1a1a1a; background: #fff; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; }
p, dl { color: #444; font-size: .9rem; }
"""


def draw_costs(report: Report) -> Figure:
    """Draw time and peak memory over the number of tokens, both axes logarithmic, with fitted exponents.

    Raises: ConfigError for a report without several sizes.
    """
    if not report.exponents:
        raise ConfigError("a chart over resolution needs measurements of several sizes")
    panels = [("time", "median time (ms)", lambda row: row.median)]
    if any("memory" in fitted for fitted in report.exponents.values()):
        panels.append(("memory", "peak memory (MB)", lambda row: (row.memory or 0) / 2**20))
    figure = _figure((5.2 * len(panels), 4.2))
    for axis, (quantity, label, cost) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for i, name in enumerate(report.exponents):
            points = [(row.tokens, cost(row)) for row in report.rows if row.name == name]
            exponent = report.exponents[name].get(quantity)
            fitted = f"{name}: tokens^{exponent:.2f}" if exponent is not None else name
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, label=fitted)
        axis.set(xscale="log", yscale="log", xlabel="tokens of the map", ylabel=label)
        axis.grid(alpha=0.3, which="both")
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{report.title}, {_where(report)}", fontsize=9)
    return figure


def table_of(report: Report) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of a report's table; ratios are medians of the first of each size over each row's."""
    heads = [
        "what",
        "size",
        "pass",
        "least",
        "p10",
        "p50",
        "p90 (ms)",
        "ratio",
        "memory (MB)",
        "MACs (M)",
        "turns",
    ]
    first: dict[int, Measurement] = {}
    rows = []
    for row in report.rows:
        base = first.setdefault(row.side, row)
        times = [f"{row.milliseconds[key]:.2f}" for key in ("least", "p10", "p50", "p90")]
        memory = "-" if row.memory is None else f"{row.memory / 2**20:.1f}"
        macs = "-" if row.macs is None else f"{row.macs / 1e6:,.1f}"
        size = f"{row.batch} x {row.side}\u00b2"
        ratio = f"{base.median / max(row.median, 1e-9):.2f}"
        rows.append([row.name, size, row.what, *times, ratio, memory, macs, str(row.turns)])
    return heads, rows


def report_page(reports: Sequence[Report]) -> str:
    """One HTML page of tables and charts that needs no network.

    Raises: ConfigError for no report.
    """
    if not reports:
        raise ConfigError("a page needs at least one benchmark; write one with zoo bench ... --output folder")
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Benchmarks</title>',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        f"<style>{_STYLE}</style></head><body><h1>Benchmarks</h1>",
        "<p>Rows of one size ran in turns in one process. Times are processor time on one CPU thread, or "
        "between events on a GPU; only ratios carry over to other machines. A ratio above 1 is faster than "
        "the first row of that size. Memory is what one pass adds to the peak.</p>",
    ]
    for report in reports:
        parts.append(f"<h2>{escape(report.title)}</h2>")
        facts = "; ".join(f"{key} {value}" for key, value in report.about.items())
        parts.append(f"<p>{escape(facts)}</p>")
        if report.exponents:
            parts.append(f'<img alt="cost over tokens, logarithmic" src="{_picture(draw_costs(report))}">')
            parts.append(_html(["exponent in tokens", "time", "memory", "MACs"], _exponents(report)))
        parts.append(_html(*table_of(report)))
    return "\n".join([*parts, "</body></html>"])


def _exponents(report: Report) -> list[list[str]]:
    quantities = ("time", "memory", "macs")
    return [
        [name, *(f"{fitted[q]:.2f}" if q in fitted else "-" for q in quantities)]
        for name, fitted in report.exponents.items()
    ]


def _html(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(heads, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _picture(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _where(report: Report) -> str:
    about = report.about
    return f"{about.get('device', '')} of {about.get('processor', '')}, torch {about.get('torch', '')}"
