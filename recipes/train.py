"""Train a recipe: from names and numbers to a run folder with a model file in it."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from zoo.errors import ConfigError, IntegrityError, ResourceError, ZooError
from zoo.recipes import pictures
from zoo.recipes import run_folder as runs
from zoo.recipes.checkpoints import BEST, LAST, Checkpoints, Stopped
from zoo.recipes.config import check, recipe
from zoo.recipes.data import load_halves
from zoo.recipes.data.loader import BadImages, EpochLoader, Images, balanced, reseed
from zoo.recipes.data.transforms import InputSettings
from zoo.recipes.files import load_checkpoint
from zoo.recipes.run_folder import load_trained
from zoo.recipes.schema import Recipe
from zoo.recipes.tasks import task_of
from zoo.recipes.tasks.base import Evaluation, Task
from zoo.recipes.trainer import build_trainer, end_others, is_lost_connection, quiet
from zoo.recipes.training import Training
from zoo.recipes.tuning import with_found_rate

ENDING = 20.0  # seconds that the processes of a training have to end after the first of them


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a training run left: its folder, the model file, the metrics of the best weights, wall seconds."""

    folder: Path
    model_file: Path
    metrics: dict[str, float]
    evaluation: Evaluation
    best_epoch: int
    seconds: float


def train(
    made: Recipe | str | Path,
    *,
    run_dir: str | Path | None = None,
    resume: str | Path | bool | None = None,
    command: str | None = None,
    images: tuple[Images, Images] | None = None,
) -> RunResult:
    """Train a recipe in a run folder, evaluate its best weights, and leave both there.

    `run_dir` defaults to the first free one of runs/<name>, runs/<name>-2, ...; `resume` is a run folder, a
    checkpoint in one, or True for `run_dir` (or the run of this recipe that was active last), and goes on
    with the very losses an uninterrupted run would have had. SIGTERM and SIGINT save the state after the
    current step, then raise SystemExit(143) and KeyboardInterrupt. `images` are those of the recipe to train
    and to validate, where they have been opened already.

    Raises ConfigError, DataError, IntegrityError or ResourceError in one sentence, before the first step for
    all that can be known by then.
    """
    made = made if isinstance(made, Recipe) else recipe(made)
    check(made)
    try:
        with quiet():
            return _train(made, run_dir, resume, command, images)
    except ZooError as error:
        # A value that came from the environment may be a secret, and every message may name it.
        error.args = (made.conceal(str(error)),)
        raise


def _train(
    made: Recipe, run_dir: Any, resume: Any, command: str | None, images: tuple[Images, Images] | None
) -> RunResult:
    began = time.monotonic()
    folder, checkpoint = _choose_folder(made, run_dir, resume)
    task = task_of(made)
    with runs.finding_data(made) if resume else nullcontext():
        train_images, val_images = images if images is not None else load_halves(made, task.load_half)
    classes = train_images.classes
    content = _check_resume(made, checkpoint, classes) if checkpoint is not None else None
    for note in (*train_images.notes, *val_images.notes):
        say(f"note: {made.conceal(note)}")
    objective = task.objective(made, classes)
    reseed(made.seed, "weights")
    try:
        model = task.build_model(made, len(classes))
    except IntegrityError:
        _refuse_own_checkpoint(made.model.checkpoint)
        raise
    settings = task.settings(made, model)
    bad_images = BadImages(made.data.max_bad, folder / "bad_files.txt")
    loader, val_loader = _loaders(made, task, settings, train_images, val_images, bad_images)
    objective.refuse(loader)
    if made.optim.find_lr:
        made = with_found_rate(made, model, loader, objective, content)
        reseed(made.seed, "weights")
    module = Training(model, made, loader, objective)
    if content is not None:
        _refuse_other_weights(content, module, checkpoint)
    checkpoints = Checkpoints(
        folder / "checkpoints",
        (loader, val_loader),
        {"recipe": made.plain(), "classes": classes, "input": settings.plain()},
        monitor=task.monitor,
        save_every=made.trainer.save_every,
        keep_best=made.trainer.keep_best,
        patience=made.trainer.patience,
    )
    first = rank_zero_only.rank == 0
    with runs.lock(folder) if first else nullcontext():
        command = command or f"zoo.train  # {shlex.join(sys.argv)}"
        begin = partial(runs.write_start, folder, made, command, classes)
        if first:
            millions = sum(p.numel() for p in model.parameters()) / 1e6
            say(
                f"{made.model.name} ({millions:.2f} M parameters) on {made.data.name}: "
                f"{len(train_images):,} images to train, {len(val_images):,} to validate; {folder}"
            )
        resumed_at = content["global_step"] if content is not None else None
        trainer = build_trainer(made, task, folder, checkpoints, resumed_at=resumed_at, begin=begin)
        _refuse_idle_processes(loader, trainer.world_size)
        try:
            with checkpoints.listening():
                trainer.fit(module, loader, val_loader, ckpt_path=checkpoint)
        except BaseException as error:
            _end_together(error, trainer, folder)
            raise
        finally:
            module.watch_readers()
            loader.close()
            val_loader.close()
        if trainer.world_size > 1:
            # Only one process goes on; a metric that asked the others would fail, or wait for them.
            torch.distributed.destroy_process_group()
        if not trainer.is_global_zero:
            raise SystemExit(0)
        return _finish(made, task, folder, checkpoints, settings, val_images, bad_images, began)


def _choose_folder(made: Recipe, run_dir: Any, resume: Any) -> tuple[Path, Path | None]:
    """Return the run folder and the checkpoint to resume, both agreed on by all processes of a training."""
    if resume is not None and resume is not False:
        where = run_dir if resume is True else resume
        return runs.resume_point(Path(where) if where is not None else runs.latest_run(made.name))
    if rank_zero_only.rank != 0 and (run_dir or "ZOO_RUN_DIR" in os.environ):
        return Path(run_dir or os.environ["ZOO_RUN_DIR"]), None
    if run_dir is None:
        if _started_together() > 1:
            raise ConfigError("several processes start this training: name its folder with --run-dir")
        folder = runs.new_folder(made.name)
        os.environ["ZOO_RUN_DIR"] = str(folder)  # for the processes that Lightning starts
        return folder, None
    folder = Path(run_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run folder {folder} is a file; take another --run-dir")
    if runs.is_used(folder):
        raise ConfigError(
            f"{folder} already holds a run; go on with it by --resume, or take another --run-dir"
        )
    return folder, None


def _started_together() -> int:
    """How many processes torchrun or SLURM has started for this training."""
    if SLURMEnvironment.detect():
        return int(os.environ["SLURM_NTASKS"])
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_resume(made: Recipe, checkpoint: Path, classes: list[str]) -> dict[str, Any]:
    content = load_checkpoint(checkpoint)
    differences = runs.refuse_another(made, content["recipe"], checkpoint)
    if content["classes"] != classes:
        raise ConfigError(
            f"{checkpoint} has {len(content['classes'])} classes ({', '.join(content['classes'][:5])}), "
            f"the data has {len(classes)} ({', '.join(classes[:5])}); resume it with its own data"
        )
    epoch, batch = content["position"]
    epochs = made.optim.epochs + made.optim.cooldown_epochs
    if epochs < epoch:
        cooldown = f" and cooldown_epochs={made.optim.cooldown_epochs}" if made.optim.cooldown_epochs else ""
        raise ConfigError(
            f"optim.epochs={made.optim.epochs}{cooldown} ends before {checkpoint}, which has {epoch} epochs "
            f"done; give {epoch} or more in all, or start a new run"
        )
    for difference in differences:
        say(f"note: resumed with another value, {difference}")
    say(f"resuming {checkpoint} at step {content['global_step']} (epoch {epoch + 1}, batch {batch})")
    return content


def _refuse_own_checkpoint(path: str | None) -> None:
    """Raise ConfigError where weights to start from did not fit because they are all of a run."""
    file = Path(path or "").expanduser()
    if file.suffix != ".ckpt":
        return
    try:
        load_checkpoint(file)
    except IntegrityError:  # of somebody else
        return
    exported = file.parent.parent / runs.MODEL
    better = f"{exported}, or " if exported.exists() else ""
    raise ConfigError(
        f"model.checkpoint={path} holds all of a run, not the weights of its network alone; give {better}"
        f"what `zoo export {path} --format safetensors` writes"
    ) from None


def _refuse_other_weights(content: dict[str, Any], module: Training, checkpoint: Path | None) -> None:
    saved, own = content["state_dict"], module.state_dict()
    differ = list(saved.keys() ^ own.keys())
    differ += [key for key in saved.keys() & own.keys() if saved[key].shape != own[key].shape]
    if differ:
        raise IntegrityError(
            f"{checkpoint} was written by another version of {module.recipe.model.name}: "
            f"{len(differ)} weights differ, such as {min(differ)}; start a new run"
        )


def _loaders(
    made: Recipe,
    task: Task,
    settings: InputSettings,
    train_images: Images,
    val_images: Images,
    bad_images: BadImages,
) -> tuple[EpochLoader, EpochLoader]:
    data = made.data
    common = {
        "seed": made.seed,
        "workers": data.workers,
        "on_bad": bad_images if data.bad_images == "skip" else None,
    }
    for_train, for_val = task.transforms(made, settings)
    weights = None
    if getattr(data, "balance", 0):
        weights = balanced([train_images.target(i) for i in range(len(train_images))], data.balance)
    loader = EpochLoader(
        train_images, for_train, batch_size=data.batch_size, train=True, weights=weights, **common
    )
    val_batch = data.val_batch_size if data.val_batch_size is not None else data.batch_size
    return loader, EpochLoader(val_images, for_val, batch_size=val_batch, **common)


def _refuse_idle_processes(loader: EpochLoader, processes: int) -> None:
    """Raise ConfigError where a process would have no image of the only step, and the others wait for it."""
    size, images = loader.batches.batch_size, len(loader.images)
    if images <= size * (processes - 1):
        raise ConfigError(
            f"data.batch_size={size} in each of {processes} processes leaves none of the {images} training "
            f"images to the last; lower it, to {max(1, images // processes)} at most to share them evenly"
        )


def _end_together(error: BaseException, trainer: Trainer, folder: Path) -> None:
    """End the processes that Lightning started, and say what an error only hints at."""
    at_once = isinstance(error, Stopped) and not error.saved
    statuses = end_others(trainer, wait=0 if at_once else ENDING)
    if isinstance(error, Stopped):
        _end_by_signal(error, folder)
    if not is_lost_connection(error):
        return
    told = [status for status in statuses if status > 0]
    killed = [signal.Signals(-status).name for status in statuses if status < 0]
    if told:  # by that process
        raise SystemExit(told[0]) from None
    if killed:
        raise ResourceError(
            f"a process of this training was killed by {killed[0]}, often for want of memory; lower "
            f"data.batch_size or data.workers, and go on with --resume {folder}"
        ) from None
    if trainer.local_rank and isinstance(trainer.strategy.cluster_environment, LightningEnvironment):
        raise SystemExit(1) from None  # the process that started this one tells
    raise ZooError(
        f"another process of this training has ended and says why; go on with --resume {folder}"
    ) from None


def _end_by_signal(stopped: Stopped, folder: Path) -> None:
    if rank_zero_only.rank == 0:
        name = signal.Signals(stopped.number).name
        when = f"after step {stopped.step}, which is saved" if stopped.saved else "at once, without saving"
        begun = (folder / "config.yaml").exists()
        say(f"stopped by {name} {when}" + (f"; go on with --resume {folder}" if begun else ""))
    if stopped.number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + stopped.number)


def _finish(
    made: Recipe,
    task: Task,
    folder: Path,
    checkpoints: Checkpoints,
    settings: InputSettings,
    val_images: Images,
    bad_images: BadImages,
    began: float,
) -> RunResult:
    best, last = folder / "checkpoints" / BEST, folder / "checkpoints" / LAST
    model_file = runs.export_model(folder, best if best.exists() else last, made, settings)
    # The file itself is judged, not the network in memory.
    trained = load_trained(model_file)
    result = task.measure(trained, val_images, made, on_bad=bad_images)
    pictures.curves(folder / "metrics.csv", folder / "curves.png")
    task.pictures(folder, trained, result, val_images)
    return RunResult(
        folder=folder,
        model_file=model_file,
        metrics=result.metrics(),
        evaluation=result,
        best_epoch=int(checkpoints.ranking[0]["epoch"]) if checkpoints.ranking else 0,
        seconds=time.monotonic() - began,
    )


@rank_zero_only
def say(text: str) -> None:
    """Print a line for the user beside the results."""
    print(text, file=sys.stderr, flush=True)
