"""What is read as a file is one: pipes and devices are refused at once, wherever a path is taken."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import zoo
from zoo.recipes.config import recipe
from zoo.recipes.data.images import read_image
from zoo.recipes.data.masks import read_mask
from zoo.recipes.files import load_checkpoint
from zoo.weights.files import open_file, write_atomically, write_text
from zoo.weights.loader import read_state_dict

READERS: dict[str, Callable[[Path], object]] = {
    "x.yaml": recipe,
    "x.png": read_image,
    "mask.png": read_mask,
    "x.ckpt": load_checkpoint,
    "x.safetensors": read_state_dict,
    "x.pth": lambda path: zoo.create_model("nat_digits", checkpoint_path=path),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_is_not_waited_for_and_a_device_not_read_to_its_end(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(zoo.ZooError) as refused:
        READERS[name](path)
    assert "a pipe or device, not a file" in str(refused.value)
    assert str(path) in str(refused.value)


def test_files_folders_and_what_is_missing_are_as_open_has_them(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    with open_file(tmp_path / "file") as file:
        assert file.read() == b"abc"
    with pytest.raises(IsADirectoryError):
        open_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "nothing")


def test_threads_may_write_one_file(tmp_path):
    def write(letter: bytes) -> None:
        for _ in range(30):
            write_atomically(tmp_path / "file", lambda file: file.write(100_000 * letter))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, (b"a", b"b")))
    assert len(set((tmp_path / "file").read_bytes())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_text_may_go_to_a_device(tmp_path):
    write_text(Path(os.devnull), "told")
    write_text(tmp_path / "new" / "file.txt", "told")
    assert (tmp_path / "new" / "file.txt").read_text() == "told"
