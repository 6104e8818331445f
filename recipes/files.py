"""Checkpoints of recipes on disk: whole or not there, plain containers and tensors only."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import IO, Any

import torch

from zoo.errors import IntegrityError
from zoo.weights.files import link_atomically, open_file, sweep, write_atomically, write_text
from zoo.weights.loader import unpickle

__all__ = ["link_atomically", "load_checkpoint", "save_checkpoint", "sweep", "write_atomically", "write_text"]


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
        with open_file(path) as file:
            content = unpickle(file)
    except FileNotFoundError:
        raise IntegrityError(f"no checkpoint {path}") from None
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read ({error.strerror or error})") from None
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
