"""What is wrong with a recipe or its data is one line, said before torch is imported or a model is built."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import zoo
from zoo.recipes.names import MODELS

TASKS = {
    "classification": "model: {name: nat_digits}\ndata: {name: folder, root: images}\n",
    "segmentation": "model: {name: nat_digits}\ndata: {name: folder, root: masks}\n",
    "generation": "model: {name: dit_digits}\ndata: {name: folder, root: images}\n",
}
FAULTS = {  # what is typed, exit status, words of the line
    "key": ("optim.lrr=1", 2, "unknown key 'optim.lrr'; did you mean optim.lr"),
    "type": ("optim.lr=fast", 2, "optim.lr='fast' is not a number"),
    "model": ("model.name=digit", 2, "unknown model.name='digit'; did you mean"),
    "data folder": ("data.root=nowhere", 3, "no folder nowhere"),
    "class count": ("model.num_classes=5", 3, "model.num_classes=5, but"),
    "mask label": ("data.root=wrong", 3, "mask wrong/val/masks/1.png holds 7"),
    "one class": ("data.root=single", 3, "single holds one class only (dark); two or more are wanted"),
    "no background": ("data.root=bare", 3, "bare holds one class only (thing); two or more are wanted: add"),
}
OF_ONE_TASK = {"mask label": "segmentation", "one class": "classification", "no background": "segmentation"}
CASES = [(task, fault) for task in TASKS for fault in FAULTS if OF_ONE_TASK.get(fault, task) == task]
# Types one command after the other and tells status, line and whether torch has been imported by then.
TYPIST = """
import contextlib, io, json, sys
from zoo.cli import main
for arguments in json.load(sys.stdin):
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        status = main(arguments)
    print(json.dumps([status, error.getvalue(), [name for name in ("torch", "timm") if name in sys.modules]]))
"""


def write_masks(root: Path, last: int) -> None:
    for split in ("train", "val"):
        for number in range(2):
            wrong = split == "val" and number == 1
            for part, values in (
                ("images", np.zeros((8, 8, 3))),
                ("masks", np.full((8, 8), last if wrong else number)),
            ):
                file = root / split / part / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values.astype(np.uint8)).save(file)
    (root / "classes.txt").write_text("ground\nthing\n")


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[tuple[str, str], tuple[int, str, list[str]]]:
    """What `zoo train` says of every fault in every task, all in one process without torch."""
    home = tmp_path_factory.mktemp("home")
    for split in ("train", "val"):
        for name in ("dark", "light"):
            (home / "images" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(home / "images" / split / name / "0.png")
    write_masks(home / "masks", 1)
    write_masks(home / "wrong", 7)
    shutil.copytree(home / "images", home / "single", ignore=shutil.ignore_patterns("light"))
    shutil.copytree(home / "masks", home / "bare")
    (home / "bare" / "classes.txt").write_text("thing\n")
    for split in ("train", "val"):
        for part in ("images", "masks"):
            (home / "bare" / split / part / "1.png").unlink()
    for task, text in TASKS.items():
        (home / f"{task}.yaml").write_text(f"task: {task}\n{text}")
    typed = [["train", f"{task}.yaml", FAULTS[fault][0]] for task, fault in CASES]
    result = subprocess.run(
        [sys.executable, "-c", TYPIST], input=json.dumps(typed), cwd=home, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert not (home / "runs").exists()
    return dict(zip(CASES, map(json.loads, result.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(("task", "fault"), CASES)
def test_it_is_one_line_before_torch_is_imported(answers, task, fault):
    status, printed, imported = answers[task, fault]
    _, wanted, words = FAULTS[fault]
    assert status == wanted and words in printed
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert imported == []


@pytest.mark.parametrize("task", MODELS)
def test_the_names_known_without_torch_are_those_of_the_registry(task):
    assert list(MODELS[task]) == zoo.list_models(task=task)
