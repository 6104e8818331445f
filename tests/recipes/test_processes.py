"""Two processes are one: the same losses and weights, and one writer, by DDP and by FSDP."""

from __future__ import annotations

import csv
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

class OnCpu(FSDPStrategy):
    "Lightning's, which asks for a GPU; torch itself shards on CPUs too."
    def _setup_model(self, model):
        return FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), sharding_strategy=self.sharding_strategy, **self.kwargs
        )

StrategyRegistry.register("fsdp_on_cpu", OnCpu, process_group_backend="gloo")
file, folder, *overrides = sys.argv[1:]
api.train(api.recipe(file, overrides), run_dir=folder)
"""
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
