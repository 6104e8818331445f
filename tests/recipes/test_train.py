"""A run: what it leaves, how it stops, how it goes on exactly, and what it refuses."""

from __future__ import annotations

import csv
import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer
from safetensors.torch import load_file
from stops import Killed, assert_same, interrupt, kill, terminate
from torch.utils.data._utils import signal_handling

from zoo.errors import ConfigError, DataError, IntegrityError, ZooError
from zoo.recipes import api
from zoo.recipes.config import all_keys, recipe
from zoo.recipes.export import export
from zoo.recipes.run_folder import FROZEN, load_trained, refuse_another
from zoo.recipes.runs import read_run
from zoo.recipes.schema import RECIPES
from zoo.recipes.tasks import classification
from zoo.recipes.tasks.classification import Classification
from zoo.recipes.train import train
from zoo.recipes.trainer import Beginning
from zoo.recipes.training import Training

STEPS = 6  # of the small recipe: three in each of two epochs


# ---- what a run leaves


def test_a_run_folder_holds_all_that_is_needed_later(finished):
    assert {path.name for path in finished.iterdir()} >= {
        "config.yaml", "command.txt", "environment.json", "classes.json", "metrics.csv", "tensorboard",
        "checkpoints", "model.safetensors", "curves.png", "confusion.png", "mistakes.png",
    }  # fmt: skip
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert json.loads((finished / "classes.json").read_text()) == ["dark", "light"]
    assert recipe(finished / "config.yaml").optim.ema == 0.9
    assert json.loads((finished / "environment.json").read_text())["packages"]["torch"]
    assert (finished / "model.safetensors").stat().st_mode & 0o777 == 0o644
    with (finished / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["train_loss"]] == [str(step + 1) for step in range(STEPS)]
    assert [(row["epoch"], row["step"]) for row in rows if row["val_top1"]] == [("1", "3"), ("2", "6")]


def test_the_checkpoint_needs_no_trust(finished):
    for name in ("best.ckpt", "last.ckpt"):
        content = torch.load(finished / "checkpoints" / name, weights_only=True)
        assert content["recipe"]["model"]["name"] == "nat_digits"


def test_training_is_quiet_and_leaves_the_random_state_alone(run, capsys):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    run("quiet", "optim.epochs=1")
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == before
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 2  # the model and the data, and one line for the epoch


def test_the_exported_weights_are_the_averaged_ones_of_the_best_epoch(finished):
    best = torch.load(finished / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    exported = load_file(finished / "model.safetensors")
    for key, value in exported.items():
        assert torch.equal(value, best[f"ema.module.{key}"])
    assert any(not torch.equal(value, best[f"model.{key}"]) for key, value in exported.items())


def test_a_reader_that_is_killed_after_a_training_is_noticed(run, monkeypatch):
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        run("watched", "data.workers=1", "optim.epochs=1")
        assert callable(signal.getsignal(signal.SIGCHLD))
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_averaged_weights_of_a_short_run_forget_the_beginning_after_a_warmup(run, tmp_path):
    behind = {}
    for warmup in (False, True):
        run(f"ema {warmup}", "optim.ema=0.999", f"optim.ema_warmup={warmup}")
        file = tmp_path / f"ema {warmup}" / "checkpoints" / "last.ckpt"
        state = torch.load(file, weights_only=True)["state_dict"]
        behind[warmup] = (state["ema.module.head.weight"] - state["model.head.weight"]).norm()
    assert behind[True] < 0.5 * behind[False]


def test_the_best_checkpoints_are_kept_by_accuracy_then_loss(run, monkeypatch):
    losses = iter([0.5, 0.3, 0.4, 0.6])

    def judge(self) -> dict[str, float]:
        self.top1.reset(), self.val_loss.reset()
        return {"val_top1": 0.5, "val_loss": next(losses)}

    monkeypatch.setattr(Classification, "compute", judge)
    folder = run("ranked", "optim.epochs=4", "trainer.keep_best=2").folder
    kept = folder / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == [
        "best.ckpt",
        "epoch-0002.ckpt",
        "epoch-0003.ckpt",
        "last.ckpt",
    ]
    assert kept.joinpath("best.ckpt").samefile(kept / "epoch-0002.ckpt")


def test_a_kill_between_the_names_of_a_checkpoint_changes_nothing(run, finished, monkeypatch, tmp_path):
    """The best checkpoint is written and the last one is not yet its other name."""
    from zoo.recipes import checkpoints

    monkeypatch.setattr(checkpoints, "link_atomically", lambda *_: kill())
    with pytest.raises(Killed):
        run("between")
    monkeypatch.undo()
    run("between", resume=tmp_path / "between")
    assert_same(finished, tmp_path / "between")


# ---- going on exactly


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_after_a_kill_at_any_step_the_losses_are_those_of_an_uninterrupted_run(
    run, finished, at_step, tmp_path, step
):
    at_step(step, kill)
    with pytest.raises(Killed):
        run("killed")
    run("killed", resume=tmp_path / "killed")
    assert_same(finished, tmp_path / "killed")


@pytest.mark.parametrize("step", [2, 3, 6])
def test_sigterm_saves_the_step_it_came_in_and_ends_with_143(run, finished, at_step, tmp_path, step, capsys):
    at_step(step, terminate)
    with pytest.raises(SystemExit) as stopped:
        run("stopped")
    assert stopped.value.code == 143
    assert f"stopped by SIGTERM after step {step}, which is saved" in capsys.readouterr().err
    saved = torch.load(tmp_path / "stopped" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == step
    run("stopped", resume=tmp_path / "stopped")
    assert_same(finished, tmp_path / "stopped")


@pytest.mark.parametrize("epoch", [1, 2])
def test_sigterm_in_a_validation_is_followed_by_that_validation(run, finished, at_step, tmp_path, epoch):
    at_step(epoch, terminate, validating=True)
    with pytest.raises(SystemExit):
        run("validating")
    run("validating", resume=tmp_path / "validating")
    assert_same(finished, tmp_path / "validating")


@pytest.mark.parametrize(("stop", "ending"), [(interrupt, KeyboardInterrupt), (terminate, SystemExit)])
def test_a_signal_before_the_first_step_ends_at_once(run, monkeypatch, capsys, stop, ending):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(Beginning, "on_fit_start", lambda *_: stop())
    with pytest.raises(ending) as raised:
        run("early")
    assert stop is interrupt or raised.value.code == 143
    assert capsys.readouterr().err.endswith("at once, without saving\n"), "there is nothing to go on with"
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_sigint_saves_and_raises_keyboard_interrupt(run, finished, at_step, tmp_path):
    at_step(4, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("interrupted")
    run("interrupted", resume=tmp_path / "interrupted")
    assert_same(finished, tmp_path / "interrupted")


def test_sigint_twice_stops_at_once(run, at_step, tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT)
    at_step(1, lambda: (interrupt(), interrupt()))
    with pytest.raises(KeyboardInterrupt):
        run("twice")
    assert "at once" in capsys.readouterr().err
    assert not list((tmp_path / "twice" / "checkpoints").glob("*.ckpt"))
    assert signal.getsignal(signal.SIGINT) is before


def test_gathered_gradients_are_never_cut_in_half(run, at_step, tmp_path):
    """With three batches and accumulate=2 an epoch has two steps; a signal waits for the step's end."""
    options = ["optim.accumulate=2", "trainer.val_every=2"]
    run("whole", *options)
    at_step(1, terminate)
    with pytest.raises(SystemExit):
        run("parts", *options)
    saved = torch.load(tmp_path / "parts" / "checkpoints" / "last.ckpt", weights_only=True)
    assert (saved["global_step"], saved["position"]) == (1, [0, 2])
    at_step(3, kill)
    with pytest.raises(Killed):
        run("parts", *options, resume=tmp_path / "parts")
    run("parts", *options, resume=tmp_path / "parts")
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_the_last_step_of_an_epoch_counts_as_much_with_fewer_batches(run, monkeypatch):
    """Of three batches with accumulate=2 the last is a step of its own, as it is with accumulate=1."""
    gradients: dict[int, list[torch.Tensor]] = {}

    def note(self, optimizer) -> None:
        each = [weight.grad.flatten().clone() for weight in self.parameters() if weight.grad is not None]
        gradients.setdefault(self.recipe.optim.accumulate, []).append(torch.cat(each))

    monkeypatch.setattr(Training, "on_before_optimizer_step", note)
    still = ["optim.name=sgd", "optim.schedule=constant", "optim.lr=1e-20", "optim.warmup_epochs=0"]
    still += ["optim.epochs=1", "optim.ema=null", "optim.clip_grad=null"]
    losses = {}
    for accumulate in (1, 2):
        folder = run(f"by {accumulate}", *still, f"optim.accumulate={accumulate}").folder
        with (folder / "metrics.csv").open() as file:
            losses[accumulate] = [
                float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]
            ]
    one, two = gradients[1], gradients[2]
    torch.testing.assert_close(two, [(one[0] + one[1]) / 2, one[2]])
    assert losses[2] == pytest.approx([(losses[1][0] + losses[1][1]) / 2, losses[1][2]])


def test_workers_change_nothing_not_even_after_a_stop(run, finished, at_step, tmp_path):
    at_step(5, kill)
    with pytest.raises(Killed):
        run("workers", "data.workers=2")
    run("workers", "data.workers=1", resume=tmp_path / "workers")
    assert_same(finished, tmp_path / "workers")


def test_a_finished_run_is_only_evaluated_again(run, tmp_path):
    first = run("again", "optim.epochs=1")
    second = run("again", "optim.epochs=1", resume=tmp_path / "again")
    assert second.metrics == first.metrics
    assert_same(first.folder, second.folder)


def test_a_run_can_be_made_longer(run, tmp_path, capsys):
    run("longer", "optim.epochs=1", "optim.warmup_epochs=1")
    run("longer", "optim.epochs=2", resume=tmp_path / "longer")
    assert "optim.epochs 1 -> 2" in capsys.readouterr().err


def test_a_finished_run_that_trains_on_has_no_old_result_while_it_does(run, finished, at_step, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "on")
    at_step(STEPS + 2, terminate)
    with pytest.raises(SystemExit):
        run("on", "optim.epochs=4", resume=folder)
    assert not (folder / "model.safetensors").exists() and read_run(folder).state == "stopped"
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    for name, value in load_trained(folder).model.state_dict().items():
        assert torch.equal(value, best[f"ema.module.{name}"])
    run("on", "optim.epochs=4", resume=folder)
    assert read_run(folder).state == "finished"


def test_a_finished_run_that_does_not_train_on_keeps_its_result(run, finished, monkeypatch, tmp_path):
    from zoo.recipes import run_folder

    folder = shutil.copytree(finished, tmp_path / "again")
    monkeypatch.setattr(run_folder, "export_model", lambda *_: kill())
    with pytest.raises(Killed):
        run("again", resume=folder)
    assert (folder / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_kill_minus_nine_in_a_real_process(recipe_file, finished, tmp_path):
    """The process kills itself in the middle of a step, with reader processes; another one goes on."""
    code = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from zoo.recipes import api
from zoo.recipes.training import Training
file, folder = sys.argv[1:]
made = api.recipe(file, ["data.workers=2"])
child = os.fork()
if child == 0:
    original = Training.optimizer_step
    def optimizer_step(self, *arguments, **keywords):
        if self.trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, *arguments, **keywords)
    Training.optimizer_step = optimizer_step
    api.train(made, run_dir=folder)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
api.train(made, resume=folder)
"""
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", code, str(recipe_file), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "resuming" in result.stderr
    assert_same(finished, folder)


# ---- what is refused


def test_a_used_folder_is_refused(run, finished):
    with pytest.raises(ConfigError, match="already holds a run; go on with it by --resume"):
        run(finished)


def test_without_a_folder_each_run_gets_its_own(recipe_file, tmp_path, monkeypatch):
    from zoo.recipes.run_folder import new_folder

    monkeypatch.chdir(tmp_path)
    assert new_folder("tiny") == Path("runs/tiny")
    (tmp_path / "runs/tiny/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/tiny/config.yaml").touch()
    assert new_folder("tiny") == Path("runs/tiny"), "a run that ended before its first checkpoint"
    (tmp_path / "runs/tiny/checkpoints/last.ckpt").touch()
    assert new_folder("tiny") == Path("runs/tiny-2")
    (tmp_path / "runs/tiny-2").mkdir()
    (tmp_path / "runs/tiny-2/notes.txt").touch()
    assert new_folder("tiny") == Path("runs/tiny-3")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.name=nat_mini", "model.name nat_digits -> nat_mini"),
        ("data.batch_size=4", "data.batch_size 8 -> 4"),
        ("data.image_size=64", "data.image_size None -> 64"),
        ("data.mean=[0, 0, 0]", "data.mean None -> [0.0, 0.0, 0.0]"),
        ("data.std=[1, 1, 1]", "data.std None -> [1.0, 1.0, 1.0]"),
        ("data.crop_pct=0.5", "data.crop_pct None -> 0.5"),
        ("data.interpolation=nearest", "data.interpolation None -> nearest"),
        ("optim.ema=null", "optim.ema 0.9 -> None"),
        ("seed=5", "seed 0 -> 5"),
        ("model.args={kernel_size: 5}", "model.args"),
    ],
)
def test_resuming_as_another_run_names_what_differs(run, finished, override, words):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="is of another run") as refused:
        run("x", override, resume=finished)
    assert words in str(refused.value)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_what_must_stay_in_a_run_are_keys_of_recipes():
    known = [key for kind in RECIPES.values() for key in all_keys(kind)]
    assert [part for part in FROZEN if not any(key.startswith(part) for key in known)] == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.epochs=1", "optim.epochs=1 ends before .*last.ckpt, which has 2 epochs done; give 2 or more"),
        ("trainer.strategy=nonesuch", "Lightning refuses"),
        ("trainer.num_nodes=1", "inside an epoch by 2 processes, not by 1"),
    ],
)
def test_a_refused_resume_leaves_the_run_as_it_was(run, finished, tmp_path, override, words):
    folder = shutil.copytree(finished, tmp_path / "own")
    with (folder / "metrics.csv").open("a") as file:
        file.write("2,999,0.1,0.5,,\n")  # steps after the checkpoint, as of a run that was killed
    if "processes" in words:
        last = folder / "checkpoints/last.ckpt"
        saved = torch.load(last, weights_only=True)
        torch.save(saved | {"position": [1, 1], "world_size": 2}, last)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=words) as refused:
        run("x", override, resume=folder)
    assert "\n" not in str(refused.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_stopped_inside_an_epoch_can_end_with_the_one_before(run, at_step, tmp_path):
    at_step(5, terminate)
    with pytest.raises(SystemExit):
        run("early")
    assert run("early", "optim.epochs=1", resume=tmp_path / "early").best_epoch == 1


def test_a_run_of_an_older_version_goes_on_with_the_defaults_of_what_it_did_not_know(finished, tmp_path):
    made = recipe(finished / "config.yaml")
    older = made.plain()
    del older["optim"]["cooldown_epochs"], older["augment"]["shear"]
    assert refuse_another(made, older, tmp_path) == []
    del older["optim"]["ema"]
    with pytest.raises(ConfigError, match="optim.ema None -> 0.9"):
        refuse_another(made, older, tmp_path)


def test_resuming_with_other_classes_is_refused(run, finished, image_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(image_folder, other)
    for split in ("train", "val"):
        (other / split / "dark").rename(other / split / "gloomy")
    with pytest.raises(ConfigError, match=r"2 classes \(dark, light\).*2 \(gloomy, light\)"):
        run("x", f"data.root={other}", resume=finished)


@pytest.mark.parametrize("damage", ["missing", "cut", "foreign", "no-folder"])
def test_a_checkpoint_that_cannot_be_resumed_is_named(run, tmp_path, damage):
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    file.parent.mkdir(parents=True)
    where: Path = file
    if damage == "cut":
        torch.save({"recipe": {}, "weights": torch.zeros(1000)}, file)
        file.write_bytes(file.read_bytes()[:2000])
    elif damage == "foreign":
        torch.save({"state_dict": {}}, file)
    elif damage == "no-folder":
        where = tmp_path / "nowhere"
    with pytest.raises((ConfigError, IntegrityError)) as refused:
        run("x", resume=where)
    assert str(where) in str(refused.value) and "\n" not in str(refused.value)


def test_two_processes_do_not_share_a_folder(run, tmp_path):
    from zoo.recipes.run_folder import lock

    with lock(tmp_path / "busy"):
        with pytest.raises(ConfigError, match="in use by another process"):
            run("busy")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run_and_is_never_saved(run, monkeypatch, tmp_path, value):
    original = classification.F.cross_entropy
    calls = iter(range(100))

    def broken(*arguments, **keywords):
        return original(*arguments, **keywords) * (
            value if next(calls) == 3 + 3 else 1
        )  # three steps, three validations

    monkeypatch.setattr(classification.F, "cross_entropy", broken)
    with pytest.raises(ZooError, match=r"step 4 \(epoch 2, batch 1: train/\w+/\d+.png, .* lr ") as stopped:
        run("nan")
    assert str(value) in str(stopped.value)
    for name in ("last", "best"):
        saved = torch.load(tmp_path / "nan" / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert saved["global_step"] == 3
        assert all(torch.isfinite(weight).all() for weight in saved["state_dict"].values())


def test_weights_that_are_no_numbers_are_never_saved(run, monkeypatch, tmp_path):
    original = Training.optimizer_step

    def spoil(self, *arguments, **keywords):
        original(self, *arguments, **keywords)
        if self.trainer.global_step == 1:
            next(self.model.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(Training, "optimizer_step", spoil)
    with pytest.raises(ZooError, match="step 2, so it was not saved"):
        run("spoilt")
    assert not list((tmp_path / "spoilt" / "checkpoints").glob("*.ckpt"))


def test_a_missing_folder_leaves_no_run_behind(run, tmp_path):
    with pytest.raises(DataError, match="no folder"):
        run("nothing", f"data.root={tmp_path}/nowhere")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    "override",
    ["trainer.accelerator=tpu", "trainer.strategy=nonesuch", "trainer.devices=many", "model.args={depth: 3}"],
)
def test_what_lightning_or_the_model_refuses_is_one_line(run, override):
    with pytest.raises(ConfigError) as refused:
        run("x", override)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.name=sgd", "optim.momentum=0"], "optim.momentum=0.0 does not fit .* or optim.name=momentum"),
        (["optim.name=sgd", "optim.betas=[0.9, 0.99]"], "optim.betas: optim.name=sgd reads none"),
        (["optim.args={epss: 1}"], r"optim.args={'epss': 1} do not fit optim.name=adamw: .*epss"),
    ],
)
def test_what_an_optimiser_refuses_leaves_no_run_behind(run, tmp_path, overrides, words):
    with pytest.raises(ConfigError, match=words) as refused:
        run("x", *overrides)
    assert "\n" not in str(refused.value) and not (tmp_path / "x").exists()
    run("plain", "optim.name=momentum", "optim.momentum=0", "optim.epochs=1")


def test_mixing_needs_whole_batches(run):
    with pytest.raises(ConfigError, match="data.batch_size=64 is more than the 26 training images"):
        run("x", "data.batch_size=64")


def test_a_checkpoint_to_start_from_is_answered_with_the_file_that_fits(run, finished, tmp_path):
    checkpoint = finished / "checkpoints" / "best.ckpt"
    with pytest.raises(ConfigError, match="holds all of a run") as refused:
        run("x", f"model.checkpoint={checkpoint}")
    assert f"give {finished / 'model.safetensors'}, or what `zoo export" in str(refused.value)
    assert "\n" not in str(refused.value) and not (tmp_path / "x").exists()
    exported = export(checkpoint, "safetensors", tmp_path / "best.safetensors").path
    for file in (finished / "model.safetensors", exported):
        run(file.stem, f"model.checkpoint={file}", "optim.epochs=1", "model.freeze=[levels.0]")
    with pytest.raises(IntegrityError, match="does not fit"):
        run("y", f"model.checkpoint={checkpoint.parents[1] / 'model.safetensors'}", "model.name=nat_mini")


def test_a_secret_is_nowhere_in_the_run(run, image_folder, monkeypatch, tmp_path, capfd):
    canary = tmp_path / "s3cr3t-c4n4ry"
    canary.symlink_to(image_folder)
    monkeypatch.setenv("ZOO_TEST_SECRET", str(canary))
    (image_folder / "train" / "dark" / "note.txt").write_text("counted, and its folder named")
    try:
        folder = run("secret", "optim.epochs=1", "data.root=${oc.env:ZOO_TEST_SECRET}").folder
    finally:
        (image_folder / "train" / "dark" / "note.txt").unlink()
    (canary.parent / "gone").mkdir()
    monkeypatch.setenv("ZOO_TEST_SECRET", str(canary) + "-gone")
    with pytest.raises(DataError, match=r"no folder \$\{oc.env:ZOO_TEST_SECRET\}"):
        run("secret-gone", "data.root=${oc.env:ZOO_TEST_SECRET}")
    for path in folder.rglob("*"):
        assert not path.is_file() or b"s3cr3t-c4n4ry" not in path.read_bytes(), path
    printed = capfd.readouterr()
    assert "s3cr3t" not in printed.out + printed.err
    assert "${oc.env:ZOO_TEST_SECRET}" in (folder / "config.yaml").read_text()


# ---- training itself


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.layer_decay=0.7"],
        ["optim.ema=null", "augment.mixup=0", "augment.cutmix=0"],
        ["trainer.precision=bf16-mixed", "trainer.channels_last=true", "model.grad_checkpointing=true"],
        ["optim.schedule=constant", "optim.warmup_epochs=0", "optim.name=sgd", "optim.lr_base_batch=16"],
        ["augment.color_jitter=0.4", "augment.auto_augment=null", "data.image_size=40"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_choice_trains(run, overrides):
    result = run("choice", "optim.epochs=1", "optim.warmup_epochs=1", *overrides)
    assert np.isfinite(result.metrics["val_loss"])


@pytest.mark.slow
def test_a_compiled_network_trains_to_the_same_losses_and_stops_and_goes_on(
    run, finished, at_step, tmp_path, monkeypatch
):
    """By a backend without code generation: what is tested is that the run goes through the compiler."""
    compiled = []

    def graphs(module, inputs):
        compiled.append(module)
        return module.forward

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: original(self, backend=graphs))
    at_step(4, kill)
    with pytest.raises(Killed):
        run("compiled", "trainer.compile=true")
    assert compiled
    run("compiled", "trainer.compile=true", resume=tmp_path / "compiled")

    def losses(folder: Path) -> list[float]:
        with (folder / "metrics.csv").open() as file:
            return [float(row["train_loss"] or row["val_loss"]) for row in csv.DictReader(file)]

    assert losses(tmp_path / "compiled") == pytest.approx(losses(finished), rel=1e-5)
    state = torch.load(tmp_path / "compiled" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    whole = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == whole.keys()  # no name of the compiler's


def test_bad_images_are_skipped_and_listed_when_asked(run, image_folder, tmp_path):
    folder = tmp_path / "some-bad"
    shutil.copytree(image_folder, folder)
    (folder / "train" / "dark" / "03.png").write_bytes(b"")
    (folder / "val" / "light" / "02.png").write_bytes(b"<html>")
    (folder / "val" / "light" / "03.png").write_bytes(b"<html>")
    (folder / "val" / "light" / "04.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"train/dark/03.png cannot be read as an image: the file is empty"):
        run("strict", f"data.root={folder}")
    result = run("lenient", f"data.root={folder}", "data.bad_images=skip", "optim.epochs=1")
    listed = (result.folder / "bad_files.txt").read_text().splitlines()
    assert [line.split()[0] for line in listed] == [
        "train/dark/03.png", "val/light/02.png", "val/light/03.png", "val/light/04.png",
    ]  # fmt: skip
    assert (result.evaluation.images, result.evaluation.skipped) == (7, 3)


@pytest.mark.parametrize(("size", "fits"), [(24, True), (26, False)])
def test_a_batch_that_leaves_a_process_without_an_image_is_refused(run, monkeypatch, size, fits):
    """There are 26; the others would wait for it for ever."""
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: kill())
    refused = pytest.raises(Killed) if fits else pytest.raises(ConfigError, match="lower it, to 13 at most")
    with refused:
        run("many", f"data.batch_size={size}", "trainer.devices=2", "trainer.strategy=ddp",
            "trainer.accelerator=cpu")  # fmt: skip


def test_bad_images_are_listed_once_however_often_a_run_goes_on(run, image_folder, tmp_path):
    folder = tmp_path / "some-bad"
    shutil.copytree(image_folder, folder)
    (folder / "val" / "light" / "02.png").write_bytes(b"<html>")
    skipping = (f"data.root={folder}", "data.bad_images=skip")
    run("lenient", *skipping, "optim.epochs=1")
    run("lenient", *skipping, resume=tmp_path / "lenient")
    assert (tmp_path / "lenient" / "bad_files.txt").read_text().count("\n") == 1


@pytest.mark.slow
def test_two_processes_train_and_resume(recipe_file, tmp_path):
    """Lightning starts the second process; both agree on the folder, and one of them writes."""
    options = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu", "data.batch_size=4"]
    folder = tmp_path / "pair"
    for arguments in (
        ["train", str(recipe_file), *options, "optim.epochs=1"],
        ["train", *options, "optim.epochs=2", "--resume"],
    ):
        command = [sys.executable, "-m", "zoo", *arguments, "--run-dir", str(folder)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    with (folder / "metrics.csv").open() as file:
        steps = [row["step"] for row in csv.DictReader(file) if row["train_loss"]]
    assert steps == [str(step + 1) for step in range(STEPS)]


@pytest.mark.parametrize(
    "variables",
    [{"WORLD_SIZE": "2"}, {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "digits"}],
    ids=lambda each: min(each),
)
def test_processes_of_torchrun_and_slurm_must_be_told_one_folder(recipe_file, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="several processes start this training: name its folder"):
        api.train(api.recipe(recipe_file))


def test_train_takes_a_recipe_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="did you mean classification/digits"):
        train("classification/digit")
    with pytest.raises(ConfigError, match="no run of digits"):
        train("classification/digits", resume=True)
    assert api.train is train
