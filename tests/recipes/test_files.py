"""A file is whole or not there, whatever happens while it is written."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zoo.errors import IntegrityError, ResourceError
from zoo.recipes.files import link_atomically, load_checkpoint, save_checkpoint, sweep, write_atomically


def content(number: int, size: int = 1000) -> dict:
    return {"recipe": {"number": number}, "weights": torch.full((size,), float(number))}


def test_a_checkpoint_comes_back(tmp_path):
    save_checkpoint(content(1), tmp_path / "new" / "last.ckpt")
    again = load_checkpoint(tmp_path / "new" / "last.ckpt")
    assert again["recipe"] == {"number": 1} and again["weights"][0] == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["last.ckpt"]


def test_an_error_while_writing_keeps_the_old_file(tmp_path):
    file = tmp_path / "last.ckpt"
    file.write_bytes(b"old")

    def write(handle) -> None:
        handle.write(b"half of the ne")
        raise ValueError("interrupted")

    with pytest.raises(ValueError, match="interrupted"):
        write_atomically(file, write)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_kills_at_any_moment_leave_a_whole_checkpoint(tmp_path):
    """Twenty processes that write without a pause, killed while they do."""
    file = tmp_path / "last.ckpt"
    save_checkpoint(content(0, 500_000), file)
    for round_ in range(20):
        ready, writing = os.pipe()
        child = os.fork()
        if child == 0:
            number = 0
            while True:
                number += 1
                save_checkpoint(content(number, 500_000), file)
                os.write(writing, b"x")
        os.read(ready, 1)  # the first one is written: from here on any moment will do
        if round_ % 2:
            os.read(ready, 1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready), os.close(writing)
        saved = load_checkpoint(file)
        assert (saved["weights"] == saved["recipe"]["number"]).all()
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_keeps_the_old_file_and_says_so(tmp_path):
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from zoo.recipes.files import save_checkpoint\n"
        "from zoo.errors import ResourceError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "try:\n"
        "    save_checkpoint({'recipe': {}, 'weights': torch.zeros(1_000_000)}, Path(sys.argv[1]))\n"
        "except ResourceError as error:\n"
        "    print(error)\n"
    )
    file = tmp_path / "last.ckpt"
    save_checkpoint(content(7), file)
    result = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert "the disk is full" in result.stdout and "the previous file is kept" in result.stdout, result.stderr
    assert load_checkpoint(file)["recipe"] == {"number": 7}
    assert list(tmp_path.iterdir()) == [file]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 200_000


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(ResourceError, match="could not be written"):
        save_checkpoint(content(1), tmp_path / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("links", [True, False])
def test_another_name_replaces_the_old_file_in_one_step(tmp_path, monkeypatch, links):
    source, target = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    link_atomically(source, target)
    assert target.read_bytes() == b"new"
    write_atomically(source, lambda file: file.write(b"newer"))
    assert target.read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("canary",)


@pytest.mark.parametrize("kind", ["code", "cut", "empty", "text", "foreign", "list", "missing"])
def test_what_is_no_checkpoint_is_refused_and_nothing_runs(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    file = tmp_path / "x.ckpt"
    if kind == "code":
        torch.save({"recipe": Evil()}, file)
    elif kind == "cut":
        save_checkpoint(content(1), file)
        file.write_bytes(file.read_bytes()[:-300])
    elif kind == "empty":
        file.touch()
    elif kind == "text":
        file.write_text("<html>")
    elif kind == "foreign":
        torch.save({"state_dict": {}}, file)
    elif kind == "list":
        torch.save([1, 2], file)
    with pytest.raises(IntegrityError) as refused:
        load_checkpoint(file)
    assert str(file) in str(refused.value) and "\n" not in str(refused.value)
    assert ("posix.mkdir" in str(refused.value)) == (kind == "code")
    assert not (tmp_path / "canary").exists()
