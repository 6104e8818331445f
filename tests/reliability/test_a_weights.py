"""Letter A of the reliability checks, weights and files: R01 to R20.

Manifests (R13) are in tests/weights/test_manifest.py and the scan of all sources (R04) in
tests/test_no_code_from_files.py.
"""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

import zoo
from zoo import checkpoints
from zoo.weights import download, loader, manifest
from zoo.weights.files import write_atomically
from zoo.weights.manifest import Weights


def file_of(value: float) -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.full((5000,), value)}, buffer)
    return buffer.getvalue()


DATA = file_of(1.0)
HASH = hashlib.sha256(DATA).hexdigest()


class Publisher:
    """A local stand-in for the web; `faults` are used up one by one, then it behaves."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"/w.pth": DATA}
        self.faults: list[str] = []
        self.asked: list[str] = []
        self.release = threading.Event()

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        self.asked.append(handler.path)
        fault = self.faults.pop(0) if self.faults else ""
        kind, _, detail = fault.partition(":")
        if kind == "status":
            handler.send_error(int(detail))
            return
        if kind == "redirect":
            handler.send_response(302)
            handler.send_header("Location", detail)
            handler.end_headers()
            return
        data = self.files.get(handler.path)
        if data is None:
            handler.send_error(404)
            return
        span = handler.headers.get("Range", "")
        start = int(span[6:-1]) if span and kind != "norange" else 0
        handler.send_response(206 if start else 200)
        if kind != "nolength":
            handler.send_header("Content-Length", str(len(data) - start))
        handler.end_headers()
        body = data[start:]
        if kind in ("cut", "nolength") and detail:
            body = body[: int(len(body) * float(detail))]
        handler.wfile.write(body)
        handler.wfile.flush()
        if kind == "stall":
            self.release.wait(10)


@pytest.fixture
def publisher(tmp_path, monkeypatch):
    shop = Publisher()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments) -> None: ...

        def do_GET(self) -> None:
            shop.answer(self)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        shop.url = f"http://127.0.0.1:{running.server_port}/w.pth"
        monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(download, "PAUSE", 0.01)
        yield shop
        shop.release.set()
        running.shutdown()
        thread.join()


def publish(monkeypatch, **fields) -> None:
    monkeypatch.setattr(loader, "entries_of", lambda model: [Weights(model="m", tag="t", **fields)])


def read() -> torch.Tensor:
    return loader.read_pretrained("m", allow_local=True)[0]["w"]


def kept(tmp_path) -> list[str]:
    return sorted(path.suffix for path in (tmp_path / "cache").glob("*"))


def test_r11_a_fetched_file_needs_no_network(publisher, tmp_path, monkeypatch):
    publish(monkeypatch, url=publisher.url)
    assert torch.equal(read(), torch.ones(5000))

    def no_network(*arguments, **named):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert torch.equal(read(), torch.ones(5000))
    assert publisher.asked == ["/w.pth"]
    assert kept(tmp_path) == [".lock", ".pth", ".sha256"]
    assert (tmp_path / "cache" / "m.t.pth").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("pinned", ["by the manifest", "at first use"])
def test_r06_every_flipped_bit_is_caught_and_a_good_copy_fetched_once(
    pinned, publisher, tmp_path, monkeypatch
):
    publish(monkeypatch, url=publisher.url, sha256=HASH if pinned == "by the manifest" else None)
    read()
    path = tmp_path / "cache" / "m.t.pth"
    chance = random.Random(0)
    for number in range(200):
        damaged = bytearray(DATA)
        bit = chance.randrange(8 * len(DATA))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged + b"x" if number == 199 else damaged)
        assert torch.equal(read(), torch.ones(5000))
    assert len(publisher.asked) == 201


def test_r06_damage_that_cannot_be_mended_is_refused_with_both_hashes(publisher, tmp_path, monkeypatch):
    publish(monkeypatch, url=publisher.url, sha256=HASH)
    read()
    (tmp_path / "cache" / "m.t.pth").write_bytes(file_of(2.0))
    publisher.files["/w.pth"] = file_of(3.0)
    with pytest.raises(zoo.IntegrityError, match=HASH[:12]):
        read()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = hashlib.sha256(file_of(2.0)).hexdigest()[:12]
    with pytest.raises(zoo.IntegrityError, match=f"{found}.*{HASH[:12]}.*offline"):
        read()


@pytest.mark.parametrize("fault", ["cut:0", "cut:0.5", "cut:0.999", "norange", "status:500", "status:503"])
def test_r07_a_connection_that_breaks_off_is_taken_up_again(fault, publisher, monkeypatch):
    publish(monkeypatch, url=publisher.url)
    publisher.faults = ["cut:0.5", fault]
    assert torch.equal(read(), torch.ones(5000))


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_r07_a_cut_that_nobody_announced_is_not_kept(share, publisher, tmp_path, monkeypatch):
    publish(monkeypatch, url=publisher.url)
    publisher.faults = [f"nolength:{share}"]
    with pytest.raises(zoo.IntegrityError):
        read()
    assert kept(tmp_path) == [".lock"]
    assert torch.equal(read(), torch.ones(5000))


def test_r07_a_size_in_the_manifest_finds_the_same_cut_while_it_can_be_mended(publisher, monkeypatch):
    publish(monkeypatch, url=publisher.url, size=len(DATA))
    publisher.faults = ["nolength:0.5"]
    assert torch.equal(read(), torch.ones(5000))
    assert len(publisher.asked) == 2


@pytest.mark.parametrize(
    ("faults", "message", "requests"),
    [
        (["status:403"], "127.0.0.1 .status 403", 1),
        (["status:404"], "127.0.0.1 .status 404", 1),
        (["status:500"] * 4, "status 500", 4),
        (["cut:0"] * 4, "0 of .* bytes came|IncompleteRead", 4),
        (["redirect:/w.pth"] * 9, "status 302 .* infinite loop.*; download it by hand", 5),
    ],
)
def test_r08_a_failure_tells_host_status_and_bytes_after_bounded_tries(
    faults, message, requests, publisher, tmp_path, monkeypatch
):
    publish(monkeypatch, url=publisher.url)
    publisher.faults = list(faults)
    with pytest.raises(zoo.ResourceError, match=message) as caught:
        read()
    assert "\n" not in str(caught.value)
    assert len(publisher.asked) == requests
    assert kept(tmp_path) == [".lock"]


def test_r08_a_connection_without_bytes_times_out(publisher, monkeypatch):
    publish(monkeypatch, url=publisher.url)
    monkeypatch.setattr(download, "STALL", 0.2)
    monkeypatch.setattr(download, "TRIES", 1)
    publisher.files["/w.pth"] = DATA

    def half(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(DATA)))
        handler.end_headers()
        handler.wfile.write(DATA[:100])
        handler.wfile.flush()
        publisher.release.wait(10)

    monkeypatch.setattr(publisher, "answer", half)
    with pytest.raises(zoo.ResourceError, match="no byte for 0.2 s"):
        read()


@pytest.mark.parametrize("fault", ["page", "hash", "code"])
def test_r08_bytes_that_are_not_the_weights_are_not_kept(fault, publisher, tmp_path, monkeypatch):
    if fault == "page":
        publisher.files["/w.pth"] = b"<!DOCTYPE html><html>sorry</html>"
    if fault == "code":
        publisher.files["/w.pth"] = pickle.dumps(Canary(str(tmp_path / "ran")))
    publish(monkeypatch, url=publisher.url, sha256="c" * 64 if fault == "hash" else None)
    with pytest.raises(zoo.IntegrityError) as caught:
        read()
    assert "\n" not in str(caught.value)
    assert kept(tmp_path) == [".lock"]
    assert not (tmp_path / "ran").exists()


class Canary:
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/w.pth",
        "file:///etc/passwd",
        "https://127.0.0.1/w.pth",
        "https://169.254.169.254/latest/meta-data",
        "https://[::1]/w.pth",
        "https://me:secret@example.org/w.pth",
    ],
)
def test_r14_addresses_that_no_manifest_may_name_are_refused_unasked(url, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    publish(monkeypatch, url=url)
    with pytest.raises(zoo.ConfigError, match="is refused"):
        loader.read_pretrained("m")


@pytest.mark.parametrize("where", ["file:///etc/passwd", "ftp://example.org/w", "https://me:pw@example.org/"])
def test_r14_a_redirect_to_such_an_address_is_refused_too(where, publisher, monkeypatch):
    publish(monkeypatch, url=publisher.url)
    publisher.faults = [f"redirect:{where}"]
    with pytest.raises(zoo.ZooError, match="is refused|status 302"):
        read()


def test_r14_redirects_are_followed_to_public_places_only(monkeypatch):
    handler = download._Redirects(allow_local=False)
    for url in ("http://example.org/w", "https://127.0.0.1/w", "https://10.0.0.1/w"):
        with pytest.raises(zoo.ConfigError, match="is refused"):
            handler.redirect_request(None, None, 302, "", {}, url)


def test_a_mirror_holds_files_by_their_name_in_the_cache(publisher, monkeypatch):
    publish(monkeypatch, url="https://example.invalid/other.pth", sha256=HASH)
    publisher.files["/mirror/m.t.pth"] = DATA
    monkeypatch.setenv("ZOO_MIRROR", publisher.url.replace("w.pth", "mirror/"))
    assert torch.equal(read(), torch.ones(5000))
    assert publisher.asked == ["/mirror/m.t.pth"]


def test_a_hub_entry_comes_through_the_hub_and_is_pinned(tmp_path, monkeypatch):
    asked = []

    def hub(repository, file, revision=None):
        asked.append((repository, file, revision))
        save_file({"w": torch.ones(3)}, tmp_path / "hub.safetensors")
        return str(tmp_path / "hub.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    publish(monkeypatch, hub="timm/davit_tiny.msft_in1k", revision="main")
    for _ in range(2):
        assert torch.equal(read(), torch.ones(3))
    assert asked == [("timm/davit_tiny.msft_in1k", "model.safetensors", "main")]
    assert kept(tmp_path) == [".lock", ".safetensors", ".sha256"]


def test_what_is_no_longer_published_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    publish(monkeypatch, url="https://example.org/w.pth", dead="the share was withdrawn")
    with pytest.raises(
        zoo.ResourceError, match="no longer published .the share was withdrawn.*checkpoint_path"
    ):
        loader.read_pretrained("m")


@pytest.mark.slow
def test_r09_four_processes_ask_once(publisher, tmp_path):
    code = (
        "import sys\n"
        "from zoo.weights import loader\n"
        "from zoo.weights.manifest import Weights\n"
        "loader.entries_of = lambda model: [Weights(model='m', tag='t', url=sys.argv[1])]\n"
        "print(int(loader.read_pretrained('m', allow_local=True)[0]['w'].sum()))\n"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, publisher.url], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert [process.communicate()[0].strip() for process in started] == ["5000"] * 4
    assert publisher.asked == ["/w.pth"]


def test_r10_a_killed_download_leaves_nothing_in_the_way(publisher, tmp_path, monkeypatch):
    entered = threading.Event()
    good = publisher.answer

    def slow(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(DATA)))
        handler.end_headers()
        handler.wfile.write(DATA[:1000])
        handler.wfile.flush()
        entered.set()
        publisher.release.wait(30)

    monkeypatch.setattr(publisher, "answer", slow)
    code = (
        "import sys\n"
        "from zoo.weights import loader\n"
        "from zoo.weights.manifest import Weights\n"
        "loader.entries_of = lambda model: [Weights(model='m', tag='t', url=sys.argv[1])]\n"
        "loader.read_pretrained('m', allow_local=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, publisher.url])
    assert entered.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    publisher.release.set()
    monkeypatch.setattr(publisher, "answer", good)
    publish(monkeypatch, url=publisher.url)
    assert torch.equal(read(), torch.ones(5000))
    assert kept(tmp_path) == [".lock", ".pth", ".sha256"]


def test_r11_a_cache_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "file" / "cache"))
    publish(monkeypatch, url="https://example.org/w.pth")
    with pytest.raises(zoo.ResourceError, match="set ZOO_CACHE"):
        loader.read_pretrained("m")


def test_r11_no_home_folder_names_the_variable(monkeypatch):
    monkeypatch.delenv("ZOO_CACHE", raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(zoo.ResourceError, match="set ZOO_CACHE"):
        download.cache_folder()


def test_r11_offline_a_file_put_where_the_message_says_is_used_and_recorded(publisher, tmp_path, monkeypatch):
    publish(monkeypatch, url=publisher.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(zoo.ResourceError, match="there is no .*m.t.pth; put the file there"):
        read()
    path = tmp_path / "cache" / "m.t.pth"
    path.write_bytes(b"<html>")
    with pytest.raises(zoo.IntegrityError, match="web page"):
        read()
    path.write_bytes(DATA)
    assert torch.equal(read(), torch.ones(5000))
    path.write_bytes(file_of(2.0))
    with pytest.raises(zoo.IntegrityError, match=HASH[:12]):
        read()
    assert publisher.asked == []


@pytest.mark.slow
def test_r11_offline_says_where_the_file_should_be(tmp_path):
    code = "import zoo; zoo.create_model('nat_mini', pretrained=True)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ZOO_CACHE": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "ResourceError: offline (HF_HUB_OFFLINE" in result.stderr.splitlines()[-1]


def test_r19_too_little_space_is_told_before_anything_is_written(publisher, tmp_path, monkeypatch):
    publish(monkeypatch, url=publisher.url)
    free = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: free)
    with pytest.raises(zoo.ResourceError, match="needs 0 MB .*0 MB are free"):
        read()
    assert kept(tmp_path) == [".lock"]


def test_r06_shipped_weights_that_were_damaged_are_refused(tmp_path, monkeypatch):
    (tmp_path / "w.safetensors").write_bytes(save({"w": torch.ones(3)}))
    monkeypatch.setattr("zoo.weights.manifest.FOLDER", tmp_path)
    publish(monkeypatch, file="w.safetensors", sha256="b" * 64)
    with pytest.raises(zoo.IntegrityError, match="damaged or was replaced.*bbbbbbbbbbbb"):
        loader.read_pretrained("m")


def test_models_and_tags_without_weights_say_so():
    with pytest.raises(zoo.ConfigError, match="unknown weights tag 'in1kk' of nat_mini.*did you mean in1k"):
        zoo.create_model("nat_mini", pretrained="in1kk")


# R01 to R05: nothing runs -----------------------------------------------------------------------------------

# Every public function that reads a file with weights in it. A new one that is missing here fails R01.
READERS = {
    "zoo.create_model": lambda path: zoo.create_model("nat_digits", checkpoint_path=path),
    "zoo.load_checkpoint": lambda path: zoo.load_checkpoint(zoo.create_model("nat_digits"), path),
    "zoo.evaluate": lambda path: zoo.evaluate(path, "digits"),
    "zoo.predict": lambda path: zoo.predict(path, "image.png"),
    "zoo.generate": lambda path: zoo.generate(path),
    "zoo.train": lambda path: zoo.train(
        zoo.recipe("classification/digits", [f"model.checkpoint={path}"]), run_dir=path.parent / "run"
    ),
    "zoo.train(resume)": lambda path: zoo.train("classification/digits", resume=path),
    "convert_checkpoint": lambda path: checkpoints.convert_checkpoint(
        path, "nat_digits", path.parent / "out.safetensors"
    ),
    "verify_weights": lambda path: checkpoints.verify_weights(path),
    "read_state_dict": loader.read_state_dict,
}
READS_NO_WEIGHTS = {
    "accelerate", "capture_attention", "list_models", "model_info", "recipe", "ops", "analysis", "diffusion",
    "ModelInfo", "ConfigError", "DataError", "IntegrityError", "ResourceError", "ZooError",
}  # fmt: skip


def hostile(form: str, folder: Path, canary: Path) -> Path:
    """A weights file of one of the usual forms with a call to os.mkdir in it."""
    content = {"state_dict": {"w": torch.ones(2)}, "args": Canary(str(canary))}
    suffix = {"legacy": "pth", "raw": "pth", "npz": "npz"}.get(form, form)
    path = folder / f"evil.{suffix}"
    if form == "npz":
        np.savez(path, w=np.array([Canary(str(canary))], dtype=object), allow_pickle=True)
    elif form in ("raw", "safetensors"):
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    return path


@pytest.mark.parametrize("form", ["pth", "pt", "ckpt", "bin", "legacy", "raw", "npz", "safetensors"])
@pytest.mark.parametrize("reader", READERS)
def test_r01_no_reader_runs_what_a_file_names(reader, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = hostile(form, tmp_path, tmp_path / "ran")
    try:
        verdict = READERS[reader](path)
    except zoo.ZooError as error:
        message = str(error)
    else:
        message = verdict.problem  # verify reports, it does not raise
    assert "evil" in message and len(message.splitlines()) == 1
    assert not (tmp_path / "ran").exists()


def test_r01_every_public_function_is_either_tried_or_reads_no_weights():
    tried = {name.partition("(")[0].removeprefix("zoo.") for name in READERS}
    assert set(zoo.__all__) - READS_NO_WEIGHTS <= tried
    functions = {
        name
        for name, value in vars(checkpoints).items()
        if callable(value) and getattr(value, "__module__", "") == checkpoints.__name__ and name[0] != "_"
    }
    assert functions - {"Verdict", "find_weights", "get_weights", "pin_weights"} <= tried


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["http", "file"])
@pytest.mark.parametrize("reader", READERS)
def test_r02_no_reader_takes_an_address_for_a_file(reader, scheme, publisher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = hostile("pth", tmp_path, tmp_path / "ran")
    publisher.files["/w.pth"] = path.read_bytes()
    url = publisher.url if scheme == "http" else path.as_uri()
    with pytest.raises((zoo.ZooError, OSError, AttributeError)):  # pathlib has no notion of it either
        READERS[reader](url)
    assert publisher.asked == []
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_r03_the_variable_that_switches_torchs_care_off_changes_nothing(tmp_path):
    paths = []
    for form in ("pth", "legacy", "raw"):
        (tmp_path / form).mkdir()
        paths.append(str(hostile(form, tmp_path / form, tmp_path / "ran")))
    code = f"""
import zoo
model = zoo.create_model("nat_digits")
for path in {paths}:
    try:
        zoo.load_checkpoint(model, path)
    except zoo.IntegrityError:
        print("refused")
"""
    environment = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["refused"] * 3
    assert not (tmp_path / "ran").exists()


def test_r05_a_refused_file_is_not_tried_another_way(tmp_path, monkeypatch):
    path = hostile("pth", tmp_path, tmp_path / "ran")
    asked = []
    real = torch.load

    def spy(*arguments, **named):
        asked.append(named.get("weights_only"))
        return real(*arguments, **named)

    monkeypatch.setattr(torch, "load", spy)
    with pytest.raises(zoo.IntegrityError):
        loader.read_state_dict(path)
    assert asked == [True]


# R12, R15 to R20: names, bombs, space -----------------------------------------------------------------------

HOSTILE = [
    "../up", "../../etc/passwd", "/etc/passwd", "a/../../b", "..", ".", "", "C:\\windows", "..\\up", "a\0b",
    "~/x", "//host/share", "\\\\host\\share", "file:///x", "a/b", "con:",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_r12_hostile_names_reach_neither_network_nor_disk(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    text = yaml.safe_dump({f"{name}.{name}": {"url": "https://example.org/w.pth"}})
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(zoo.IntegrityError):
        manifest.read_manifest(tmp_path / "m.yaml")
    for field in ("file", "hub") if name != "a/b" else ("file",):  # owner/name is what a hub id looks like
        text = yaml.safe_dump({"m.t": {field: name, "sha256": "a" * 64}})
        (tmp_path / f"{field}.yaml").write_text(text)
        with pytest.raises(zoo.IntegrityError):
            manifest.read_manifest(tmp_path / f"{field}.yaml")
    for ask in (zoo.create_model, checkpoints.get_weights):
        with pytest.raises(ValueError, match="unknown model|no published weights"):
            ask(name)
    assert not (tmp_path / "cache").exists()


@given(url=st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_r12_whatever_an_address_says_the_file_lies_in_the_cache(url):
    entry = Weights(model="m", tag="t", url="https://example.org/" + url)
    try:
        path = download.cached(entry)
    except ValueError:
        return
    assert path.parent == download.cache_folder()
    assert path.name.startswith("m.t.")


@pytest.mark.parametrize("kind", ["tar", "zip", "gz"])
def test_r15_archives_are_no_weights(kind, tmp_path):
    import gzip
    import tarfile
    import zipfile

    path = tmp_path / f"w.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            member = tarfile.TarInfo("../../escaped")
            archive.addfile(member, io.BytesIO(b""))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("../../escaped", "x")
    else:
        path.write_bytes(gzip.compress(DATA))
    with pytest.raises(zoo.IntegrityError, match=f"w.{kind}"):
        loader.read_state_dict(path)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


BOMBS = """
import resource, sys, io, zipfile, torch
from pathlib import Path
import zoo
from zoo.weights import loader
folder, kind = Path(sys.argv[1]), sys.argv[2]
path = folder / "bomb.pth"
if kind == "deflated":
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(1)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        with target.open("archive/data/9", "w", force_zip64=True) as member:
            for _ in range(96):
                member.write(bytes(1 << 22))
elif kind == "view":
    torch.save({"w": torch.zeros(1).expand(1 << 20, 1 << 20)}, path)
else:
    path = path.with_suffix(".safetensors")
    path.write_bytes((100_000_000).to_bytes(8, "little") + b"{" + b" " * 1000)
loader.read_state_dict  # everything is imported before the measurement
try:
    loader.read_state_dict(folder / "absent.pth")
except zoo.ConfigError:
    pass
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    loader.read_state_dict(path)
except zoo.IntegrityError as error:
    print(str(error))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message"),
    [("deflated", "compressed"), ("view", "claims more numbers"), ("header", "not a whole safetensors")],
)
def test_r16_bombs_are_refused_by_what_they_declare(kind, message, tmp_path):
    command = [sys.executable, "-c", BOMBS, str(tmp_path), kind]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    told, megabytes = result.stdout.splitlines()
    assert message in told
    assert int(megabytes) < 200


@pytest.mark.parametrize("change", ["extra", "missing", "renamed", "shape"])
def test_r17_a_file_that_does_not_fit_changes_nothing_in_the_model(change, tmp_path):
    model = zoo.create_model("nat_digits")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()}
    if change == "extra":
        state |= {f"extra.{i}": torch.zeros(1) for i in range(9)}
    else:
        value = state.pop("norm.weight")
        if change == "renamed":
            state["norm.gamma"] = value
        if change == "shape":
            state["norm.weight"] = torch.zeros(7)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(zoo.IntegrityError) as caught:
        zoo.load_checkpoint(model, tmp_path / "w.pth")
    told = str(caught.value)
    assert {
        "extra": "9 unexpected: extra.0, extra.1, extra.2, extra.3, extra.4, ...",
        "missing": "1 missing: norm.weight",
        "renamed": "1 missing: norm.weight; 1 unexpected: norm.gamma",
        "shape": "norm.weight [7] instead of [96]",
    }[change] in told
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_r17_another_precision_is_taken_over_as_the_models_own(tmp_path):
    model = zoo.create_model("nat_digits")
    torch.save({key: value.half() for key, value in model.state_dict().items()}, tmp_path / "w.pth")
    zoo.load_checkpoint(model, tmp_path / "w.pth")
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["convert", "checkpoint"])
def test_r19_a_full_disk_keeps_the_previous_file(writer, tmp_path):
    code = """
import resource, sys
from pathlib import Path
import torch, zoo
from zoo import checkpoints
from zoo.recipes.files import save_checkpoint
folder, writer = Path(sys.argv[1]), sys.argv[2]
torch.save(zoo.create_model("nat_digits").state_dict(), folder / "w.pth")
save_checkpoint({"recipe": {}, "w": torch.zeros(10)}, folder / "last.ckpt")
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    if writer == "convert":
        checkpoints.convert_checkpoint(folder / "w.pth", "nat_digits", folder / "out.safetensors")
    else:
        save_checkpoint({"recipe": {}, "w": torch.zeros(100_000)}, folder / "last.ckpt")
except zoo.ResourceError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(tmp_path), writer]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "the disk is full" in result.stdout and "MB free" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "w.pth"]
    with (tmp_path / "last.ckpt").open("rb") as file:
        assert torch.equal(loader.unpickle(file)["w"], torch.zeros(10))


def test_r20_files_have_the_usual_mode_keep_theirs_and_go_where_a_link_points(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    path = tmp_path / "link" / "w.bin"
    write_atomically(path, lambda file: file.write(b"1"))
    assert (real / "w.bin").stat().st_mode & 0o777 == 0o666 & ~umask()
    (real / "w.bin").chmod(0o640)
    (tmp_path / "alias.bin").symlink_to(real / "w.bin")
    write_atomically(tmp_path / "alias.bin", lambda file: file.write(b"2"))
    assert (tmp_path / "alias.bin").is_symlink()
    assert (real / "w.bin").read_bytes() == b"2"
    assert (real / "w.bin").stat().st_mode & 0o777 == 0o640
