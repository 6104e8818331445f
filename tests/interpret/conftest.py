"""The kernels in Triton's interpreter, every launch watched. Started by tests/kernels/test_triton.py in a
process of its own: the interpreter must be chosen before Triton is first imported."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config):
    """The interpreter of Triton 3.6 makes numbers of arrays, of which NumPy to 2.3 only warns."""
    config.addinivalue_line(
        "filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
    )


@pytest.fixture(autouse=True)
def sanitizer(monkeypatch):
    """Bounds, races and unwritten results, in every test."""
    from interpret.sanitizer import Sanitizer, hasten, poison

    watching = Sanitizer()
    watching.install(monkeypatch)
    poison(monkeypatch)
    hasten(monkeypatch)
    return watching


@pytest.fixture
def small_tiles(monkeypatch):
    """The smallest tiles, so that small inputs have many."""
    from zoo.kernels.configs import Config
    from zoo.kernels.tile import launch

    monkeypatch.setattr(launch, "choose", lambda *key: Config(16, 16, 4, 1))


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """A program costs time here, not a processor."""
    from zoo.kernels.neighborhood import triton

    monkeypatch.setattr(triton, "PROGRAMS", 8)
