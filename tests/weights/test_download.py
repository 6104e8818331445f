"""Downloads: whole or not there, verified, once for however many ask, and only from where they may come."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

import zoo
from zoo.weights import download, loader
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


def test_a_file_is_fetched_once_pinned_and_read_without_the_network_from_then_on(
    publisher, tmp_path, monkeypatch
):
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
def test_every_damage_in_the_cache_is_caught_and_a_good_copy_fetched_once(
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


def test_damage_that_the_network_cannot_mend_is_refused_with_both_hashes(publisher, tmp_path, monkeypatch):
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
def test_a_connection_that_breaks_off_is_taken_up_again(fault, publisher, monkeypatch):
    publish(monkeypatch, url=publisher.url)
    publisher.faults = ["cut:0.5", fault]
    assert torch.equal(read(), torch.ones(5000))


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_cut_that_nobody_announced_is_not_kept(share, publisher, tmp_path, monkeypatch):
    publish(monkeypatch, url=publisher.url)
    publisher.faults = [f"nolength:{share}"]
    with pytest.raises(zoo.IntegrityError):
        read()
    assert kept(tmp_path) == [".lock"]
    assert torch.equal(read(), torch.ones(5000))


def test_a_size_in_the_manifest_finds_the_same_cut_while_it_can_be_mended(publisher, monkeypatch):
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
    ],
)
def test_a_failure_tells_host_status_and_bytes_after_bounded_tries(
    faults, message, requests, publisher, tmp_path, monkeypatch
):
    publish(monkeypatch, url=publisher.url)
    publisher.faults = list(faults)
    with pytest.raises(zoo.ResourceError, match=message) as caught:
        read()
    assert "\n" not in str(caught.value)
    assert len(publisher.asked) == requests
    assert kept(tmp_path) == [".lock"]


def test_a_connection_without_bytes_times_out(publisher, monkeypatch):
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
def test_bytes_that_are_not_the_weights_are_not_kept(fault, publisher, tmp_path, monkeypatch):
    if fault == "page":
        publisher.files["/w.pth"] = b"<!DOCTYPE html><html>sorry</html>"
    if fault == "code":
        import pickle

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
def test_addresses_that_no_manifest_may_name_are_refused_unasked(url, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    publish(monkeypatch, url=url)
    with pytest.raises(zoo.ConfigError, match="is refused"):
        loader.read_pretrained("m")


@pytest.mark.parametrize("where", ["file:///etc/passwd", "ftp://example.org/w", "https://me:pw@example.org/"])
def test_a_redirect_to_such_an_address_is_refused_too(where, publisher, monkeypatch):
    publish(monkeypatch, url=publisher.url)
    publisher.faults = [f"redirect:{where}"]
    with pytest.raises(zoo.ZooError, match="is refused|status 302"):
        read()


def test_redirects_are_followed_to_public_places_only(monkeypatch):
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


def test_four_processes_ask_once(publisher, tmp_path):
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


def test_a_killed_download_leaves_nothing_in_the_way(publisher, tmp_path, monkeypatch):
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


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "file" / "cache"))
    publish(monkeypatch, url="https://example.org/w.pth")
    with pytest.raises(zoo.ResourceError, match="set ZOO_CACHE"):
        loader.read_pretrained("m")


def test_no_home_folder_names_the_variable(monkeypatch):
    monkeypatch.delenv("ZOO_CACHE", raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(zoo.ResourceError, match="set ZOO_CACHE"):
        download.cache_folder()


def test_offline_says_where_the_file_should_be(tmp_path):
    code = "import zoo; zoo.create_model('nat_mini', pretrained=True)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ZOO_CACHE": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "ResourceError: offline (HF_HUB_OFFLINE" in result.stderr.splitlines()[-1]


def test_too_little_space_is_told_before_anything_is_written(publisher, tmp_path, monkeypatch):
    publish(monkeypatch, url=publisher.url)
    free = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: free)
    with pytest.raises(zoo.ResourceError, match="needs 0 MB .*0 MB are free"):
        read()
    assert kept(tmp_path) == [".lock"]


def test_shipped_weights_that_were_damaged_are_refused(tmp_path, monkeypatch):
    (tmp_path / "w.safetensors").write_bytes(save({"w": torch.ones(3)}))
    monkeypatch.setattr("zoo.weights.manifest.FOLDER", tmp_path)
    publish(monkeypatch, file="w.safetensors", sha256="b" * 64)
    with pytest.raises(zoo.IntegrityError, match="damaged or was replaced.*bbbbbbbbbbbb"):
        loader.read_pretrained("m")


def test_models_and_tags_without_weights_say_so():
    with pytest.raises(zoo.ConfigError, match="unknown weights tag 'in1kk' of nat_mini.*did you mean in1k"):
        zoo.create_model("nat_mini", pretrained="in1kk")
