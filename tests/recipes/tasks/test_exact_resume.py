"""A run killed at five points, in steps and in a validation, ends as one that nobody stopped, to the bit."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from stops import Killed, assert_same

from zoo.recipes import api, pictures
from zoo.recipes.training import Training

GENERATION = """
task: generation
model: {name: dit_digits, args: {depth: 1, hidden_size: 32, num_heads: 2, in_channels: 3}}
data: {name: folder, root: ROOT, batch_size: 8, val_batch_size: 4, workers: 0}
augment: {hflip: 0.5}
sampling: {steps: 2, count: 0, shown: 4}
optim: {epochs: 2, warmup_epochs: 1, ema: 0.9, clip_grad: 1.0}
trainer: {log_every: 1, save_every: 2}
"""
TASKS = ("classification", "segmentation", "generation")
# Before anything is saved, at a saved step, in the validation, between two saved steps, at the last step.
POINTS = ("step 1", "step 2", "validation 1", "step 5", "step 6")


@pytest.fixture(scope="session")
def recipes(recipe_file, masked_recipe, image_folder, tmp_path_factory) -> dict[str, Path]:
    """A recipe of each task, of three steps an epoch and two epochs, with everything random there is."""
    file = tmp_path_factory.mktemp("recipe") / "patches.yaml"
    file.write_text(GENERATION.replace("ROOT", str(image_folder)))
    return dict(zip(TASKS, (recipe_file, masked_recipe, file), strict=True))


@pytest.fixture
def train(recipes, monkeypatch) -> Callable[..., None]:
    """Train a recipe without its pictures, or stop at a point as kill -9 does."""
    for name in ("curves", "confusion", "mistakes", "class_iou", "overlays"):
        monkeypatch.setattr(pictures, name, lambda *_, **__: None)

    def run(task: str, point: str | None, *overrides: str, **keywords: object) -> None:
        made = api.recipe(recipes[task], overrides)
        if point is None:
            api.train(made, **keywords)
            return
        kind, number = point.split()
        name = "training_step" if kind == "step" else "validation_step"
        original = getattr(Training, name)

        def hooked(self, batch, batch_idx):
            where = self.trainer.global_step if kind == "step" else self.current_epoch
            if where + 1 == int(number):
                raise Killed
            return original(self, batch, batch_idx)

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(Training, name, hooked)
            api.train(made, **keywords)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("task", TASKS)
def test_killed_at_five_points_it_ends_the_same(train, task, workers, tmp_path):
    override = f"data.workers={workers}"
    train(task, None, override, run_dir=tmp_path / "whole")
    train(task, POINTS[0], override, run_dir=tmp_path / "killed")
    for point in POINTS[1:]:
        train(task, point, override, resume=tmp_path / "killed")
    train(task, None, override, resume=tmp_path / "killed")
    assert_same(tmp_path / "whole", tmp_path / "killed")


# ---- two processes

# What torchrun sets; both children are forks of a parent that has imported everything and computed nothing.
PAIR = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from zoo.recipes import api
from zoo.recipes.training import Training

def member(rank, port, step, file, keywords):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_RUN_ID="pair",
    )
    rank_zero_only.rank = rank  # found when Lightning is imported
    original = Training.training_step
    def hooked(self, batch, batch_idx):
        if self.trainer.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, batch, batch_idx)
    Training.training_step = hooked
    pair = ["data.batch_size=4", "trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu"]
    api.train(api.recipe(file, pair), **keywords)

def start(port, step, file, **keywords):
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            status = 1
            try:
                member(rank, port, step, file, keywords)
                status = 0
            except SystemExit as end:
                status = end.code
            finally:
                os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

file, whole, killed, *ports = sys.argv[1:]
assert start(ports[0], None, file, run_dir=whole) == [0, 0]
assert start(ports[1], 2, file, run_dir=killed) == [-9, -9]
assert start(ports[2], 5, file, run_dir=killed, resume=killed) == [-9, -9]
assert start(ports[3], None, file, run_dir=killed, resume=killed) == [0, 0]
"""


def free_ports(count: int) -> list[str]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.mark.slow
def test_two_processes_killed_twice_end_the_same(recipes, tmp_path):
    script = tmp_path / "pair.py"
    script.write_text(PAIR)
    folders = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, str(script), str(recipes["classification"]), *map(str, folders)]
    result = subprocess.run([*command, *free_ports(4)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert_same(*folders)
