"""Training as every task has it: optimiser, schedule, averaged weights, exact steps, refusal of bad losses.

What a task says is in its `Objective`. All that must hold at any stop and any number of workers is here and
in `checkpoints`, so that no task can lose it.
"""

from __future__ import annotations

import math
import signal
import threading
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from zoo.errors import ConfigError, DataError, ZooError
from zoo.recipes.data.loader import EpochLoader, reseed
from zoo.recipes.schema import Optim, Recipe
from zoo.recipes.tasks.base import Objective
from zoo.recipes.tuning import freeze, still_modules


class Training(pl.LightningModule):
    """Trains `model` on the batches of `loader`; `result` holds the metrics of the last validation."""

    def __init__(self, model: nn.Module, recipe: Recipe, loader: EpochLoader, objective: Objective) -> None:
        super().__init__()
        self.model, self.recipe, self.loader, self.objective = model, recipe, loader, objective
        freeze(model, recipe.model.freeze)
        self.still = still_modules(model)
        # Made here too, so that what it refuses leaves no run folder behind.
        optimizer = self._optimizer(model, recipe.optim.lr)
        self.groups = None
        if recipe.trainer.strategy.startswith("fsdp"):
            # Which parameters decay is read off their shapes, and sharding flattens them: keep the names.
            self.groups = _named_groups(model, optimizer)
        ema, warmup = recipe.optim.ema, recipe.optim.ema_warmup
        self.ema = None
        if ema is not None:
            self.ema = ModelEmaV3(model, decay=ema, use_warmup=warmup).requires_grad_(False)
        self.result: dict[str, float] = {}
        self.losses: list[Tensor] = []  # of the batches since the last step
        self._watch: Any = None  # what runs when a process that this one started ends
        if recipe.trainer.channels_last:
            model.to(memory_format=torch.channels_last)
            self.result_model.to(memory_format=torch.channels_last)
        if recipe.trainer.compile:
            model.compile()

    @property
    def result_model(self) -> nn.Module:
        """The network that is validated and exported."""
        return self.model if self.ema is None else self.ema.module

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch."""
        return math.ceil(len(self.loader) / self.recipe.optim.accumulate)

    def step_share(self, batch_idx: int) -> float:
        """Return by what a loss is multiplied before Lightning divides it by optim.accumulate.

        That is more than 1 where the last step of an epoch has fewer batches, as in timm's training.
        """
        accumulate = self.recipe.optim.accumulate
        rest = len(self.loader) % accumulate
        return accumulate / rest if batch_idx >= len(self.loader) - rest else 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optim = self.recipe.optim
        lr = optim.lr * rate_factor(self.recipe, self.trainer.world_size)
        trained: nn.Module | list[dict[str, Any]] = self.model
        if self.groups is not None:
            named = self.model.named_parameters()
            parameters = {name.replace("_fsdp_wrapped_module.", ""): each for name, each in named}
            trained = [
                {**options, "params": [parameters[name] for name in names]} for names, options in self.groups
            ]
        optimizer = self._optimizer(trained, lr)
        self.schedule = schedule(optimizer, optim, self.steps_per_epoch)
        return optimizer

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if gradient_clip_val is not None and isinstance(self.trainer.model, FullyShardedDataParallel):
            self.trainer.model.clip_grad_norm_(gradient_clip_val)  # a shard alone does not know the norm
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _optimizer(self, trained: nn.Module | list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        optim = self.recipe.optim
        if optim.betas is not None and not get_optimizer_info(optim.name).has_betas:
            raise ConfigError(f"optim.betas: optim.name={optim.name} reads none; leave them out")
        betas = {"betas": tuple(optim.betas)} if optim.betas is not None else {}
        try:
            return create_optimizer_v2(
                trained,
                opt=optim.name,
                lr=lr,
                weight_decay=optim.weight_decay,
                momentum=optim.momentum,
                layer_decay=optim.layer_decay if isinstance(trained, nn.Module) else None,
                **betas,
                **optim.args,
            )
        except (TypeError, ValueError) as error:  # an argument that it does not know, or a value it refuses
            if not optim.momentum and "momentum" in str(error):
                raise ConfigError(
                    f"optim.momentum=0.0 does not fit optim.name={optim.name}, which looks ahead by it; give "
                    "more than 0, or optim.name=momentum for plain SGD"
                ) from None
            given = self.recipe.shown("optim.args")
            raise ConfigError(f"optim.args={given} do not fit optim.name={optim.name}: {error}") from None

    def watch_readers(self) -> None:
        """Let PyTorch notice again when a reading process is killed.

        It says so once in a process that it wants to know, and Lightning takes that back when training ends.
        """
        if callable(self._watch) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, self._watch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout, drop path and mixup of a step follow from its number: a resumed run repeats them exactly.
        reseed(self.recipe.seed, "step", self.current_epoch, batch_idx, self.global_rank)
        self.schedule.step_update(self.trainer.global_step)
        self._watch = signal.getsignal(signal.SIGCHLD)
        for module in self.still:  # their statistics stay too, and nothing is dropped in them
            module.eval()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.objective.loss(self.model, self.channels(batch))
        if not torch.isfinite(loss):
            self._refuse(loss, batch_idx)
        self.losses.append(loss.detach())
        return loss * self.step_share(batch_idx)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            # timm warms up by the number of the step, which a resumed run knows too.
            step = self.trainer.global_step + 1 if self.recipe.optim.ema_warmup else None
            self.ema.update(self.model, step=step)
        step = self.trainer.global_step + 1
        if step % self.recipe.trainer.log_every == 0:
            loss = torch.stack(self.losses).mean()  # of all processes: each had its part of the images
            loss = self.trainer.strategy.reduce(loss, reduce_op="mean")
            self.write(step, train_loss=loss.item(), lr=self.lr)
        self.losses.clear()

    @property
    def lr(self) -> float:
        """The learning rate of the present step, before layer decay."""
        groups = self.trainer.optimizers[0].param_groups
        return max(group["lr"] / group.get("lr_scale", 1.0) for group in groups)

    def on_validation_epoch_start(self) -> None:
        self.validated = False

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch[0] is None:  # other processes have images for this step
            return
        self.validated = True
        number = batch_idx * self.trainer.world_size + self.global_rank
        self.objective.update(self.result_model, self.channels(batch), number)

    def on_validation_epoch_end(self) -> None:
        if self.trainer.world_size > 1:
            self._refuse_unreadable(self.trainer.val_dataloaders)
        self.result = self.objective.compute()
        where, step = Path(self.trainer.default_root_dir), self.trainer.global_step
        first = self.trainer.is_global_zero
        self.result |= self.objective.show(self.result_model, where, step, first=first)
        self.write(self.trainer.global_step, **self.result)

    def _refuse_unreadable(self, loader: EpochLoader) -> None:
        """End where all processes together could not read too much; a single one finds that out by itself."""
        strategy, images = self.trainer.strategy, len(loader.images)
        good = strategy.reduce_boolean_decision(self.validated, all=False)
        bad = strategy.reduce(torch.tensor(float(loader.bad), device=self.device), reduce_op="sum").item()
        if good and (loader.on_bad is None or bad <= loader.on_bad.allowed(loader.images)):
            return
        many = "no image to validate can be read"
        if good:
            share = f"data.max_bad={loader.on_bad.share:g}"
            many = f"{bad:.0f} of {images:,} images to validate cannot be read, more than {share}"
        error = DataError(f"{many}; bad_files.txt of the run lists them")
        raise error if self.trainer.is_global_zero else SystemExit(error.exit_code)  # one of them tells

    def write(self, step: int, **values: float) -> None:
        """Send values to the run's metric files, under the number of steps done."""
        for logger in self.loggers:
            logger.log_metrics({"epoch": math.ceil(step / self.steps_per_epoch), **values}, step=step)

    def channels(self, batch: Any) -> Any:
        """Return a batch in the memory format of the recipe."""
        images, targets = batch
        if self.recipe.trainer.channels_last and isinstance(images, Tensor):
            images = images.contiguous(memory_format=torch.channels_last)
        return images, targets

    def _refuse(self, loss: Tensor, batch_idx: int) -> None:
        batches = self.loader.batches
        members = [self.loader.images.short(i) for i in batches.indices(self.current_epoch, batch_idx)]
        some = ", ".join(members[:3]) + (f" and {len(members) - 3} more" if len(members) > 3 else "")
        raise ZooError(
            f"the loss became {loss.item()} at step {self.trainer.global_step + 1} (epoch "
            f"{self.current_epoch + 1}, batch {batch_idx + 1}: {some}; lr {self.lr:.3g}); it is not saved; "
            "lower optim.lr, set optim.clip_grad or use trainer.precision=32-true, and look at these images"
        )


def _named_groups(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[tuple[list[str], dict[str, Any]]]:
    """Return an optimiser's groups as names of parameters and what is said of a group alone."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        (
            [names[id(each)] for each in group["params"]],
            {key: group[key] for key in ("weight_decay", "lr_scale") if key in group},
        )
        for group in optimizer.param_groups
    ]


def rate_factor(recipe: Recipe, processes: int) -> float:
    """Return by what optim.lr is multiplied for the number of images in a step."""
    optim = recipe.optim
    if optim.lr_base_batch is None:
        return 1.0
    return recipe.data.batch_size * optim.accumulate * processes / optim.lr_base_batch


def schedule(optimizer: torch.optim.Optimizer, optim: Optim, steps_per_epoch: int) -> Scheduler:
    """Return timm's schedule, a pure function of the number of steps done; it also applies layer decay."""
    arguments: dict[str, Any] = {
        "t_initial": optim.epochs * steps_per_epoch,
        "lr_min": optim.min_lr,
        "warmup_t": round(optim.warmup_epochs * steps_per_epoch),
        "warmup_lr_init": optim.warmup_lr,
        "t_in_epochs": False,
    }
    if optim.schedule == "cosine":
        return CosineLRScheduler(optimizer, **arguments)
    # Power 1 is the straight line, power 0 none at all, and 0.9 what most decoders are published with.
    power = {"linear": 1.0, "poly": 0.9, "constant": 0.0}[optim.schedule]
    return PolyLRScheduler(optimizer, power=power, **arguments)
