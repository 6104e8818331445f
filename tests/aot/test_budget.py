"""What the launchers would launch compiles for real GPUs and costs no more than it did.

`budget.json` holds registers, spills, shared memory and matrix instructions of every kernel of every case, as
scripts/bench/compile_kernels.py found them with the Triton named there. A better figure is no failure; write
it down.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUDGET = json.loads((Path(__file__).parent / "budget.json").read_text())
SHARED = {"sm_80": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def compiled(architecture: str, *cases: str) -> dict[str, dict[str, int]]:
    command = [sys.executable, "-W", "ignore", "scripts/bench/compile_kernels.py", architecture, *cases]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def check(architecture: str, report: dict[str, dict[str, int]]) -> None:
    for name, used in report.items():
        assert used["shared"] <= SHARED[architecture], (name, used)
        assert used["matrix"] > 0, (name, used)
        allowed = BUDGET["costs"].get(architecture, {}).get(name)
        # Figures belong to one Triton; with another they are compared with none.
        if allowed is not None and _triton() == BUDGET["triton"]:
            assert used["spills"] <= allowed["spills"], (name, used, allowed)
            assert used["registers"] <= allowed["registers"] + 16, (name, used, allowed)


def _triton() -> str:
    from importlib.metadata import version

    return version("triton")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", BUDGET["costs"])
def test_every_case_stays_within_its_budget(architecture):
    check(architecture, compiled(architecture))


def test_the_budget_holds_no_spill_in_16_bit():
    for architecture, rows in BUDGET["costs"].items():
        spilling = [name for name, row in rows.items() if row["spills"] and "float32" not in name]
        assert not spilling, (architecture, spilling)
