"""The one place that reads weights: files, manifests, downloads.

Nothing here can run code from a file: safetensors holds numbers only, and everything else goes through
torch's weights-only reader, without a second try; settings that training scripts pickle beside the weights
are read into stand-ins that do nothing. A file named in a manifest is verified by its sha256, and
the bytes that were verified are the bytes that are read.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from zoo.errors import ConfigError, IntegrityError, ResourceError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = Path(__file__).resolve().parent
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # averaged weights first


class _Settings:
    """Stands for a class of named settings: torch's reader fills an ordered dictionary in its place."""

    def __new__(cls, *arguments: object) -> OrderedDict[str, object]:
        return OrderedDict()


class _Ignored:
    """Stands for what builds a numpy number, such as the accuracy so far; keeps nothing."""

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


# What published training checkpoints pickle beside their weights. None of the real classes is imported.
STAND_INS = [
    (_Settings, "yacs.config.CfgNode"),
    (_Settings, "argparse.Namespace"),
    (_Ignored, "numpy.core.multiarray.scalar"),
    (_Ignored, "numpy._core.multiarray.scalar"),
    (_Ignored, "numpy.dtype"),
]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One entry of a manifest: where a weights file is, what it holds, and what was published of it."""

    model: str
    tag: str
    url: str | None = None
    file: str | None = None  # inside this package
    sha256: str | None = None  # None where upstream publishes none: recorded at first use
    size: int | None = None  # bytes
    license: str | None = None
    source: str | None = None
    input: Mapping[str, Any] = field(default_factory=dict)  # what differs from the model's own settings
    metric: Mapping[str, Any] | None = None  # published figures
    measured: Mapping[str, Any] | None = None  # ours, and how

    @property
    def packaged(self) -> Path | None:
        """The file inside the package, if the entry has one."""
        return FOLDER / self.file if self.file else None

    def summary(self) -> dict[str, Any]:
        """The entry as plain values."""
        return {
            f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) not in (None, {})
        }


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a file, whatever their wrapper, as parameter name to tensor.

    Raises: ConfigError for a path that is no file; IntegrityError for a file that is damaged, is not a
    weights file, or would run code.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name the weights file inside it")
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise ConfigError(f"no weights file {path}{did_you_mean(path.name, near)}")
    return _parse(path.read_bytes(), str(path))


def read_pretrained(model: str, tag: str | None = None) -> tuple[dict[str, Tensor], str]:
    """Read a model's published weights from the package, the cache or the network, verified; and say from
    where.

    Raises: ConfigError for a model or tag without weights; IntegrityError for a wrong hash; ResourceError
    when the file cannot be had.
    """
    found = entries_of(model)
    tags = [entry.tag for entry in found]
    if not found:
        raise ConfigError(f"no published weights are known for {model}; pass a file as checkpoint_path")
    if tag is not None and tag not in tags:
        near = did_you_mean(tag, tags)
        raise ConfigError(f"unknown weights tag {tag!r} of {model}; use {', '.join(tags)}{near}")
    entry = found[tags.index(tag) if tag is not None else 0]
    path = entry.packaged or _download(entry)
    data = path.read_bytes()
    pinned = entry.sha256 or _pin(path).read_text().strip()
    actual = hashlib.sha256(data).hexdigest()
    if actual != pinned:
        raise IntegrityError(
            f"{path} is damaged or was replaced: sha256 {actual[:12]}... found, {pinned[:12]}... expected; "
            "delete it to fetch it again"
        )
    return _parse(data, str(path)), str(path)


def _parse(data: bytes, name: str) -> dict[str, Tensor]:
    import safetensors
    import safetensors.torch
    import torch

    if not data:
        raise IntegrityError(f"{name} is empty; fetch it again")
    if data.lstrip()[:1] == b"<":
        raise IntegrityError(f"{name} is a web page, not a weights file; fetch it again")
    if name.endswith(".safetensors"):
        try:
            return safetensors.torch.load(data)
        except safetensors.SafetensorError as error:
            reason = f"is not a whole safetensors file ({error})"
            raise IntegrityError(f"{name} {reason}; fetch it again") from error
    try:
        with torch.serialization.safe_globals(STAND_INS):
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises any of nine types, some without a text
        raise IntegrityError(_why_unreadable(data, name, error)) from error
    return _unwrap(content, name)


def _why_unreadable(data: bytes, name: str, error: Exception) -> str:
    import torch

    try:
        with torch.serialization.safe_globals(STAND_INS):
            unsafe = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)))
    except Exception:  # not a zip file, or too damaged to look into
        unsafe = re.findall(r"(?:GLOBAL |Unsupported global: GLOBAL )([\w.]+)", str(error))
    if unsafe:
        return (
            f"{name} holds more than weights ({', '.join(unsafe[:3])}), which could run code when read; "
            "ask for a file with the state dict alone"
        )
    reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
    return f"{name} is not a readable weights file ({reason}); it may be cut off: fetch it again"


def _unwrap(content: Any, name: str) -> dict[str, Tensor]:
    """Find the state dict in what training scripts save around it."""
    import torch

    for _ in range(3):
        wrapped = content if isinstance(content, dict) else {}
        inner = next((wrapped[key] for key in WRAPPERS if isinstance(wrapped.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    values = content.values() if isinstance(content, dict) else ()
    if not any(isinstance(value, torch.Tensor) for value in values):
        kind = f"keys {', '.join(map(str, list(content)[:5]))}" if values else type(content).__name__
        raise IntegrityError(f"{name} holds no state dict (found {kind}); looked under {', '.join(WRAPPERS)}")
    state = {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


# Manifests -------------------------------------------------------------------------------------------------


def entries_of(model: str) -> list[Weights]:
    """The weights that are known for a model, the default first."""
    return [entry for manifest in manifests() for entry in read_manifest(manifest) if entry.model == model]


def manifests() -> list[Path]:
    """Every manifest of the package."""
    return sorted(FOLDER.glob("*.yaml"))


@lru_cache(maxsize=64)
def read_manifest(path: Path) -> tuple[Weights, ...]:
    """Read a manifest: a YAML mapping of `<model>.<tag>` to the fields of `Weights`.

    Raises: IntegrityError naming the file, the entry and the field that is wrong.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OmegaConfBaseException, YAMLError, OSError, ValueError, AssertionError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise IntegrityError(f"{path} is not a manifest: {reason}") from error
    if not isinstance(content, dict) or not content:
        kind = type(content).__name__ if content else "nothing"
        raise IntegrityError(f"{path} must be a mapping of <model>.<tag> to fields, found {kind}")
    return tuple(_entry(path, key, value) for key, value in content.items())


def _entry(path: Path, key: object, value: object) -> Weights:
    where = f"{path}, entry {key}"
    name, dot, tag = str(key).partition(".")
    if not dot or not isinstance(value, dict):
        raise IntegrityError(f"{where}: must be named <model>.<tag> and hold fields")
    allowed = {f.name for f in fields(Weights)} - {"model", "tag"}
    for given in value:
        if given not in allowed:
            raise IntegrityError(f"{where}: unknown field {given!r}{did_you_mean(str(given), allowed)}")
    sha256, url, file = value.get("sha256"), value.get("url"), value.get("file")
    if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256)):
        raise IntegrityError(f"{where}: sha256 must be 64 hexadecimal digits in lower case, found {sha256!r}")
    if (url is None) == (file is None):
        raise IntegrityError(f"{where}: needs either url or file")
    if url is not None:
        parts = urlsplit(str(url))
        if parts.scheme != "https" or not parts.hostname or parts.username or parts.password:
            raise IntegrityError(f"{where}: url must be https without a user name, found {url!r}")
    if file is not None and (not re.fullmatch(r"[\w-]+\.safetensors", str(file)) or sha256 is None):
        raise IntegrityError(f"{where}: file must be a .safetensors beside the manifest, with its sha256")
    size = value.get("size")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size <= 0):
        raise IntegrityError(f"{where}: size must be a positive number of bytes, found {size!r}")
    return Weights(model=name, tag=tag, **value)


# Downloads -------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where downloaded weights are kept: `ZOO_CACHE`, or attnzoo in the user's cache folder."""
    base = os.environ.get("ZOO_CACHE")
    if base:
        return Path(base).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "attnzoo"


def _pin(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _download(entry: Weights) -> Path:
    """Fetch an entry's file once, however many processes ask, and record its hash."""
    from filelock import FileLock
    from huggingface_hub import constants
    from huggingface_hub.file_download import http_get

    name = f"{entry.model}.{entry.tag}{Path(urlsplit(entry.url).path).suffix or '.pth'}"
    path = cache_folder() / name
    host = urlsplit(entry.url).hostname
    retries = logging.getLogger("huggingface_hub.file_download")
    level = retries.level
    try:
        retries.setLevel(logging.ERROR)  # what becomes of its retries is told below, in one line
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.is_file() and (entry.sha256 or _pin(path).is_file()):
                return path
            if constants.HF_HUB_OFFLINE:
                raise ResourceError(
                    f"offline (HF_HUB_OFFLINE is set) and there is no {path}; put the file there"
                )
            part = path.with_name(f"{name}.{os.getpid()}.part")
            try:
                with part.open("wb") as stream:
                    http_get(entry.url, stream, expected_size=entry.size)
                    stream.flush()
                    os.fsync(stream.fileno())
                found = hashlib.sha256(part.read_bytes()).hexdigest()
                if entry.sha256 and found != entry.sha256:
                    raise IntegrityError(
                        f"{host} sent {found[:12]}... instead of {entry.sha256[:12]}... for {name}; not kept"
                    )
                _parse(part.read_bytes(), str(path))  # a web page or a cut file is not worth keeping
                _pin(path).write_text(f"{found}\n")
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(
            f"cannot fetch {name} from {host} ({type(error).__name__}: {str(error).splitlines()[0][:120]}); "
            f"download it by hand and pass checkpoint_path, or set ZOO_CACHE to a folder that can be written"
        ) from error
    except (IntegrityError, ResourceError):
        raise
    except Exception as error:  # the HTTP library's own exceptions
        raise ResourceError(
            f"cannot fetch {name} from {host} ({type(error).__name__}); "
            "download it by hand and pass checkpoint_path"
        ) from error
    finally:
        retries.setLevel(level)
    return path
