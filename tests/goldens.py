"""Stored outputs of the published implementations, where this machine has them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def golden_dir() -> Path:
    """The folder of the golden cases: `ZOO_GOLDENS`, or shared/goldens beside the checkout."""
    return Path(os.environ.get("ZOO_GOLDENS", ROOT.parent / "shared" / "goldens"))


def cases(family: str) -> list:
    """One pytest parameter for every case of a family; a single one that skips, where they are absent."""
    paths = sorted((golden_dir() / family).glob("*.json"))
    if not paths:
        reason = f"no golden cases in {golden_dir() / family}; set ZOO_GOLDENS to the folder that has them"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="absent")]
    return [pytest.param(path.with_suffix(""), id=path.stem) for path in paths]


def golden() -> ModuleType:
    """The loader that lies beside the cases."""
    spec = importlib.util.spec_from_file_location("golden", golden_dir() / "golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
