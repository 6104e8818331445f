"""Starts the tests that need Triton's interpreter, which has to be chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from zoo import ops

TESTS = Path(__file__).resolve().parent.parent
FILES = sorted(path.stem for path in (TESTS / "interpret").glob("test_*.py"))
LONG = ("test_block_sparse", "test_neighborhood")  # each in a process of its own, the others in one
PARTS = [*((name,) for name in LONG), tuple(name for name in FILES if name not in LONG)]
NAMES = [*LONG, "the others"]
QUICK = (
    "agent", "aligned", "bilevel", "channel", "deformable", "dense", "gated_residual", "modulated_norm",
    "rotary_norm", "sanitizer", "window",
)  # fmt: skip
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_told():
    reasons = {row.op: row.reason for row in ops.backends() if row.backend == "triton"}
    assert {"block_sparse_attention", "neighborhood_attention"} <= set(reasons)
    assert all("no GPU" in reason for reason in reasons.values())


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS, ids=NAMES)
def test_in_the_interpreter(part):
    run(part)


def test_one_call_of_every_kernel_in_the_interpreter():
    run(tuple(f"test_{name}" for name in QUICK), "-m", "not slow")


def run(part: tuple[str, ...], *options: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *options]
    files = [TESTS / "interpret" / f"{name}.py" for name in part]
    result = subprocess.run(
        [*command, *files], cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
