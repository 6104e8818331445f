"""Files that are whole or not there: written beside their place, flushed to disk, moved in one step."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from zoo.errors import IntegrityError, ResourceError

TEMPORARY = ".tmp-"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Let `write` fill a temporary file in the same folder, then put it in the place of `path`.

    A kill at any moment leaves the old file or the new one. Raises ResourceError, the old file untouched,
    where the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        kept = "; the previous file is kept" if path.exists() else ""
        if error.errno in FULL:
            raise ResourceError(
                f"the disk is full, {path} could not be written{kept}; free some space"
            ) from None
        raise ResourceError(f"{path} could not be written ({error.strerror}){kept}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def link_atomically(source: Path, path: Path) -> None:
    """Make `path` another name of `source`, in one step; where the file system has no links, a copy."""
    temporary = path.with_name(f".{path.name}{TEMPORARY}{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(source)
    except OSError:
        write_atomically(path, lambda file: _copy(source, file))
    else:
        temporary.replace(path)
        _sync_folder(path.parent)


def _copy(source: Path, file: IO[bytes]) -> None:
    import shutil

    with source.open("rb") as origin:
        shutil.copyfileobj(origin, file)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some systems cannot open a folder; then the rename is as safe as it gets
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep(folder: Path) -> None:
    """Remove what a killed process left of its writing."""
    for leftover in folder.glob(f".*{TEMPORARY}*"):
        leftover.unlink(missing_ok=True)


def save_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write plain containers and tensors to a checkpoint file, atomically."""

    def write(file: IO[bytes]) -> None:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch hides a failed write behind a message about its own positions
            cause = error.__context__
            if isinstance(cause, OSError):
                raise cause from None
            if "write" in str(error) or "unexpected pos" in str(error):
                raise OSError(errno.ENOSPC, "write failed") from None
            raise

    write_atomically(path, write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint that a recipe wrote; nothing in it is executed. Raises IntegrityError saying why."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise IntegrityError(f"no checkpoint {path}") from None
    # A damaged file raises nearly any exception.
    except Exception as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named:
            raise IntegrityError(
                f"{path} holds more than tensors and numbers ({named[1]}); nothing of it was loaded"
            ) from None
        raise IntegrityError(f"{path} is damaged or no checkpoint ({type(error).__name__})") from None
    if not isinstance(content, dict) or "recipe" not in content:
        raise IntegrityError(
            f"{path} is no checkpoint of a recipe; to start from weights give model.checkpoint={path}"
        )
    return content
