"""Files that are whole or not there: written beside their place, flushed to disk, moved in one step; and read
only where they are files."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from zoo.errors import ResourceError

TEMPORARY = ".tmp-"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Let `write` fill a temporary file in the same folder, then put it in the place of `path`.

    A kill at any moment leaves the old file or the new one; an existing file keeps its mode. Raises
    ResourceError, the old file untouched, where the disk is full or the folder cannot be written.
    """
    path = Path(os.path.realpath(path))  # behind a link, the file it points to is replaced, not the link
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            shutil.copymode(path, temporary)
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        kept = "; the previous file is kept" if path.exists() else ""
        if error.errno in FULL:
            free = shutil.disk_usage(path.parent).free
            raise ResourceError(
                f"the disk is full ({free / 1e6:,.0f} MB free), {path} could not be written{kept}; "
                "free some space"
            ) from None
        raise ResourceError(f"{path} could not be written ({error.strerror}){kept}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def link_atomically(source: Path, path: Path) -> None:
    """Make `path` another name of `source`, in one step; where the file system has no links, a copy."""
    temporary = _temporary(path)
    try:
        temporary.hardlink_to(source)
    except OSError:
        write_atomically(path, lambda file: _copy(source, file))
    else:
        temporary.replace(path)
        _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; a pipe or device takes it as it comes.

    Raises: as `write_atomically`.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
    else:
        write_atomically(path, lambda file: file.write(text.encode()))


def _temporary(path: Path) -> Path:
    """A name of its own for every call: threads and containers may share a process number."""
    return path.with_name(f".{path.name}{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}")


def _copy(source: Path, file: IO[bytes]) -> None:
    with source.open("rb") as origin:
        shutil.copyfileobj(origin, file)


def open_file(path: str | Path) -> IO[bytes]:
    """Open an ordinary file for reading bytes: a pipe would be waited for, a device may never end.

    Raises: OSError, at once, for a pipe, device or socket too.
    """
    return open(path, "rb", opener=_open_without_waiting)


def _open_without_waiting(path: str, flags: int) -> int:
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # `open` refuses a folder in its own words
        return handle
    os.close(handle)
    raise OSError(errno.EINVAL, "a pipe or device, not a file", path)


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
