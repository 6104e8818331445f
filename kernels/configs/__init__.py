"""Tile sizes and launch options of the kernels, one table for each architecture.

`<arch>.json` maps a kernel, with and without a bias, to bytes per number, to the head width (padded to a
power of two), to [queries in a tile, keys in a tile, warps, stages]. A test compiles what models launch and
refuses a kernel that spills or does not fit the shared memory.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple


class Config(NamedTuple):
    """How a kernel is launched: tokens of a query tile and of a key tile, warps, pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


@lru_cache(maxsize=256)
def choose(kernel: str, architecture: str, width: int, itemsize: int) -> Config:
    """Return the entry of the nearest older architecture of the same make, and of the next wider head."""
    table = _table(_nearest(architecture))[kernel][str(min(max(itemsize, 2), 4))]
    widths = sorted(map(int, table))
    return Config(*table[str(next((w for w in widths if w >= width), widths[-1]))])


def architectures() -> list[str]:
    """The architectures that have a table."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.json"))


@lru_cache
def _table(architecture: str) -> dict:
    return json.loads((Path(__file__).parent / f"{architecture}.json").read_text())["configurations"]


def _nearest(architecture: str) -> str:
    make, number = _split(architecture)
    same = sorted((_split(name)[1], name) for name in architectures() if _split(name)[0] == make)
    older = [name for known, name in same if known <= number]
    return older[-1] if older else same[0][1]


def _split(architecture: str) -> tuple[str, int]:
    """ "sm_90" is ("sm_", 90) and "gfx942" is ("gfx", 0x942): AMD counts its steps in hexadecimal."""
    make, number = re.fullmatch(r"(sm_|gfx)([0-9a-f]+)", architecture).groups()
    return make, int(number, 16)
