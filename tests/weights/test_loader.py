"""Weights files and manifests: read without running anything, refused with one clear line."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

import zoo
from zoo.weights import loader


class Payload:
    """Makes a folder when unpickled: the sign that code ran."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_file_with_code_in_it_is_refused_and_the_code_does_not_run(form, force, tmp_path, monkeypatch):
    if force:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    canary = tmp_path / "ran"
    content = {"state_dict": {"w": torch.ones(2)}, "args": Payload(str(canary))}
    path = tmp_path / "evil.pth"
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(zoo.IntegrityError, match="evil.pth") as caught:
        loader.read_state_dict(path)
    assert "\n" not in str(caught.value)
    assert not canary.exists()
    if form == "zip":
        assert "mkdir" in str(caught.value)


class CfgNode(dict):
    """What yacs calls its settings: a dictionary with attributes of its own."""

    def __init__(self, *arguments, **settings) -> None:
        super().__init__(*arguments, **settings)
        self.__dict__["__immutable__"] = True


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_settings_pickled_beside_the_weights_are_left_aside(form, tmp_path, monkeypatch):
    yacs = types.ModuleType("yacs.config")
    yacs.CfgNode = CfgNode
    monkeypatch.setattr(CfgNode, "__module__", "yacs.config")
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", yacs)
    content = {
        "model": {"w": torch.ones(2)},
        "config": CfgNode(MODEL=CfgNode(NAME="swin", DIMS=[1, 2]), EPOCHS=3),
        "args": argparse.Namespace(lr=1e-3, opt="adamw"),
        "max_accuracy": np.float64(82.0) if form == "zip" else np.float32(82.0),
        "epoch": 300,
    }
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=form == "zip")
    monkeypatch.delitem(sys.modules, "yacs.config")
    assert loader.read_state_dict(tmp_path / "w.pth").keys() == {"w"}


@pytest.mark.parametrize(
    "call",
    [
        (argparse.Namespace.__setattr__, (argparse.Namespace(), "a", 1)),
        (os.system, ("echo",)),
        (np.dtype, ("O", False, True)),
    ],
)
def test_a_stand_in_opens_no_way_around_the_refusal(call, tmp_path, monkeypatch):
    """The stand-ins are looked up by their exact name; anything else near them stays refused or unread."""

    class Call:
        def __reduce__(self):
            return call

    torch.save({"model": {"w": torch.ones(2)}, "config": [Call()]}, tmp_path / "w.pth")
    if call[0] is np.dtype:
        assert loader.read_state_dict(tmp_path / "w.pth").keys() == {"w"}
    else:
        with pytest.raises(zoo.IntegrityError, match="could run code|not a readable"):
            loader.read_state_dict(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pth", b"", "is empty"),
        ("w.pth", b"<!DOCTYPE html><html>", "is a web page"),
        ("w.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "by `git lfs pull`"),
        ("w.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "by `git lfs pull`"),
        ("w.pth", b"PK\x03\x04 and then nothing", "not a readable weights file"),
        ("w.safetensors", b"\x10\x00\x00", "not a whole safetensors file"),
    ],
)
def test_damaged_files_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(zoo.IntegrityError, match=f"{name} .*{message}"):
        loader.read_state_dict(tmp_path / name)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_file_cut_anywhere_is_refused(kind, tmp_path):
    whole = tmp_path / f"whole.{kind}"
    state = {"a": torch.randn(50), "b": torch.randn(3, 7)}
    save_file(state, whole) if kind == "safetensors" else torch.save(state, whole)
    data = whole.read_bytes()
    for part in (0.1, 0.5, 0.9, 0.999):
        cut = tmp_path / f"cut.{kind}"
        cut.write_bytes(data[: int(len(data) * part)])
        with pytest.raises(zoo.IntegrityError):
            loader.read_state_dict(cut)


def test_a_file_without_weights_says_what_it_holds(tmp_path):
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "w.pth")
    with pytest.raises(zoo.IntegrityError, match="no state dict .*keys epoch, loss"):
        loader.read_state_dict(tmp_path / "w.pth")


def test_paths_that_are_no_files(tmp_path):
    (tmp_path / "nat.pth").touch()
    with pytest.raises(zoo.ConfigError, match="no weights file .*nat.pht; did you mean nat.pth"):
        loader.read_state_dict(tmp_path / "nat.pht")
    with pytest.raises(zoo.ConfigError, match="named by its path, found 3"):
        zoo.create_model("nat_digits", checkpoint_path=3)
    with pytest.raises(zoo.ConfigError, match="is a folder"):
        loader.read_state_dict(tmp_path)


def test_a_header_whose_length_looks_like_a_page_is_read(tmp_path):
    """0x3C20 bytes of header: the file begins with a blank and a <."""
    plain = len(save({"w": torch.ones(2)}, metadata={"note": ""}))
    for missing in range(0x3C20 - plain, 0x3C20, 8):
        data = save({"w": torch.ones(2)}, metadata={"note": "x" * missing})
        if data[:2] == b" <":
            break
    assert data[:2] == b" <"
    (tmp_path / "w.safetensors").write_bytes(data)
    assert torch.equal(loader.read_state_dict(tmp_path / "w.safetensors")["w"], torch.ones(2))
