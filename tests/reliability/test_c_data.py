"""R26 to R32 as somebody types them: damaged, odd and hostile images and folders."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.cli import main


def damage(path: Path, kind: str) -> None:
    """Put something in the place of an image that cannot be read as one."""
    whole = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling link":
        path.symlink_to("nowhere.png")
    else:
        path.write_bytes(
            {"empty": b"", "web page": b"<html>404</html>", "cut": whole[: len(whole) // 2]}[kind]
        )


KINDS = ["empty", "web page", "cut", "pipe", "device", "dangling link"]


# ---- R26


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_r26_training_stops_with_the_path(home, refused, kind, workers):
    damage(home / "images/train/dark/3.png", kind)
    sentence = refused(3, "train", "tiny.yaml", f"data.workers={workers}")
    assert "images/train/dark/3.png cannot be read as an image" in sentence


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_r26_or_goes_on_without_and_lists_them(home, workers):
    for number, kind in enumerate(KINDS[:4]):
        damage(home / f"images/train/dark/{number}.png", kind)
    command = ["train", "tiny.yaml", "data.bad_images=skip", f"data.workers={workers}", "--run-dir", "run"]
    assert main(command) == 0
    listed = (home / "run" / "bad_files.txt").read_text()
    assert all(f"train/dark/{number}.png" in listed for number in range(4))


@pytest.mark.parametrize("kind", KINDS)
def test_r26_prediction_names_it_and_goes_on_with_the_others(home, capfd, kind):
    damage(home / "images/val/dark/1.png", kind)
    assert main(["predict", "nat_digits", "images/val/dark", "--json", "-"]) == 3
    printed = capfd.readouterr()
    assert "images/val/dark/1.png cannot be read as an image" in printed.err
    assert len(json.loads(printed.out)) >= 2


# ---- R27


def answers(home: Path, capfd, file: Path) -> dict:
    assert main(["predict", "nat_digits", str(file), "--json", "-"]) == 0
    return json.loads(capfd.readouterr().out)


def same(one: object, other: object) -> bool:
    """Whether two answers agree but for the name of the file."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return abs(one - other) < 1e-5
    return True if isinstance(one, str) and one.endswith(".png") else one == other


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "I;16"])
def test_r27_one_picture_in_every_mode_is_one_answer(home, capfd, mode):
    grey = np.kron(
        np.arange(4, dtype=np.uint8)[:, None] * 60 + np.arange(4, dtype=np.uint8) * 20, np.ones((8, 8))
    )
    Image.fromarray(grey.astype(np.uint8)).save(home / "L.png")
    if mode == "I;16":
        Image.fromarray((grey * 257).astype(np.uint16)).save(home / "x.png")
    else:
        Image.fromarray(grey.astype(np.uint8)).convert(mode).save(home / "x.png")
    assert same(answers(home, capfd, home / "L.png"), answers(home, capfd, home / "x.png"))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_r27_a_turned_picture_that_says_so_is_the_upright_one(home, capfd, orientation):
    pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # what turns an upright picture that way
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(home / "upright.png")
    Image.fromarray(pixels).transpose(Image.Transpose(undo)).save(home / "turned.png", exif=exif)
    assert same(answers(home, capfd, home / "upright.png"), answers(home, capfd, home / "turned.png"))


# ---- R28


@pytest.mark.parametrize(("size", "status"), [((1, 1), 0), ((1, 30000), 3), ((15000, 15000), 3)])
def test_r28_odd_and_huge_pictures(home, capfd, size, status):
    Image.new("1", size).save(home / "x.png")
    assert main(["predict", "nat_digits", "x.png"]) == status
    assert len(capfd.readouterr().err.splitlines()) <= 3


# ---- R30


def extra_level(home: Path) -> None:
    shutil.move(home / "images" / "train", home / "deeper" / "all")
    shutil.move(home / "deeper", home / "images" / "train")


def other_classes(home: Path) -> None:
    (home / "images/val/dark").rename(home / "images/val/black")


def empty_class(home: Path) -> None:
    (home / "images/train/grey").mkdir()


@pytest.mark.parametrize("fault", [extra_level, other_classes, empty_class])
def test_r30_a_folder_of_another_layout(home, refused, fault):
    fault(home)
    refused(3, "train", "tiny.yaml")
    assert not (home / "runs").exists() or not any((home / "runs").rglob("*.ckpt"))


def test_r30_another_number_of_classes(home, refused):
    assert "model.num_classes" in refused(3, "train", "tiny.yaml", "model.num_classes=7")


# ---- R31


@pytest.fixture
def masks(home) -> Path:
    """A folder of images and masks of three classes, and a recipe on it."""
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (home / "pairs" / split / kind).mkdir(parents=True)
        for number in range(4):
            name = f"{number}.png"
            Image.fromarray(noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(
                home / "pairs" / split / "images" / name
            )
            Image.fromarray(noise.integers(0, 3, (32, 32), dtype=np.uint8)).save(
                home / "pairs" / split / "masks" / name
            )
    (home / "pairs" / "classes.txt").write_text("a\nb\nc\n")
    (home / "pairs.yaml").write_text(
        "task: segmentation\nmodel: {name: nat_digits}\nhead: {name: semantic_fpn, channels: 8}\n"
        "data: {name: folder, root: pairs, batch_size: 2, workers: 0, image_size: 32}\n"
        "optim: {epochs: 1, warmup_epochs: 0}\n"
    )
    return home / "pairs" / "train" / "masks"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda masks: Image.new("L", (32, 32), 7).save(masks / "1.png"), "7"),
        (lambda masks: Image.new("L", (16, 32)).save(masks / "1.png"), "16x32"),
        (lambda masks: Image.new("RGB", (32, 32), (1, 2, 3)).save(masks / "1.png"), "colours"),
        (lambda masks: (masks / "1.png").unlink(), "1.png"),
        (lambda masks: damage(masks / "1.png", "cut"), "cannot be read as"),
        (lambda masks: damage(masks / "1.png", "pipe"), "a pipe or device"),
    ],
)
def test_r31_a_wrong_mask_is_named(masks, refused, fault, words):
    fault(masks)
    sentence = refused(3, "train", "pairs.yaml")
    assert words in sentence and "1.png" in sentence
