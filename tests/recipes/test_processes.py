"""Two processes are one: the same losses and weights, one writer, one end; by DDP and by FSDP."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from zoo.recipes import api

# Lightning starts the second process with the same command, so that both know the strategy.
PAIR = """
import sys
import torch
torch.set_num_threads(1)
from pytorch_lightning.strategies import FSDPStrategy, StrategyRegistry
from torch.distributed.fsdp import FullyShardedDataParallel
from zoo.recipes import api
from zoo.recipes.tasks.classification import Classification

class OnCpu(FSDPStrategy):
    "Lightning's, which asks for a GPU; torch itself shards on CPUs too."
    def _setup_model(self, model):
        return FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), sharding_strategy=self.sharding_strategy, **self.kwargs
        )

StrategyRegistry.register("fsdp_on_cpu", OnCpu, process_group_backend="gloo")
file, folder, *overrides = sys.argv[1:]
update = Classification.update

def noting(self, model, batch, number):
    update(self, model, batch, number)
    with open(f"{folder}.validated", "a") as notes:
        notes.write(f"{number}:{len(batch[1])} ")

Classification.update = noting
api.train(api.recipe(file, overrides), run_dir=folder)
"""
# What goes wrong in one of two processes, which is told by its number.
FAULT = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from zoo.cli import main
from zoo.recipes import training

fault, *arguments = sys.argv[1:]
second = os.environ.get("LOCAL_RANK") == "1"
if fault == "killed" and second:
    training.Training.training_step = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if fault == "terminated" and not second:
    torch.distributed.init_process_group = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
sys.exit(main(arguments))
"""
DDP = ["trainer.devices=2", "trainer.accelerator=cpu", "trainer.strategy=ddp"]
RECIPE = ["augment.mixup=0", "augment.cutmix=0", "model.drop_path_rate=0", "optim.ema=null"]


def losses(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row["train_loss"] or row["val_loss"]) for row in csv.DictReader(file)]


def distance(one: Path, other: Path) -> float:
    expected, found = (load_file(folder / "model.safetensors") for folder in (one, other))
    return max((expected[name] - found[name]).abs().max().item() for name in expected)


@pytest.fixture(scope="module")
def single(recipe_file, tmp_path_factory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("single") / "run"
    api.train(api.recipe(recipe_file, RECIPE), run_dir=folder)
    return folder


@pytest.fixture
def pair(recipe_file, tmp_path) -> Callable[[str], Path]:
    """Run two processes whose steps hold the images of one."""
    script = tmp_path / "pair.py"
    script.write_text(PAIR)

    def start(strategy: str) -> Path:
        folder = tmp_path / "two"
        overrides = [*RECIPE, "data.batch_size=4", "trainer.devices=2", f"trainer.strategy={strategy}"]
        command = [sys.executable, str(script), str(recipe_file), str(folder), *overrides]
        result = subprocess.run([*command, "trainer.accelerator=cpu"], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("images to train") == 1, result.stderr
        return folder

    return start


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp_on_cpu"])
def test_two_processes_are_one_with_the_same_global_batch(pair, single, strategy):
    two = pair(strategy)
    assert losses(two) == pytest.approx(losses(single), rel=1e-5)
    assert distance(two, single) < 1e-5
    rows = (two / "metrics.csv").read_text().splitlines()
    assert len(rows) == len(set(rows)) == 9, "one of them writes"
    validated = two.with_name("two.validated").read_text().split()
    assert sorted(validated) == sorted(["0:4", "1:4", "2:2"] * 2), "no image is validated by both"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "status", "sentence"),
    [
        ("bad image", 3, "error: .*cannot be read as an image"),
        ("no validation", 3, "error: no image to validate can be read"),
        (
            "half a validation",
            3,
            "error: 6 of 10 images to validate cannot be read, more than data.max",
        ),
        ("killed", 5, "error: a process of this training was killed by SIGKILL"),
        ("terminated", 143, "stopped by SIGTERM at once, without saving$"),  # the other one waits for it
    ],
)
def test_what_ends_one_of_two_processes_is_told_once_and_leaves_none(
    recipe_file, image_folder, tmp_path, fault, status, sentence
):
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    if fault == "bad image":
        (images / "train/dark/03.png").write_text("no image")
    if "validation" in fault:
        files = sorted((images / "val").rglob("*.png"))
        for file in files if fault == "no validation" else files[:6]:
            file.write_text("no image")
    script = tmp_path / "fault.py"
    script.write_text(FAULT)
    arguments = ["train", str(recipe_file), *DDP, "data.batch_size=4", f"data.root={images}", "--run-dir"]
    arguments += [str(tmp_path / "run")]
    if "validation" in fault:
        share = 1 if fault == "no validation" else 0.1  # of which either process has only a part
        arguments += ["data.bad_images=skip", f"data.max_bad={share}", "data.val_batch_size=1"]
    command = [sys.executable, str(script), fault, *arguments]
    # It returns when the last process has closed its output.
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == status, result.stderr
    told = [
        line
        for line in result.stderr.splitlines()
        if "images to train" not in line and not line.startswith("skipped: ")
    ]
    assert len(told) == 1 and re.match(sentence, told[0]), result.stderr


@pytest.mark.slow
def test_what_one_or_both_of_two_processes_skip_is_told_once(recipe_file, image_folder, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    bad = ["train/dark/03.png", "val/light/02.png"]
    for name in bad:
        (images / name).write_text("no image")
    arguments = ["train", str(recipe_file), *DDP, "data.batch_size=4", f"data.root={images}"]
    arguments += ["data.bad_images=skip", "optim.epochs=1", "--run-dir", str(tmp_path / "run")]
    command = [sys.executable, "-m", "zoo", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^skipped: (\S+)", result.stderr, re.MULTILINE) == bad
    assert [line.split()[0] for line in (tmp_path / "run/bad_files.txt").read_text().splitlines()] == bad
