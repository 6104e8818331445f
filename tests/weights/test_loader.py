"""Weights files and manifests: read without running anything, refused with one clear line."""

from __future__ import annotations

import argparse
import hashlib
import http.server
import os
import pickle
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import zoo
from zoo.weights import loader

ENTRY = {"url": "https://example.org/w.pth", "sha256": "a" * 64}


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
    with pytest.raises(zoo.ConfigError, match="is a folder"):
        loader.read_state_dict(tmp_path)


# Manifests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", loader.manifests(), ids=lambda path: path.stem)
def test_every_manifest_of_the_package_is_sound(path):
    models = set(zoo.list_models())
    for entry in loader.read_manifest(path):
        assert entry.model in models
        if entry.packaged:
            data = entry.packaged.read_bytes()
            assert hashlib.sha256(data).hexdigest() == entry.sha256
            assert entry.size in (None, len(data))


def manifest(folder: Path, text: str) -> Path:
    path = folder / "family.yaml"
    path.write_text(text)
    return path


GOOD = "nat_mini.in1k: {url: https://example.org/w.pth"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a mapping"),
        ("4", "not a manifest"),
        ("[1, 2]", "must be a mapping"),
        ("nat_mini: {url: https://example.org/w.pth}", "named <model>.<tag>"),
        (f"{GOOD}, ulr: x}}", "unknown field 'ulr'; did you mean url"),
        (f"{GOOD}, sha256: abc}}", "sha256 must be 64 hexadecimal digits"),
        (f"{GOOD}, sha256: {'A' * 64}}}", "sha256 must be 64 hexadecimal digits in lower case"),
        (f"{GOOD}, size: -1}}", "size must be a positive number"),
        (f"{GOOD}, file: w.safetensors}}", "either url or file"),
        ("nat_mini.in1k: {license: MIT}", "either url or file"),
        ("nat_mini.in1k: {url: 'http://example.org/w.pth'}", "must be https"),
        ("nat_mini.in1k: {url: 'file:///etc/passwd'}", "must be https"),
        ("nat_mini.in1k: {url: 'https://me:secret@example.org/w'}", "without a user name"),
        (f"nat_mini.in1k: {{file: ../w.safetensors, sha256: {'a' * 64}}}", "beside the manifest"),
        ("nat_mini.in1k: {file: w.safetensors}", "with its sha256"),
        (f"{GOOD}}}\n{GOOD}}}", "not a manifest"),
        ("a: !!python/object/apply:os.mkdir [ran]", "not a manifest"),
        ("[" * 3000, "not a manifest"),
    ],
)
def test_a_wrong_manifest_names_the_field(text, message, tmp_path):
    with pytest.raises(zoo.IntegrityError, match=message):
        loader.read_manifest(manifest(tmp_path, text))


# Packaged and fetched weights ------------------------------------------------------------------------------


def test_shipped_weights_that_were_damaged_are_refused(tmp_path, monkeypatch):
    save_file({"w": torch.ones(3)}, tmp_path / "w.safetensors")
    entry = loader.Weights(model="m", tag="t", file="w.safetensors", sha256="b" * 64)
    monkeypatch.setattr(loader, "FOLDER", tmp_path)
    monkeypatch.setattr(loader, "entries_of", lambda model: [entry])
    with pytest.raises(zoo.IntegrityError, match="damaged or was replaced.*bbbbbbbbbbbb"):
        loader.read_pretrained("m")


def test_models_and_tags_without_weights_say_so():
    with pytest.raises(zoo.ConfigError, match="unknown weights tag 'in1kk' of nat_mini.*did you mean in1k"):
        zoo.create_model("nat_mini", pretrained="in1kk")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local stand-in for the publisher; manifests themselves only allow https."""
    root = tmp_path / "published"
    root.mkdir()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments, directory=str(root))

        def log_message(self, *arguments) -> None: ...

        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
        yield root, f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()
        thread.join()


def test_a_file_is_fetched_once_pinned_and_checked_from_then_on(server, tmp_path, monkeypatch):
    root, url, asked = server
    torch.save({"w": torch.arange(3.0)}, root / "w.pth")
    entry = loader.Weights(model="m", tag="t", url=f"{url}/w.pth")
    monkeypatch.setattr(loader, "entries_of", lambda model: [entry])
    for _ in range(2):
        state, source = loader.read_pretrained("m")
        assert torch.equal(state["w"], torch.arange(3.0))
    assert len(asked) == 1
    damaged = bytearray(Path(source).read_bytes())
    damaged[-50] ^= 1
    Path(source).write_bytes(damaged)
    with pytest.raises(zoo.IntegrityError, match="damaged or was replaced"):
        loader.read_pretrained("m")
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".lock", ".pth", ".sha256"]


@pytest.mark.parametrize("fault", ["absent", "page", "hash"])
def test_a_download_that_goes_wrong_keeps_nothing(fault, server, tmp_path, monkeypatch):
    root, url, _ = server
    torch.save({"w": torch.ones(3)}, root / "w.pth")
    if fault == "absent":
        (root / "w.pth").unlink()
    if fault == "page":
        (root / "w.pth").write_text("<html>sorry</html>")
    sha256 = "c" * 64 if fault == "hash" else None
    entry = loader.Weights(model="m", tag="t", url=f"{url}/w.pth", sha256=sha256)
    monkeypatch.setattr(loader, "entries_of", lambda model: [entry])
    with pytest.raises(zoo.ZooError) as caught:
        loader.read_pretrained("m")
    assert "\n" not in str(caught.value)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_offline_says_where_the_file_should_be(tmp_path):
    code = "import zoo; zoo.create_model('nat_mini', pretrained=True)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ZOO_CACHE": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "ResourceError: offline (HF_HUB_OFFLINE is set)" in result.stderr.splitlines()[-1]
