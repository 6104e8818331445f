"""Which files are images of a caption, and which are conditions of one."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from zoo.errors import DataError
from zoo.recipes.data.captions import Captioned


def found(root: Path, images: list[str], conditions: int) -> list[str]:
    """The items among images of these names, with a caption beside each."""
    (root / "train").mkdir()
    for name in images:
        Image.new("RGB", (4, 4)).save(root / "train" / f"{name}.png")
        (root / "train" / f"{name}.txt").write_text("a cat")
    captioned = Captioned(
        root,
        "train",
        key="",
        encoder=lambda: lambda pixels, caption, conditions: {"pixels": pixels},
        cache=root / "cache",
        size=(4, 4),
        conditions=conditions,
    )
    return [item.stem for item in captioned.items]


@pytest.mark.parametrize(
    ("images", "conditions", "items"),
    [
        (["cat", "frame.0001", "frame.0002", "v.1"], 0, ["cat", "frame.0001", "frame.0002", "v.1"]),
        (["cat", "cat.1", "cat.2"], 2, ["cat"]),
        (["cat.10", "cat.10.1"], 1, ["cat.10"]),
    ],
)
def test_a_number_at_the_end_of_a_name_makes_a_condition_only_where_there_are_some(
    tmp_path, images, conditions, items
):
    assert found(tmp_path, images, conditions) == items


def test_what_could_be_a_condition_of_nothing_is_an_image(tmp_path):
    with pytest.raises(DataError, match=r"dog.1.png needs dog.1.1.png beside it"):
        found(tmp_path, ["cat", "cat.1", "dog.1"], 1)


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    clip = tmp_path / "train" / "clip"
    clip.mkdir(parents=True)
    clip.with_suffix(".txt").write_text("a clip")
    for number in range(1, 13):
        Image.new("L", (8, 8), number).save(clip / f"{number}.png")
    seen = []

    def encode(pixels, caption, conditions):
        seen.append((127.5 * (pixels[0, :, 0, 0] + 1)).round().int().tolist())
        return {"latents": pixels}

    settings = {"key": "", "encoder": lambda: encode, "cache": tmp_path / "cache", "size": (8, 8)}
    Captioned(tmp_path, "train", frames=12, **settings)
    assert seen == [list(range(1, 13))]
