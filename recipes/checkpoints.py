"""Checkpoints from which a run continues as if it had never stopped, and the signals that stop it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import CheckpointIO

from zoo.errors import ConfigError, ZooError
from zoo.recipes.data.loader import EpochLoader
from zoo.recipes.files import link_atomically, load_checkpoint, save_checkpoint, sweep

LAST, BEST = "last.ckpt", "best.ckpt"


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's door to the disk, with our atomic files behind it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return load_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class Stopped(BaseException):
    """A signal asked for the end, after a step whose state is saved unless it was asked twice."""

    def __init__(self, number: int, step: int, *, saved: bool = True) -> None:
        super().__init__(number, step)
        self.number, self.step, self.saved = number, step, saved


def _stop_at_once(number: int, frame: Any) -> None:
    raise Stopped(number, 0, saved=False)


class Checkpoints(pl.Callback):
    """Saves `last` every so many steps, every epoch and on SIGTERM and SIGINT; `best` by the task's metric.

    A checkpoint is written only between optimiser steps. What is random follows from the position, and the
    position is in the checkpoint: nothing else is needed to go on exactly.
    """

    def __init__(
        self,
        folder: Path,
        loaders: tuple[EpochLoader, EpochLoader],
        facts: dict[str, Any],
        *,
        monitor: str,
        save_every: int,
        keep_best: int,
        patience: int | None = None,
    ) -> None:
        self.folder, self.loaders, self.facts, self.monitor = folder, loaders, facts, monitor
        self.loader = loaders[0]
        self.save_every, self.keep_best, self.patience = save_every, keep_best, patience
        self.waited = 0  # validations since the best one
        self.ranking: list[dict[str, float]] = []  # the best validations, best first: score, loss, epoch
        self.step = 0
        self.signal: int | None = None

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        for loader in self.loaders:
            loader.share(trainer.global_rank, trainer.world_size)
        if trainer.is_global_zero:
            sweep(self.folder)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Answer SIGTERM and SIGINT with Stopped: until the first step at once, from then on after a step."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # Without this Lightning would end by SIGINT with status 1, and leave the processes it had started
        # waiting for one that SIGTERM had ended.
        before = {each: signal.signal(each, _stop_at_once) for each in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.step = trainer.global_step
        self._stop_waiting(trainer)  # a run that had waited long enough does not begin again
        # Lightning's own handler ends a run between any two batches, with status 0 and nothing saved;
        # its teardown puts back what was there before.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note_signal)
            signal.signal(signal.SIGINT, self._note_signal)

    def _note_signal(self, number: int, frame: Any) -> None:
        if self.signal == signal.SIGINT == number:
            raise Stopped(number, self.step, saved=False)
        self.signal = number

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            return  # the step is not complete: gradients are still being gathered
        self.step = trainer.global_step
        self.loader.position = (trainer.current_epoch, batch_idx + 1)
        stop = self._stop_is_asked(trainer)
        if stop or (self.step % self.save_every == 0 and not trainer.is_last_batch):
            self._save(trainer)
        if stop:
            raise Stopped(self.signal or signal.SIGTERM, self.step)

    def on_validation_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.state.fn == "fit" and self._stop_is_asked(trainer):
            self._save(trainer)
            raise Stopped(self.signal or signal.SIGTERM, self.step)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.loader.position = (trainer.current_epoch + 1, 0)
        result, module.result = module.result, {}
        score: dict[str, float] = {}
        if result:
            score = {
                "score": result[self.monitor],
                "loss": result["val_loss"],
                "epoch": trainer.current_epoch + 1,
            }
            self.ranking.append(score)
            self.ranking.sort(key=lambda each: (-each["score"], each["loss"]))
            self.waited = 0 if score is self.ranking[0] else self.waited + 1
            self._stop_waiting(trainer)
        dropped = self.ranking[self.keep_best :]
        del self.ranking[self.keep_best :]
        names = [LAST]
        if score in self.ranking:
            names = [BEST, LAST] if score is self.ranking[0] else [LAST]
            names = [self._ranked(score), *names] if self.keep_best > 1 else names
        # One file under several names, `last` the last: a kill in between is resumed from before this epoch.
        self._save(trainer, names[0])
        if trainer.is_global_zero:
            for name in names[1:]:
                link_atomically(self.folder / names[0], self.folder / name)
            for each in dropped:
                (self.folder / self._ranked(each)).unlink(missing_ok=True)

    def _stop_waiting(self, trainer: pl.Trainer) -> None:
        if self.patience is not None and self.waited >= self.patience:
            trainer.should_stop = True

    def _ranked(self, score: dict[str, float]) -> str:
        return f"epoch-{score['epoch']:04.0f}.ckpt"

    def _stop_is_asked(self, trainer: pl.Trainer) -> bool:
        asked = self.signal is not None
        if trainer.world_size == 1:
            return asked
        # All processes must stop after the same step, whichever of them heard the signal.
        return trainer.strategy.reduce_boolean_decision(asked, all=False)

    def _save(self, trainer: pl.Trainer, name: str = LAST) -> None:
        weights = trainer.lightning_module.parameters()
        if not all(torch.isfinite(weight).all() for weight in weights):
            raise ZooError(
                f"weights became infinite or NaN at step {self.step}, so it was not saved; "
                f"continue from {self.folder / LAST} with a lower optim.lr"
            )
        trainer.save_checkpoint(self.folder / name)

    def state_dict(self) -> dict[str, Any]:
        return {"ranking": self.ranking, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ranking, self.waited = state["ranking"], state.get("waited", 0)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint.update(self.facts)
        checkpoint["position"] = list(self.loader.position)
        checkpoint["world_size"] = trainer.world_size
        if self.loader.position[1] == len(self.loader):
            # All steps of the epoch are done and its validation is not. Lightning resumes rightly only from
            # inside a validation, so the counters are put where they stand when its first batch was fetched.
            loops = checkpoint["loops"]["fit_loop"]
            for scope in ("current", "total"):
                progress = loops["epoch_loop.batch_progress"][scope]
                progress["completed"] = progress["processed"]
            validation = loops["epoch_loop.val_loop.batch_progress"]
            validation["total"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            validation["current"] = dict.fromkeys(validation["current"], 0)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        epoch, batch = checkpoint["position"]
        if batch and checkpoint["world_size"] != trainer.world_size:
            raise ConfigError(
                f"the checkpoint was written inside an epoch by {checkpoint['world_size']} processes, "
                f"not by {trainer.world_size}; resume with as many, or from a checkpoint between epochs"
            )
        self.loader.position = (epoch, batch)
