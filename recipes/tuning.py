"""What fine-tuning adds to training: parameters that stay as they are, and a search for the rate."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.tuner.tuning import Tuner
from torch import Tensor, nn

from zoo.errors import ConfigError, did_you_mean
from zoo.recipes.data.loader import EpochLoader, reseed
from zoo.recipes.schema import Recipe
from zoo.recipes.tasks.base import Objective

RATES, LOWEST, HIGHEST = 100, 1e-7, 1.0  # of the search


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Exclude from training the parameters that are, or are inside, what a pattern with * and ? names.

    Raises ConfigError for a pattern that names nothing, and where nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        named = [
            name for name in parameters if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
        ]
        if not named:
            known = [name for name, module in model.named_modules() if name and list(module.parameters())]
            near = did_you_mean(pattern, known) or f"; such as {', '.join(sorted(known, key=len)[:5])}"
            raise ConfigError(f"model.freeze={pattern!r} names no part of {type(model).__name__}{near}")
        for name in named:
            parameters[name].requires_grad_(False)
    if not any(each.requires_grad for each in parameters.values()):
        raise ConfigError("model.freeze leaves nothing to train")


def still_modules(model: nn.Module) -> list[nn.Module]:
    """Return the outermost modules that have parameters, none of which is trained."""
    parameters = list(model.parameters())
    if parameters and not any(each.requires_grad for each in parameters):
        return [model]
    return [module for child in model.children() for module in still_modules(child)]


# ---- the learning rate


class RangeTest(pl.LightningModule):
    """One step at each of many rising rates; what it does to the network is of no use afterwards."""

    def __init__(self, training: Any) -> None:
        super().__init__()
        self.training_module = training

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.training_module._trainer = self.trainer
        return self.training_module.configure_optimizers()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        reseed(self.training_module.recipe.seed, "rate", self.trainer.global_step)
        for module in self.training_module.still:
            module.eval()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        training = self.training_module
        return training.objective.loss(training.model, training.channels(batch))

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        for group in optimizer.param_groups:  # the tuner has put the same rate into all of them
            group["lr"] *= group.get("lr_scale", 1.0)
        super().optimizer_step(epoch, batch_idx, optimizer, closure)


def with_found_rate(
    made: Recipe, model: nn.Module, loader: EpochLoader, objective: Objective, saved: dict[str, Any] | None
) -> Recipe:
    """Return a recipe with the rate at which the loss falls fastest, or that of the run that is resumed.

    Raises ConfigError where the recipe trains in several processes, or no rate makes the loss fall.
    Source: Smith 2017 (arXiv:1506.01186) Sec. 3.3, as in Lightning's tuner.
    """
    from zoo.recipes.training import Training, rate_factor

    found = copy.deepcopy(made)
    found.optim.find_lr = False
    if saved is not None:
        found.optim.lr = saved["recipe"]["optim"]["lr"]
        return found
    trainer = made.trainer
    if trainer.num_nodes > 1 or trainer.devices not in ("auto", 1, "1"):
        raise ConfigError(
            "optim.find_lr=true looks for the rate in one process; find it with trainer.devices=1, "
            "then give it as optim.lr with optim.lr_base_batch"
        )
    quiet = copy.deepcopy(found)
    quiet.optim.ema, quiet.trainer.compile = None, False
    test = RangeTest(Training(copy.deepcopy(model), quiet, loader, objective))
    with tempfile.TemporaryDirectory() as folder:
        tester = pl.Trainer(
            accelerator=trainer.accelerator,
            devices=1,
            precision=trainer.precision,
            gradient_clip_val=made.optim.clip_grad,
            default_root_dir=folder,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
        )
        search = Tuner(tester).lr_find(
            test,
            train_dataloaders=loader,
            min_lr=LOWEST,
            max_lr=HIGHEST,
            num_training=RATES,
            update_attr=False,
        )
    rate = search.suggestion() if search is not None else None
    if rate is None:
        raise ConfigError("optim.find_lr=true: the loss falls at no rate; give optim.lr yourself")
    found.optim.lr = float(f"{rate / rate_factor(made, 1):.3g}")
    return found
