"""train, eval, predict and recipes, as typed: what is printed, where, and the status."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from zoo.cli import main


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with one trained run in runs/tiny and a few image files."""
    from PIL import Image

    from zoo.recipes import api

    folder = tmp_path_factory.mktemp("home")
    images = {}
    for split, count in (("train", 4), ("val", 3)):
        for name, level in (("dark", 30), ("light", 220)):
            for number in range(count):
                images[folder / "data" / split / name / f"{number}.png"] = level + 3 * number
    for file, level in images.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (level,) * 3).save(file)
    (folder / "tiny.yaml").write_text(
        f"model: {{name: nat_digits}}\n"
        f"data: {{name: folder, root: {folder}/data, batch_size: 4, workers: 0}}\n"
        "optim: {epochs: 1, warmup_epochs: 0}\n"
    )
    api.train(folder / "tiny.yaml", run_dir=folder / "runs" / "tiny")
    return folder


@pytest.fixture
def zoo(home, monkeypatch, capsys):
    """Type a command in that folder: (status, lines of output, lines of errors)."""

    def run(*arguments: str) -> tuple[int, list[str], list[str]]:
        monkeypatch.chdir(home)
        status = main(list(arguments))
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err.splitlines()

    return run


def refused(result: tuple[int, list[str], list[str]], status: int, words: str) -> None:
    assert result[0] == status
    assert result[1] == []
    assert len(result[2]) == 1 and result[2][0].startswith("error: ")
    assert words in result[2][0]


# ---- train


def test_train_ends_with_the_accuracy_and_the_place(zoo, home, tmp_path):
    status, out, err = zoo("train", "tiny.yaml", "--run-dir", str(tmp_path / "run"), "optim.lr=1e-4")
    assert status == 0
    assert len(out) == 2
    assert "nat_digits: " in out[0] and "of 6 validation images right" in out[0]
    assert str(tmp_path / "run") in out[1] and "model.safetensors" in out[1]
    assert "optim.lr=1e-4" in (tmp_path / "run" / "command.txt").read_text()


def test_each_run_without_a_folder_gets_the_next_number(zoo, home):
    assert zoo("train", "tiny.yaml")[0] == 0
    assert (home / "runs" / "tiny-2" / "model.safetensors").exists()


def test_resume_finds_the_last_run_or_the_named_one(zoo, home):
    status, out, err = zoo("train", "tiny.yaml", "--resume")
    assert status == 0 and any("resuming runs/tiny" in line for line in err)
    status, out, err = zoo("train", "--resume", "runs/tiny")
    assert status == 0 and any("resuming runs/tiny/checkpoints/last.ckpt at step 2" in line for line in err)
    status, out, err = zoo("train", "--resume", "runs/tiny/checkpoints/best.ckpt", "tiny.yaml")
    assert status == 0
    status, out, err = zoo("train", "tiny.yaml", "--run-dir", "runs/tiny", "--resume")
    assert status == 0


def test_a_file_or_a_run_may_have_an_equals_sign_in_its_name(zoo, home):
    (home / "d=x.yaml").write_bytes((home / "tiny.yaml").read_bytes())
    assert zoo("train", "d=x.yaml", "--run-dir", "lr=0.001")[0] == 0
    assert (home / "lr=0.001" / "model.safetensors").exists()
    status, _, err = zoo("train", "--resume", "lr=0.001", "optim.lr=0.5")
    assert status == 0 and any("resuming lr=0.001" in line for line in err)
    # A folder of that name is no recipe, so that here it is an override all the same.
    (home / "seed=a").mkdir()
    refused(zoo("train", "tiny.yaml", "seed=a"), 2, "seed='a' is not a whole number")
    long = "model.args={" + ", ".join(f"a{number}: {number}" for number in range(100)) + "}"
    refused(zoo("train", "--resume", "lr=0.001", long), 2, "model.args")


def test_a_recipe_to_resume_may_end_in_yml(zoo, home):
    (home / "small.yml").write_bytes((home / "tiny.yaml").read_bytes())
    refused(zoo("train", "--resume", "small.yml"), 2, "no run of small")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--resume", "runs/lr=0.1"], 2, "nothing to resume at runs/lr=0.1"),
        (["tiny.yml"], 2, "no recipe file tiny.yml"),
        (["classification/digitz"], 2, "did you mean classification/digits"),
        (["tiny.yaml", "optim.lrr=1"], 2, "did you mean optim.lr"),
        (["tiny.yaml", "optim.lr=fast"], 2, "not a number"),
        (["tiny.yaml", "optim.lr=-1"], 2, "must be above 0"),
        (["tiny.yaml", "model.name=nat_digit"], 2, "did you mean nat_digits"),
        (["tiny.yaml", "other.yaml"], 2, "one recipe is wanted"),
        (["optim.lr=1"], 2, "one recipe is wanted"),
        (["tiny.yaml", "--run-dir", "runs/tiny"], 2, "--resume"),
        (["tiny.yaml", "--run-dir", "tiny.yaml"], 2, "is a file"),
        (["tiny.yaml", "data.root=nowhere"], 3, "no folder nowhere"),
        (["tiny.yaml", "model.num_classes=3"], 3, "the data has 2 classes"),
        (["--resume", "runs/nowhere"], 2, "nothing to resume"),
        (["--resume"], 2, ""),
        (["tiny.yaml", "--resume", "--run-dir", "data"], 2, "holds no run"),
        (["--resume", "runs/tiny", "model.name=nat_mini"], 2, "model.name nat_digits -> nat_mini"),
        (["classification/digits", "--resume", "runs/tiny"], 2, "data.name"),
        (["tiny.yaml", "model.checkpoint=runs/tiny/command.txt"], 4, "command.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_train_refuses_in_one_line(zoo, arguments, status, words):
    refused(zoo("train", *arguments), status, words)


# ---- eval


def test_eval_prints_one_line_and_writes_json(zoo, home, tmp_path):
    status, out, err = zoo("eval", "runs/tiny", "--json", str(tmp_path / "result.json"))
    assert (status, err) == (0, [])
    assert len(out) == 1 and out[0].startswith("runs/tiny: ") and "of 6 images right" in out[0]
    facts = json.loads((tmp_path / "result.json").read_text())
    assert facts["images"] == 6 and sum(map(sum, facts["confusion"])) == 6
    status, out, err = zoo("eval", "runs/tiny", "--data", "data/train", "--json", "-")
    assert json.loads("\n".join(out))["images"] == 8


def test_eval_refuses_in_one_line(zoo):
    refused(zoo("eval", "runs/tiny", "--data", "nowhere"), 3, "no folder nowhere")
    refused(zoo("eval", "runs/nowhere"), 2, "no run folder or file")
    refused(zoo("eval", "runs/tiny", "--device", "abacus"), 2, "abacus")


# ---- predict


def test_predict_prints_a_line_for_each_image(zoo, home):
    status, out, err = zoo("predict", "runs/tiny", "data/val", "--top-k", "1")
    assert (status, err) == (0, [])
    assert len(out) == 6
    assert out[0].startswith("data/val/dark/0.png: ") and out[0].endswith(" %") and "," not in out[0]


def test_predict_takes_patterns_and_writes_json_and_pictures(zoo, home, tmp_path):
    arguments = ["predict", "runs/tiny", "data/val/*/0.png", "data/val/dark/1.png"]
    status, out, err = zoo(
        *arguments, "--json", str(tmp_path / "p.json"), "--explain", str(tmp_path / "attention")
    )
    assert status == 0 and len(out) == 3
    assert err == [f"3 pictures of what the centre attends to in {tmp_path}/attention"]
    facts = json.loads((tmp_path / "p.json").read_text())
    assert [each["file"] for each in facts["predictions"]] == [
        "data/val/dark/0.png", "data/val/light/0.png", "data/val/dark/1.png",
    ]  # fmt: skip
    assert len(facts["predictions"][0]["classes"]) == 2
    assert len(list((tmp_path / "attention").glob("*.png"))) == 3


def test_json_on_the_output_is_nothing_but_json(zoo, home, tmp_path):
    arguments = ["predict", "runs/tiny", "data/val/dark/0.png", "--json", "-", "--explain", str(tmp_path)]
    status, out, err = zoo(*arguments)
    assert json.loads("\n".join(out))["model"] == "nat_digits"


def test_a_bad_image_gets_its_line_and_the_others_go_on(zoo, home, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"x")
    status, out, err = zoo("predict", "runs/tiny", str(tmp_path / "bad.png"), "data/val/dark", "missing.png")
    assert status == 3
    assert len(out) == 3
    assert len(err) == 2 and "bad.png" in err[0] and "missing.png" in err[1]


def test_a_file_name_that_is_no_text_is_printed_and_written_all_the_same(zoo, home, tmp_path):
    odd = tmp_path / os.fsdecode(b"z\xfcd.png")
    odd.write_bytes((home / "data" / "val" / "dark" / "0.png").read_bytes())
    status, out, err = zoo("predict", "runs/tiny", str(odd), "--json", str(tmp_path / "p.json"))
    assert (status, err) == (0, []) and "z\\udcfcd.png" in out[0]
    facts = json.loads((tmp_path / "p.json").read_text())
    assert facts["predictions"][0]["file"] == str(odd)


def test_a_damaged_file_whose_name_is_no_text_is_skipped(zoo, home, tmp_path):
    shutil.copytree(home / "data", tmp_path / "data")
    (tmp_path / "data" / "train" / "dark" / os.fsdecode(b"z\xfcd.png")).write_bytes(b"x")
    file = tmp_path / os.fsdecode(b"r\xfc.yaml")
    file.write_text("name: tiny\n" + (home / "tiny.yaml").read_text())
    line = f"data.root={tmp_path}/data data.bad_images=skip --run-dir {tmp_path}/run"
    assert zoo("train", str(file), *line.split())[0] == 0
    assert "z\\udcfcd.png" in (tmp_path / "run" / "bad_files.txt").read_text()
    assert "r\\udcfc.yaml" in (tmp_path / "run" / "command.txt").read_text()


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_an_output_without_the_letters_of_a_name_shows_it_all_the_same(home, tmp_path, monkeypatch, encoding):
    file = tmp_path / "\xfcn\xef.png"
    file.write_bytes((home / "data" / "val" / "dark" / "0.png").read_bytes())

    def printed(*arguments: str) -> str:
        output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", output)
            assert main(list(arguments)) == 0
        return output.buffer.getvalue().decode(encoding)

    shown = {"ascii": "\\xfcn\\xef.png", "utf-8": "\xfcn\xef.png"}[encoding]
    assert shown in printed("predict", str(home / "runs" / "tiny"), str(file))
    facts = json.loads(printed("predict", str(home / "runs" / "tiny"), str(file), "--json", "-"))
    assert facts["predictions"][0]["file"] == str(file)
    assert "name: " in printed("recipes", "show", "classification/digits", "name=\xfc")
    assert json.loads(printed("runs", "list", str(home / "runs"), "--json", "-"))


def test_predict_refuses_in_one_line(zoo, home):
    refused(zoo("predict", "runs/tiny", "tif/*.tif"), 3, "no image matches")
    refused(zoo("predict", "nat_digitz", "data/val"), 2, "did you mean nat_digits")
    assert zoo("predict", "runs/tiny")[0] == 2
    assert zoo("predict", "runs/tiny", "data/val", "--top-k", "0")[0] == 2


# ---- recipes


def test_recipes_are_listed_with_what_they_say(zoo):
    status, out, err = zoo("recipes", "list", "class*/digits")
    assert status == 0 and len(out) == 1
    assert out[0].startswith("classification/digits") and "handwritten digits" in out[0]
    refused(zoo("recipes", "list", "nonesuch*"), 2, "no recipe matches")


def test_a_recipe_is_shown_whole_and_as_it_would_be_trained(zoo, tmp_path):
    status, out, err = zoo("recipes", "show", "classification/digits", "optim.lr=0.125")
    assert status == 0 and out[0].startswith("# ")
    (tmp_path / "shown.yaml").write_text("\n".join(out))
    from zoo.recipes.config import recipe

    assert recipe(tmp_path / "shown.yaml").optim.lr == 0.125


def test_a_copy_is_the_users_own_and_overwrites_nothing(zoo, tmp_path):
    status, out, err = zoo("recipes", "copy", "classification/digits", str(tmp_path / "mine.yaml"))
    assert status == 0 and f"zoo train {tmp_path}/mine.yaml" in out[0]
    assert zoo("recipes", "copy", "classification/digits", str(tmp_path))[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits.yaml", "mine.yaml"]
    refused(zoo("recipes", "copy", "classification/digits", str(tmp_path / "mine.yaml")), 2, "exists already")
    refused(zoo("recipes", "copy", "classification/digits", str(tmp_path / "mine.txt")), 2, ".yaml")
    assert zoo("recipes", "check", str(tmp_path / "mine.yaml"))[0] == 0


def test_a_copy_goes_into_a_new_folder_and_its_command_can_be_typed(zoo, tmp_path):
    status, out, _ = zoo("recipes", "copy", "classification/digits", f"{tmp_path}/a b/")
    assert status == 0 and (tmp_path / "a b" / "digits.yaml").is_file()
    assert out[0].endswith(f"zoo train '{tmp_path}/a b/digits.yaml'")


def test_check_judges_all_recipes_and_counts_the_wrong_ones(zoo, tmp_path):
    status, out, err = zoo("recipes", "check")
    assert status == 0 and out[-1].endswith("recipes are right") and err == []
    (tmp_path / "bad.yaml").write_text("model: {name: nat_digits, depth: 3}\n")
    status, out, err = zoo("recipes", "check", str(tmp_path / "bad.yaml"), "classification/digits")
    assert status == 2 and out == ["1 of 2 recipes are right"]
    assert len(err) == 1 and "model.depth" in err[0]


# ---- a real process


@pytest.mark.slow
def test_sigterm_ends_the_command_with_143_and_its_step_saved(home, tmp_path):
    """The signal comes once the first epoch is reported; what is saved is tested with the trainer."""
    import signal

    code = "import torch, sys; torch.set_num_threads(1)\nfrom zoo.cli import entry_point; entry_point()"
    command = [
        sys.executable,
        "-c",
        code,
        "train",
        str(home / "tiny.yaml"),
        "optim.epochs=200",
        "trainer.log_every=1",
    ]
    folder = tmp_path / "run"
    with subprocess.Popen([*command, "--run-dir", str(folder)], stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("epoch 1/"):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stderr.read()
    assert process.returncode == 143, rest
    assert "stopped by SIGTERM after step" in rest and "Traceback" not in rest
    assert (folder / "checkpoints" / "last.ckpt").exists()
