"""Lightning's Trainer as the recipes use it: our files, our report, and no noise."""

from __future__ import annotations

import logging
import random
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.warnings import PossibleUserWarning

from zoo.errors import ConfigError
from zoo.recipes.checkpoints import AtomicCheckpointIO, Checkpoints
from zoo.recipes.logs import MetricsFile, Report, TensorBoard
from zoo.recipes.run_folder import MODEL
from zoo.recipes.schema import Recipe
from zoo.recipes.tasks.base import Task


def build_trainer(
    made: Recipe,
    task: Task,
    folder: Path,
    checkpoints: Checkpoints,
    *,
    resumed_at: int | None,
    begin: Callable[[], None],
) -> pl.Trainer:
    """Return the Trainer of a recipe, which calls `begin` before its first step, in one of its processes.

    Raises: ConfigError for what Lightning refuses.
    """
    metrics = MetricsFile(folder / "metrics.csv", task.metrics)

    def begin_all() -> None:
        begin()
        metrics.keep_until(resumed_at or 0)

    trainer, optim = made.trainer, made.optim
    try:
        return pl.Trainer(
            accelerator=trainer.accelerator,
            devices=trainer.devices,
            num_nodes=trainer.num_nodes,
            strategy=trainer.strategy,
            sync_batchnorm=trainer.sync_batchnorm,
            precision=trainer.precision,
            deterministic=trainer.deterministic or None,
            max_epochs=optim.epochs + optim.cooldown_epochs,
            check_val_every_n_epoch=trainer.val_every,
            accumulate_grad_batches=optim.accumulate,
            gradient_clip_val=optim.clip_grad,
            # In this order: the report reads what the other one clears.
            callbacks=[
                Beginning(begin_all, folder / MODEL),
                Report(task.monitor, task.label),
                checkpoints,
                Ending(),
            ],
            logger=[metrics, TensorBoard(folder / "tensorboard", resumed_at and resumed_at + 1)],
            plugins=[AtomicCheckpointIO()],
            default_root_dir=folder,
            use_distributed_sampler=False,  # the loader shares its batches out by itself
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError, RuntimeError, TypeError, ImportError) as error:
        raise ConfigError(f"Lightning refuses the trainer section: {' '.join(str(error).split())}") from None


class Beginning(pl.Callback):
    """Writes the first files of a run: not before the last check, for they replace those of a run resumed.

    A finished run that trains on loses its `model`, which would pass for the result of what now begins;
    best.ckpt has the same weights.
    """

    def __init__(self, begin: Callable[[], None], model: Path) -> None:
        self.begin, self.model = begin, model
        self.trains = False

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.begin()

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero and not self.trains:
            self.model.unlink(missing_ok=True)
        self.trains = True


class Ending(pl.Callback):
    """Keeps this process alive to tell why it ends.

    Lightning kills it without a word as soon as it sees that one of those it started has failed.
    """

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        launcher = trainer.strategy.launcher
        if watched := getattr(launcher, "procs", None):
            launcher.procs = [*watched]
            watched.clear()


def end_others(trainer: pl.Trainer, *, wait: float) -> list[int]:
    """Wait some seconds for the processes that Lightning started, then kill them; return their statuses."""
    others = getattr(trainer.strategy.launcher, "procs", [])
    for other in others:
        try:
            other.wait(wait)
        except subprocess.TimeoutExpired:
            other.kill()
            other.wait()
    return [other.returncode for other in others]


def is_lost_connection(error: BaseException) -> bool:
    """Tell whether an error only says that another process of the training has ended."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's hints to itself, and give the random state back as it was."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    loggers = [
        logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            # Lightning 2.6 under a newer torch; nothing that a user could do about it.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            # Of a process that had no image to validate; the others' results are joined with nothing.
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
