"""Manifests: which published weights there are for a model, where they lie, and what is known of them.

A manifest is a YAML mapping of `<model>.<tag>` to the fields of `Weights`. It holds facts only: what is not
known is left out, never made up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from zoo.errors import IntegrityError, did_you_mean

FOLDER = Path(__file__).resolve().parent
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
MAX_BYTES = 1 << 20
MAX_DEPTH = 20


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One entry of a manifest: where a weights file is, what it holds, and what was published of it."""

    model: str
    tag: str
    url: str | None = None
    hub: str | None = None  # owner/name, or owner/name/file, on the Hugging Face hub
    revision: str | None = None  # of the hub; None: its main branch
    file: str | None = None  # inside this package
    dead: str | None = None  # why the url answers no more; then only a file of the user's helps
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

    @property
    def where(self) -> str:
        """Where the file comes from, in one word for a message or a table."""
        if self.file:
            return "in the package"
        return f"hub {self.hub}" if self.hub else str(urlsplit(self.url or "").hostname)

    def summary(self) -> dict[str, Any]:
        """The entry as plain values."""
        return {
            f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) not in (None, {})
        }


def entries_of(model: str) -> list[Weights]:
    """The weights that are known for a model, the default first."""
    return [entry for entry in all_entries() if entry.model == model]


def all_entries() -> list[Weights]:
    """The weights that are known for all models."""
    return [entry for manifest in manifests() for entry in read_manifest(manifest)]


def manifests() -> list[Path]:
    """Every manifest of the package."""
    return sorted(FOLDER.glob("*.yaml"))


@lru_cache(maxsize=64)
def read_manifest(path: Path) -> tuple[Weights, ...]:
    """Read a manifest.

    Raises: IntegrityError naming the file, the entry and the field that is wrong.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        _refuse_size_and_depth(path)
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OmegaConfBaseException, YAMLError, OSError, ValueError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise IntegrityError(f"{path} is not a manifest: {reason}") from error
    if not isinstance(content, dict) or not content:
        kind = type(content).__name__ if content else "nothing"
        raise IntegrityError(f"{path} must be a mapping of <model>.<tag> to fields, found {kind}")
    return tuple(_entry(path, key, value) for key, value in content.items())


def _refuse_size_and_depth(path: Path) -> None:
    import yaml

    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
    depth = 0
    # By events, which need no stack of their own, however deep the file is nested.
    for event in yaml.parse(path.read_text("utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def _entry(path: Path, key: object, value: object) -> Weights:
    where = f"{path}, entry {key}"
    name, dot, tag = str(key).partition(".")
    if not dot or not isinstance(value, dict):
        raise IntegrityError(f"{where}: must be named <model>.<tag> and hold fields")
    if not re.fullmatch(r"\w[\w-]*", name) or not re.fullmatch(r"\w[\w.-]*", tag):
        raise IntegrityError(f"{where}: names have letters, digits, _ and - only")
    allowed = {f.name for f in fields(Weights)} - {"model", "tag"}
    for given in value:
        if given not in allowed:
            raise IntegrityError(f"{where}: unknown field {given!r}{did_you_mean(str(given), allowed)}")
    for text in ("url", "hub", "revision", "file", "dead", "license", "source", "sha256"):
        if value.get(text) is not None and not isinstance(value[text], str):
            raise IntegrityError(f"{where}: {text} must be a text, found {value[text]!r}")
    for group in ("input", "metric", "measured"):
        if value.get(group) is not None and not _is_plain(value[group]):
            raise IntegrityError(f"{where}: {group} must be a mapping of plain finite values")
    sha256, url, hub, file = (value.get(k) for k in ("sha256", "url", "hub", "file"))
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise IntegrityError(f"{where}: sha256 must be 64 hexadecimal digits in lower case, found {sha256!r}")
    if sum(place is not None for place in (url, hub, file)) != 1:
        raise IntegrityError(f"{where}: needs exactly one of url, hub or file")
    if url is not None:
        _check_url(where, url)
    if hub is not None and not _is_hub_id(hub):
        raise IntegrityError(f"{where}: hub must be owner/name or owner/name/file{SUFFIXES}, found {hub!r}")
    if value.get("revision") is not None and (hub is None or not re.fullmatch(r"[\w.-]+", value["revision"])):
        raise IntegrityError(f"{where}: revision belongs to a hub entry and is a branch, tag or commit")
    if value.get("dead") is not None and url is None:
        raise IntegrityError(f"{where}: dead belongs to an entry with a url")
    if file is not None and (not re.fullmatch(r"[\w-]+\.safetensors", file) or sha256 is None):
        raise IntegrityError(f"{where}: file must be a .safetensors beside the manifest, with its sha256")
    size = value.get("size")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size <= 0):
        raise IntegrityError(f"{where}: size must be a positive number of bytes, found {size!r}")
    return Weights(model=name, tag=tag, **value)


def _check_url(where: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        port_is_a_number = parts.port is None or parts.port > 0
    except ValueError:
        port_is_a_number = False
    if (
        not port_is_a_number
        or parts.scheme != "https"
        or not parts.hostname
        or parts.username
        or parts.password
        or re.search(r"[\x00-\x20\x7f\\]", url)
    ):
        raise IntegrityError(f"{where}: url must be https without a user name, found {url!r}")


def _is_hub_id(hub: str) -> bool:
    parts = PurePosixPath(hub).parts
    sound = all(re.fullmatch(r"\w[\w.-]*", part) and ".." not in part for part in parts)
    return sound and hub == "/".join(parts) and (len(parts) == 2 or hub.endswith(SUFFIXES))


def _is_plain(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return all(
        isinstance(each, str | int | bool)
        or (isinstance(each, float) and each - each == 0)  # neither infinite nor NaN
        or (isinstance(each, list) and all(isinstance(part, str | int | float) for part in each))
        for each in value.values()
    )
