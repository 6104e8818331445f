"""What a run says: metrics.csv, TensorBoard, a bar on a terminal, one line for each epoch elsewhere."""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zoo.recipes.files import write_atomically

COLUMNS = ("epoch", "step", "lr", "train_loss")  # and the metrics of the task


class MetricsFile(Logger):
    """metrics.csv: one row for each logged step and each validation of `metrics`; `step` counts steps done.

    Rows after the step from which a run continues are removed first, so that the file of a run that was
    killed and resumed equals that of one that was not, byte for byte.
    """

    def __init__(self, path: Path, metrics: Sequence[str]) -> None:
        super().__init__()
        self.path, self.columns = path, (*COLUMNS, *metrics)

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *arguments: Any, **keywords: Any) -> None:
        """Nothing: the recipe is in config.yaml, uninterpolated."""

    def keep_until(self, step: int) -> None:
        """Drop the rows of later steps, and what a kill left of a half-written one."""
        kept = [row for row in read_metrics(self.path) if int(row["step"]) <= step]
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        write_atomically(self.path, lambda file: file.write(text.getvalue().encode()))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step} | {name: value for name, value in metrics.items() if name in self.columns}
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)


class TensorBoard(Logger):
    """The same values for TensorBoard; those of later steps than `purge_step` no longer count."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        super().__init__()
        self.folder, self.purge_step = folder, purge_step
        self.writer: Any = None

    @property
    def name(self) -> str:
        return "tensorboard"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *arguments: Any, **keywords: Any) -> None:
        """Nothing: the recipe is in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=self.purge_step)
        for name, value in metrics.items():
            self.writer.add_scalar(name.replace("_", "/", 1), value, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Return the whole rows of a metrics file, the columns as text; empty where a row has no such value."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]
    return [row for row in csv.DictReader(io.StringIO(whole)) if row.get("step") and None not in row.values()]


class Report(pl.Callback):
    """Shows epoch, step, loss, rate and `monitor`: a bar on a terminal, else a line for each validation."""

    def __init__(self, monitor: str, label: str, console: Console | None = None) -> None:
        self.monitor, self.label = monitor, label
        self.console = console if console is not None else Console(file=sys.stderr)
        self.bar: Progress | None = None
        self.score = ""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.began, self.first = time.monotonic(), trainer.global_step
        if not trainer.is_global_zero or not self.console.is_terminal:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, transient=True)
        total = trainer.max_epochs * module.steps_per_epoch
        self.task = self.bar.add_task("", total=total, completed=trainer.global_step)
        self.bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.bar is not None and (trainer.global_step % 5 == 0 or trainer.is_last_batch):
            text = (
                f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  loss {outputs['loss'].item():.3f}"
            )
            text += f"  lr {module.lr:.1e}{self.score}"
            self.bar.update(self.task, completed=trainer.global_step, description=text)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        if not module.result:
            return
        self.score = f"  {self.label} {100 * module.result[self.monitor]:.2f} %"
        if self.bar is None and trainer.is_global_zero:
            epoch = trainer.current_epoch + 1
            seconds = time.monotonic() - self.began
            print(
                f"epoch {epoch}/{trainer.max_epochs}  val loss {module.result['val_loss']:.4f}  "
                f"{self.score.strip()}  {seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
