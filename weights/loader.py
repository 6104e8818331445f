"""The one place that reads weights files.

Nothing here can run code from a file: safetensors holds numbers only, and everything else goes through
torch's weights-only reader, without a second try; settings that training scripts pickle beside the weights
are read into stand-ins that do nothing. A file named in a manifest is verified by its sha256, and
the bytes that were verified are the bytes that are read.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections import OrderedDict
from os import PathLike
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from zoo.errors import ConfigError, IntegrityError, did_you_mean
from zoo.weights.download import cached, fetch
from zoo.weights.manifest import Weights, entries_of

if TYPE_CHECKING:
    from torch import Tensor

# Averaged weights first.
WRAPPERS = ("state_dict_ema", "model_ema", "params_ema", "ema")
WRAPPERS += ("state_dict", "model", "model_state_dict", "net", "module", "params")
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile, Lightning and timm
MARGIN = 64 << 20  # bytes that tensors may claim beyond four times their file, for tied and expanded ones


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


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a file, whatever their wrapper, as parameter name to tensor.

    Raises: ConfigError for a path that is no file; IntegrityError for a file that is damaged, is not a
    weights file, or would run code.
    """
    if not isinstance(path, str | PathLike):
        raise ConfigError(f"a weights file is named by its path, found {path!r}")
    path = Path(path).expanduser()
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name the weights file inside it")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is a pipe or device, not a file")
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise ConfigError(f"no weights file {path}{did_you_mean(path.name, near)}")
    return _parse(path.read_bytes(), str(path))


def read_pretrained(
    model: str, tag: str | None = None, *, allow_local: bool = False
) -> tuple[dict[str, Tensor], str]:
    """Read a model's published weights from the package, the cache or the network, verified; and say from
    where.

    `allow_local` admits http and private addresses, for tests. Raises: ConfigError for a model or tag without
    weights; IntegrityError for a wrong hash; ResourceError when the file cannot be had.
    """
    entry = find_entry(model, tag)
    if entry.packaged is None:
        path = cached(entry)
        data = fetch(entry, lambda content: _parse(content, str(path)), allow_local=allow_local)
        return _parse(data, str(path)), str(path)
    path = entry.packaged
    data = path.read_bytes()
    actual = hashlib.sha256(data).hexdigest()
    if actual != entry.sha256:
        raise IntegrityError(
            f"{path} is damaged or was replaced: sha256 {actual[:12]}... found, {entry.sha256[:12]}... "
            "expected; install the package again"
        )
    return _parse(data, str(path)), str(path)


def find_entry(model: str, tag: str | None = None) -> Weights:
    """Return the manifest entry of a model, its first where no tag is named."""
    found = entries_of(model)
    tags = [entry.tag for entry in found]
    if not found:
        raise ConfigError(f"no published weights are known for {model}; pass a file as checkpoint_path")
    if tag is not None and tag not in tags:
        near = did_you_mean(tag, tags)
        raise ConfigError(f"unknown weights tag {tag!r} of {model}; use {', '.join(tags)}{near}")
    return found[tags.index(tag) if tag is not None else 0]


def _begins_as_safetensors(data: bytes) -> bool:
    """By its content, whatever it is called: the length of a header, and the header's brace."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8


def _parse(data: bytes, name: str) -> dict[str, Tensor]:
    import safetensors
    import safetensors.torch
    import torch

    if not data:
        raise IntegrityError(f"{name} is empty; fetch it again")
    # The length that a safetensors file begins with may look like " <", but a zero is among its bytes.
    if data.lstrip()[:1] == b"<" and b"\0" not in data[:8]:
        raise IntegrityError(f"{name} is a web page, not a weights file; fetch it again")
    if data.startswith(b"version https://git-lfs"):
        raise IntegrityError(
            f"{name} is what git keeps in place of the file; fetch the file itself by `git lfs pull`"
        )
    if name.lower().endswith(".safetensors") or _begins_as_safetensors(data):
        try:
            return safetensors.torch.load(data)
        except safetensors.SafetensorError as error:
            reason = f"is not a whole safetensors file ({error})"
            raise IntegrityError(f"{name} {reason}; fetch it again") from error
    try:
        content = unpickle(io.BytesIO(data))
    except Exception as error:  # a damaged file raises any of nine types, some without a text
        raise IntegrityError(_why_unreadable(data, name, error)) from error
    state = _unwrap(content, name)
    for key, value in state.items():
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            kind = "meta" if value.is_meta else "quantized" if value.is_quantized else value.layout
            raise IntegrityError(f"{name}: {key} is no plain tensor (it is {kind}); save plain ones")
    largest = max(state, key=lambda key: state[key].nbytes)
    if sum(value.nbytes for value in state.values()) > 4 * len(data) + MARGIN:
        shape = list(state[largest].shape)
        raise IntegrityError(f"{name}: {largest} of shape {shape} claims more numbers than the file holds")
    return state


def unpickle(source: IO[bytes]) -> Any:
    """Read an open file that torch.save wrote; the one place in this repository that does.

    Only tensors and plain containers come out. Raises nearly any exception for a file that is damaged or
    names anything else; a message for the user is the caller's.
    """
    import torch

    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it is compressed, which torch never does, and may unpack to any size")
    source.seek(0)
    with torch.serialization.safe_globals(STAND_INS):
        return torch.load(source, map_location="cpu", weights_only=True)


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
    if "Weights only load failed" in str(error):
        return (
            f"{name} is not a readable weights file: it is cut off, or holds more than a state dict, which "
            "could run code when read; fetch it again or ask for the state dict alone"
        )
    tells = str(error) and not isinstance(error, KeyError)  # whose text is the bare key
    reason = str(error).splitlines()[0][:120] if tells else type(error).__name__
    return f"{name} is not a readable weights file ({reason}); it may be cut off: fetch it again"


def _unwrap(content: Any, name: str) -> dict[str, Tensor]:
    """Find the state dict in what training scripts save around it."""
    import torch

    found = _state_dict_in(content, 3)
    if found is None:
        keys = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else ""
        kind = f"keys {keys}" if keys else type(content).__name__
        raise IntegrityError(f"{name} holds no state dict (found {kind}); looked under {', '.join(WRAPPERS)}")
    state = {str(key): value for key, value in found.items() if isinstance(value, torch.Tensor)}
    if len(state) > 1:
        state.pop("n_averaged", None)  # what torch.optim.swa_utils.AveragedModel counts with
    while True:  # one around the other, in any order
        prefix = next((p for p in PREFIXES if state and all(key.startswith(p) for key in state)), None)
        if prefix is None:
            return state
        state = {key[len(prefix) :]: value for key, value in state.items()}


def _state_dict_in(content: Any, depth: int) -> dict[Any, Any] | None:
    """The first of the wrappers that holds tensors, or the content itself if it does, else None."""
    import torch

    if not isinstance(content, dict):
        return None
    inside = (_state_dict_in(content.get(key), depth - 1) for key in WRAPPERS) if depth else ()
    found = next((state for state in inside if state is not None), None)
    if found is None and any(isinstance(value, torch.Tensor) for value in content.values()):
        return content
    return found
