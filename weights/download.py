"""Fetching a weights file once, whole, from where its manifest says and from nowhere else."""

from __future__ import annotations

import hashlib
import io
import ipaddress
import logging
import os
import shutil
import socket
import time
import urllib.error
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from zoo.errors import ConfigError, IntegrityError, ResourceError
from zoo.weights.files import FULL, write_atomically
from zoo.weights.manifest import SUFFIXES, Weights

log = logging.getLogger("zoo")

STALL = 30.0  # seconds without a byte before a connection counts as dead
TRIES = 4
PAUSE = 1.0  # seconds before the second try, doubled for each further one
CHUNK = 1 << 20
TRUE = ("1", "on", "yes", "true")


def cache_folder() -> Path:
    """Where downloaded weights are kept: `ZOO_CACHE`, or attnzoo in the user's cache folder."""
    base = os.environ.get("ZOO_CACHE")
    if base:
        return Path(base).expanduser()
    try:
        default = Path.home() / ".cache"
    except RuntimeError:
        raise ResourceError(
            "there is no home folder to keep weights in; set ZOO_CACHE to a folder that can be written"
        ) from None
    return Path(os.environ.get("XDG_CACHE_HOME") or default).expanduser() / "attnzoo"


def is_offline() -> bool:
    """Tell whether the user forbids the network by HF_HUB_OFFLINE or ZOO_OFFLINE."""
    return any(os.environ.get(name, "").lower() in TRUE for name in ("HF_HUB_OFFLINE", "ZOO_OFFLINE"))


def cached(entry: Weights) -> Path:
    """Where the file of an entry is, or will be."""
    suffix = Path(urlsplit(entry.url or "").path).suffix or Path(entry.hub or "").suffix
    if entry.hub and suffix not in SUFFIXES:
        suffix = ".safetensors"
    return cache_folder() / f"{entry.model}.{entry.tag}{suffix if suffix in SUFFIXES else '.pth'}"


def pin_of(entry: Weights) -> Path:
    """The file beside it that holds its sha256, where the manifest has none."""
    path = cached(entry)
    return path.with_name(f"{path.name}.sha256")


def expected_hash(entry: Weights) -> str | None:
    """The sha256 that the file must have: the manifest's, else the one recorded when it was first fetched."""
    if entry.sha256:
        return entry.sha256
    with suppress(OSError, UnicodeDecodeError):
        recorded = pin_of(entry).read_text("ascii").strip()
        if len(recorded) == 64:
            return recorded
    return None


def fetch(entry: Weights, check, *, allow_local: bool = False) -> bytes:
    """Return the verified bytes of an entry's file, from the cache or else from the network.

    One process fetches, however many ask. `check(data)` must raise for bytes that are no weights; such a file
    is not kept. A damaged copy in the cache is fetched again, once. `allow_local` admits http and private
    addresses, for tests. Raises: IntegrityError for bytes with another hash; ResourceError when the file
    cannot be had.
    """
    path = cached(entry)
    found = _from_cache(entry, path)
    if found is not None and hashlib.sha256(found).hexdigest() == expected_hash(entry):
        return found
    from filelock import FileLock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            return _fetch_locked(entry, path, check, allow_local)
    except OSError as error:
        full = error.errno in FULL
        what = "the disk is full" if full else error.strerror or type(error).__name__
        raise ResourceError(
            f"cannot keep {path.name} in {path.parent} ({what}); set ZOO_CACHE to another folder "
            "that can be written"
        ) from error


def _from_cache(entry: Weights, path: Path) -> bytes | None:
    try:
        return path.read_bytes() if expected_hash(entry) else None
    except OSError:
        return None


def _fetch_locked(entry: Weights, path: Path, check, allow_local: bool) -> bytes:
    wanted = expected_hash(entry)
    data = _from_cache(entry, path)
    damaged = None
    if data is not None:
        actual = hashlib.sha256(data).hexdigest()
        if actual == wanted:
            return data  # another process fetched it meanwhile
        damaged = (
            f"{path} is damaged or was replaced: sha256 {actual[:12]}... found, {wanted[:12]}... expected"
        )
        log.warning("%s; fetching it again", damaged)
    if entry.dead:
        raise ResourceError(
            f"{entry.model}.{entry.tag} is no longer published ({entry.dead}); "
            "pass a file you have as checkpoint_path"
        )
    # Offline, a file that nobody has recorded was put there by hand, as the message asks for: its first use.
    by_hand = wanted is None and is_offline() and path.is_file()
    try:
        data = path.read_bytes() if by_hand else _from_network(entry, path, allow_local)
    except ResourceError as error:
        if damaged:
            raise IntegrityError(f"{damaged}, and a new copy cannot be had: {error}") from error
        raise
    actual = hashlib.sha256(data).hexdigest()
    if wanted is not None and actual != wanted:
        raise IntegrityError(
            f"{entry.where} sent {path.name} with sha256 {actual[:12]}..., "
            f"{wanted[:12]}... expected; not kept"
        )
    check(data)
    if entry.sha256 is None:
        write_atomically(pin_of(entry), lambda file: file.write(f"{actual}\n".encode()))
    if not by_hand:
        write_atomically(path, lambda file: file.write(data))
    return data


def _from_network(entry: Weights, path: Path, allow_local: bool) -> bytes:
    if is_offline():
        raise ResourceError(
            f"offline (HF_HUB_OFFLINE or ZOO_OFFLINE is set) and there is no {path}; put the file there"
        )
    mirror = os.environ.get("ZOO_MIRROR")
    if entry.hub and not mirror:
        return _from_hub(entry)
    url = f"{mirror.rstrip('/')}/{path.name}" if mirror else entry.url
    _refuse_address(url, allow_local)
    return _download(url, entry, path, allow_local)


def _from_hub(entry: Weights) -> bytes:
    from huggingface_hub import hf_hub_download

    owner, name, *inside = entry.hub.split("/")
    try:
        file = hf_hub_download(
            f"{owner}/{name}", "/".join(inside) or "model.safetensors", revision=entry.revision
        )
        return Path(file).read_bytes()
    except Exception as error:  # the hub's own exceptions, and those of the HTTP library under it
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ResourceError(
            f"cannot fetch {entry.model}.{entry.tag} from {entry.where} ({reason}); "
            "download it by hand and pass checkpoint_path, in a recipe model.checkpoint"
        ) from error


def _download(url: str, entry: Weights, path: Path, allow_local: bool) -> bytes:
    """Read `url` into memory, going on where a connection broke off; bounded tries."""
    stream = io.BytesIO()
    opener = urllib.request.build_opener(_Redirects(allow_local))
    opener.addheaders = [("User-Agent", "attnzoo")]
    host = urlsplit(url).hostname
    reason = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            total = _read_into(opener, url, stream, entry, path)
            if total is None or stream.tell() == total:
                return stream.getvalue()
            reason = f"{stream.tell():,} of {total:,} bytes came"
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"status {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 416, 429):
                break
            if error.code == 416:  # what came so far is not a beginning of the file any more
                stream = io.BytesIO()
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            cause = getattr(error, "reason", error)
            if isinstance(cause, ConfigError):
                raise cause from None
            stalled = isinstance(cause, TimeoutError)
            reason = f"no byte for {STALL:g} s" if stalled else str(cause) or type(cause).__name__
            reason += f", {stream.tell():,} bytes came" if stream.tell() else ""
    reason = " ".join(reason.split())  # a server's own words may be lines
    raise ResourceError(
        f"cannot fetch {path.name} from {host} ({reason}); "
        "download it by hand and pass checkpoint_path, in a recipe model.checkpoint"
    )


def _read_into(
    opener: urllib.request.OpenerDirector, url: str, stream: io.BytesIO, entry: Weights, path: Path
) -> int | None:
    """Append what one connection gives; return how long the whole file is, None where nobody says."""
    have = stream.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with opener.open(request, timeout=STALL) as answer:
        if have and answer.status != 206:  # the server begins at the beginning again
            stream.seek(0)
            stream.truncate(0)
            have = 0
        length = answer.headers.get("Content-Length", "")
        total = have + int(length) if length.isdigit() else entry.size
        free = shutil.disk_usage(path.parent).free
        if (total or 0) > free:
            raise ResourceError(
                f"{path.name} needs {total / 1e6:,.0f} MB in {path.parent}, {free / 1e6:,.0f} MB are free; "
                "free some space or set ZOO_CACHE"
            )
        while chunk := answer.read(CHUNK):
            stream.write(chunk)
            if entry.size is not None and stream.tell() > entry.size:
                raise ResourceError(
                    f"{urlsplit(url).hostname} sends more than the {entry.size:,} bytes of {path.name}"
                )
    return total if total is not None else entry.size


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to where a manifest could have pointed itself."""

    def __init__(self, allow_local: bool) -> None:
        self.allow_local = allow_local

    def redirect_request(self, request, stream, code, message, headers, url):  # noqa: ANN001, ANN202
        _refuse_address(url, self.allow_local)
        return super().redirect_request(request, stream, code, message, headers, url)


def _refuse_address(url: str, allow_local: bool) -> None:
    """Raise ConfigError for anything but https to a public address, where no test has asked for more."""
    parts = urlsplit(url)
    if allow_local and parts.scheme == "http" and parts.hostname:
        return
    if parts.scheme != "https" or not parts.hostname or parts.username or parts.password:
        raise ConfigError(f"{url!r} is refused: weights come over https, without a user name in the address")
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(parts.hostname, parts.port or 443)}
    except OSError:
        return  # unknown here; a proxy may know it, or the connection will say so
    private = [each for each in addresses if not ipaddress.ip_address(each.split("%")[0]).is_global]
    if private and not allow_local:
        raise ConfigError(f"{url!r} is refused: {parts.hostname} is the private address {private[0]}")
