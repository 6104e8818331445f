"""R33 to R38 as somebody types them: what stops a run in the middle, and what is there afterwards."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from zoo.cli import main
from zoo.recipes.files import load_checkpoint

pytestmark = pytest.mark.slow
LONG = ["optim.epochs=12", "trainer.save_every=1"]


def typed(home: Path, *arguments: str, **options: object) -> subprocess.Popen:
    """Start a command in a process of its own."""
    command = [sys.executable, "-m", "zoo", *arguments]
    return subprocess.Popen(
        command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def wait_for(file: Path, process: subprocess.Popen) -> None:
    """Until a file is there, or the process has ended."""
    while not file.exists() and process.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.02)


@pytest.mark.parametrize("temporary", ["same", "other"])
def test_r33_kill_minus_nine_leaves_a_checkpoint_that_goes_on(home, temporary):
    folder = "/dev/shm" if temporary == "other" and Path("/dev/shm").is_dir() else str(home)
    process = typed(
        home, "train", "tiny.yaml", *LONG, "--run-dir", "run", env={**os.environ, "TMPDIR": folder}
    )
    wait_for(home / "run/checkpoints/last.ckpt", process)
    process.kill()
    process.communicate()
    step = load_checkpoint(home / "run/checkpoints/last.ckpt")["global_step"]
    assert 1 <= step < 36
    assert main(["train", "--resume", "run", "optim.epochs=12"]) == 0
    assert load_checkpoint(home / "run/checkpoints/last.ckpt")["global_step"] == 36
    assert not [path for path in (home / "run").rglob("*.tmp-*")]


def test_r34_a_disk_that_fills_up_keeps_the_last_checkpoint(home):
    assert main(["train", "tiny.yaml", "--run-dir", "run"]) == 0
    before = (home / "run/checkpoints/last.ckpt").read_bytes()

    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    process = typed(home, "train", "--resume", "run", "optim.epochs=2", preexec_fn=small_disk)
    _, errors = process.communicate()
    assert process.returncode == 5, errors
    assert "the disk is full" in errors and "Traceback" not in errors
    assert (home / "run/checkpoints/last.ckpt").read_bytes() == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_r36_a_signal_saves_the_step_and_the_run_goes_on_to_the_same_end(home, number, status):
    assert main(["train", "tiny.yaml", *LONG, "optim.epochs=4", "--run-dir", "whole"]) == 0
    process = typed(home, "train", "tiny.yaml", *LONG, "optim.epochs=4", "--run-dir", "run")
    wait_for(home / "run/checkpoints/last.ckpt", process)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode in (status, 0), errors  # 0: it had finished already
    assert main(["train", "--resume", "run"]) == 0
    one, other = (
        load_checkpoint(home / name / "checkpoints/last.ckpt")["state_dict"] for name in ("whole", "run")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_r37_a_loss_that_explodes_ends_the_run_and_no_checkpoint_holds_it(home, refused):
    sentence = refused(1, "train", "tiny.yaml", "optim.lr=1e9", "optim.epochs=20", "--run-dir", "run")
    assert "step" in sentence
    for file in (home / "run").rglob("*.ckpt"):
        state = load_checkpoint(file)["state_dict"]
        assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())


@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "other file"])
def test_r38_a_lost_checkpoint_is_named(home, refused, damage):
    assert main(["train", "tiny.yaml", "--run-dir", "run"]) == 0
    last = home / "run/checkpoints/last.ckpt"
    whole = last.read_bytes()
    last.unlink()
    if damage != "missing":
        last.write_bytes({"cut": whole[:5000], "empty": b"", "other file": b"PK\x03\x04" + bytes(99)}[damage])
    sentence = refused(2 if damage == "missing" else 4, "train", "--resume", "run", "optim.epochs=2")
    assert "last.ckpt" in sentence


def test_r38_a_used_folder_and_another_model_are_refused(home, refused):
    assert main(["train", "tiny.yaml", "--run-dir", "run"]) == 0
    refused(2, "train", "tiny.yaml", "--run-dir", "run")
    assert "model.name nat_digits -> dat_digits" in refused(
        2, "train", "--resume", "run", "model.name=dat_digits"
    )
    shutil.rmtree(home / "images")
    refused(3, "train", "--resume", "run", "optim.epochs=2")
