"""The ways in which a training run is stopped from within, and whether two of them ended the same."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file


class Killed(BaseException):
    """Stands for kill -9: nothing catches it, nothing is saved."""


def kill() -> None:
    raise Killed


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def assert_same(one: Path, other: Path) -> None:
    """The same losses, the same weights in the model file, the same state of the optimiser."""
    assert (one / "metrics.csv").read_text() == (other / "metrics.csv").read_text()
    weights, others = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    first, second = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]["state"]
        for folder in (one, other)
    )
    assert first.keys() == second.keys()
    assert all(
        torch.equal(value, second[index][key]) for index, each in first.items() for key, value in each.items()
    )
