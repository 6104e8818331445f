"""Runs side by side: what is in a folder of them, and in what some of them differ."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import ConfigError, ZooError, did_you_mean
from zoo.recipes.logs import COLUMNS, read_metrics
from zoo.recipes.run_folder import MODEL, RUNS


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run folder says of itself; `best` is its best validation by `monitor`, None before the first."""

    folder: Path
    task: str
    model: str
    data: str
    state: str  # finished, or stopped: training now looks the same
    started: str
    epoch: int
    step: int
    monitor: str
    best: float | None
    settings: dict[str, Any]  # the recipe by dotted keys
    curve: list[tuple[int, float]]  # of the monitor, by step

    def facts(self) -> dict[str, Any]:
        """Return the run as plain containers."""
        names = ("task", "model", "data", "state", "started", "epoch", "step", "monitor", "best")
        return {"folder": str(self.folder), **{name: getattr(self, name) for name in names}}


def read_run(folder: str | Path) -> Run:
    """Read what a run left so far. Raises ConfigError where there is none, or none that can be read."""
    folder = Path(folder)
    config = folder / "config.yaml"
    if not config.exists():
        near = did_you_mean(folder.name, [each.parent.name for each in folder.parent.glob("*/config.yaml")])
        raise ConfigError(f"{folder} is no run folder (no config.yaml in it){near}")
    try:
        return _read_run(folder, config)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ZooError):
            raise
        raise ConfigError(f"{folder} cannot be read ({' '.join(str(error).split())[:160]})") from None


def _read_run(folder: Path, config: Path) -> Run:
    from zoo.recipes.config import build, parse
    from zoo.recipes.tasks import task_of

    raw = parse(config.read_text(encoding="utf-8"), str(config))
    settings = dict(_leaves(raw))
    monitor = task_of(build({"task": raw.get("task", "classification")}, allow_missing=True)).monitor
    rows = read_metrics(folder / "metrics.csv")
    curve = [(int(row["step"]), float(row[monitor])) for row in rows if row.get(monitor)]
    environment = folder / "environment.json"
    started = json.loads(environment.read_text())["started"] if environment.exists() else ""
    return Run(
        folder=folder,
        task=str(raw.get("task", "classification")),
        model=str(settings.get("model.name", "")),
        data=str(settings.get("data.name", "")),
        state="finished" if (folder / MODEL).exists() else "stopped",
        started=started,
        epoch=int(float(rows[-1]["epoch"])) if rows else 0,
        step=int(rows[-1]["step"]) if rows else 0,
        monitor=monitor.removeprefix("val_"),
        best=max((value for _, value in curve), default=None),
        settings=settings,
        curve=curve,
    )


def find_runs(root: str | Path = RUNS) -> tuple[list[Run], list[str]]:
    """Return the runs in a folder and below, latest first, and what is wrong with those that are damaged."""
    root = Path(root)
    if not root.is_dir():
        raise ConfigError(f"no folder {root}; `zoo train` makes runs/, or name the folder that holds yours")
    runs: list[Run] = []
    wrong: list[str] = []

    def unreadable(error: OSError) -> None:
        wrong.append(f"{error.filename} cannot be read ({error.strerror})")

    walk = os.walk(root, onerror=unreadable)
    for folder in sorted(Path(parent) for parent, _, names in walk if "config.yaml" in names):
        try:
            runs.append(read_run(folder))
        except ZooError as error:
            wrong.append(f"{folder}: {' '.join(str(error).split())[:160]}")
        except OSError as error:
            unreadable(error)
    return sorted(runs, key=lambda run: run.started, reverse=True), wrong


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the dotted keys of the recipes that are not the same in all runs, with the value of each."""
    keys = sorted(set().union(*(run.settings for run in runs)))
    values = {key: [run.settings.get(key) for run in runs] for key in keys if key != "name"}
    return {key: each for key, each in values.items() if any(one != each[0] for one in each)}


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw training loss and validation metric of some runs into one picture.

    Raises: ConfigError for a folder, or an ending that is none of a picture's.
    """
    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib.figure import Figure

    known = FigureCanvasBase.get_supported_filetypes()
    if path.is_dir() or path.suffix[1:].lower() not in known:
        raise ConfigError(f"a picture must be a file ending in .{', .'.join(sorted(known))}, found {path}")
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run in runs:
        rows = read_metrics(run.folder / "metrics.csv")
        losses = [(int(row["step"]), float(row["train_loss"])) for row in rows if row.get("train_loss")]
        for axes, points in ((left, losses), (right, run.curve)):
            axes.plot(
                *zip(*points, strict=True) if points else ([], []), marker="." if len(points) < 30 else None
            )
    left.set(xlabel=COLUMNS[1], ylabel="training loss")
    right.set(xlabel=COLUMNS[1], ylabel=", ".join(dict.fromkeys(run.monitor for run in runs)))
    right.legend([str(run.folder) for run in runs], fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _leaves(container: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in container.items():
        deeper = isinstance(value, dict) and name != "args"
        found += _leaves(value, f"{prefix}{name}.") if deeper else [(f"{prefix}{name}", value)]
    return found
