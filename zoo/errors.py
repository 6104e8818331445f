"""Errors a user can act on: one sentence (what, found, wanted, fix) and the exit code of the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral, Real


class ZooError(Exception):
    """Base of every error that the zoo raises on purpose; `exit_code` is the status of the command line."""

    exit_code = 1


class ConfigError(ZooError, ValueError):
    """A mistake in a name, an argument or a recipe."""

    exit_code = 2


class DataError(ZooError, ValueError):
    """A data set, an image or a label that cannot be used."""

    exit_code = 3


class IntegrityError(ZooError):
    """A weights file that is damaged, does not fit, or would run code."""

    exit_code = 4


class ResourceError(ZooError):
    """Not enough memory or disk, or an optional package that is not installed."""

    exit_code = 5


def did_you_mean(name: object, choices: Iterable[str]) -> str:
    """Return `"; did you mean a or b?"` for the choices nearest to `name`, or an empty string."""
    near = difflib.get_close_matches(str(name), list(choices), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def below_one(**rates: float) -> None:
    """Raise ConfigError for the first of the named rates that is no number from 0 to below 1."""
    for name, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 <= rate < 1:
            raise ConfigError(f"{name} must be from 0 to below 1, found {rate!r}")


def at_least(least: int, **sizes: int) -> None:
    """Raise ConfigError for the first of the named sizes that is no whole number from `least` on."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral) or size < least:
            raise ConfigError(f"{name} must be a whole number from {least}, found {size!r}")
