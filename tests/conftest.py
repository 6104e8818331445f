"""What every test relies on: one thread each, because workers already fill the cores, and a fixed seed."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, but for those of the oldest torch about itself."""
    if torch.__version__ < (2, 12):
        for told in (
            "`torch.jit:DeprecationWarning",
            "The .grad attribute of a Tensor that is not a leaf:UserWarning",
            "The given buffer is not writable:UserWarning",
        ):
            config.addinivalue_line("filterwarnings", f"ignore:{told}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
