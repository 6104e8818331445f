"""`zoo visualize`: the files it writes, and one clear line where a picture cannot be drawn."""

from __future__ import annotations

import shutil

import pytest
import torch
from PIL import Image

import zoo
from zoo.analysis.page import page_data
from zoo.cli import main
from zoo.cli.visualize import Scene
from zoo.heads import Segmenter
from zoo.weights.manifest import entries_of


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(["visualize", *arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_everything_is_drawn_of_a_shipped_model(capsys, tmp_path):
    status, out, err = run(capsys, "nat_digits", "digits:3", "--guided", "--html", "--output", str(tmp_path))
    assert status == 0, err
    kinds = ("attention", "query", "rollout", "relevance", "distance", "field")
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"{kind}.png" for kind in kinds),
        "attention.html",
    }
    for kind in kinds:
        with Image.open(tmp_path / f"{kind}.png") as picture:
            assert min(picture.size) > 200
    data = page_data((tmp_path / "attention.html").read_text())
    assert [layer["name"] for layer in data["layers"]] == ["rollout", "relevance"]
    assert data["title"].startswith("nat_digits") and len(data["blocks"]) == 4


def test_a_photograph_a_block_and_a_query_can_be_chosen(capsys, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.png")
    arguments = (str(tmp_path / "photo.png"), "--what", "query", "--block", "0", "--query", "0.1,0.9")
    assert run(capsys, "nat_digits", *arguments, "--output", str(tmp_path / "out"))[0] == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["query.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nat_digits", "digits:3", "--what", "rolout"], "did you mean rollout"),
        (["nat_digits", "digits:3", "--query", "3"], "--query must be down,right"),
        (["nat_digits", "digits:3", "--query", "3,3"], "between 0 and 1"),
        (["nat_digits", "digits:3", "--block", "9"], "no attention block '9'"),
        (["nat_digit", "digits:3"], "did you mean nat_digits"),
        (["resnet18", "digits:3", "--random"], "ResNet has no attention known here"),
        (["timm/resnet18", "digits:3", "--random"], "ResNet has no attention known here"),
        (["here.pth", "digits:3", "--random"], "--random is for the name of a model; here.pth has weights"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys, tmp_path):
    status, _, err = run(capsys, *arguments, "--output", str(tmp_path / "out"))
    assert status == 2 and message in err and len(err.splitlines()) <= 3


def test_a_missing_digit_is_a_mistake_in_the_data(capsys, tmp_path):
    status, _, err = run(capsys, "nat_digits", "digits:9999", "--output", str(tmp_path / "out"))
    assert status == 3 and "from 0 to 598" in err


def test_a_segmenter_says_nothing_of_the_whole_image():
    torch.manual_seed(0)
    model = Segmenter(zoo.create_model("nat_digits"), 3, channels=8).eval()
    scene = Scene(model, "mine", ["a", "b", "c"], torch.randn(1, 3, 32, 32), (0.5, 0.5), None, None, False)
    assert scene.title("attention") == "mine, attention"
    assert [name for name, _ in scene.layers()] == ["rollout"]
    with pytest.raises(zoo.ConfigError, match="relevance is for a class of the whole image"):
        scene.draw("relevance")


def test_a_run_that_makes_images_is_told_by_its_recipe(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(entries_of("dit_digits")[0].packaged, tmp_path / "run" / "model.safetensors")
    status, _, err = run(capsys, str(tmp_path / "run"), "digits:3", "--output", str(tmp_path / "out"))
    assert status == 2 and "run makes images, which zoo generate does" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nat_digits", "digits:3", "--size", "0"), "Invalid value for '--size'"),
        (("nat_digits", "digits:3", "--size", "100000"), "Invalid value for '--size'"),
        (("nat_digits", "digits:3", "--size", "100000"), "4096"),  # in words that typer changes
        (("nat_digits", "digits:3", "--target", "99", "--what", "attention"), "--target must be 0 to 9"),
        (("nat_digits", "digits:²"), "digits:N needs a number"),
        (("dit_digits", "digits:3"), "dit_digits makes images"),
        (("resnet18", "digits:3", "--random", "--size", "64"), "ResNet has no attention known here"),
    ],
)
def test_what_cannot_be_shown_is_told_in_one_line(arguments, message, tmp_path, capsys):
    status, _, err = run(capsys, *arguments, "--output", str(tmp_path))
    assert status in (2, 3) and message in err and len(err.splitlines()) == 1
