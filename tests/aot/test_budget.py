"""What the launchers would launch compiles for real GPUs and costs no more than it did.

`budget.json` holds registers, spills, shared memory, matrix instructions and the length of the hot loop of
every kernel of every case, as scripts/bench/compile_kernels.py found them with the Triton named there. Here
a few cases of each architecture are compiled again; `compile_kernels.py --check` compiles all. A better
figure is no failure; write it down with `--budget`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts" / "bench"
BUDGET = json.loads((Path(__file__).parent / "budget.json").read_text())
SHARED = {"sm_80": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
# The template with lists and with neighborhoods, all its gradients, and kernels of their own.
PLAIN = ("samples", "norms", "residuals", "rotary norms")  # no products of matrices
SAMPLE = (
    "blocks of 128, 128 wide",
    "neighborhood 56x56, 32 wide, with bias",
    "windows of 7x7",
    "channels",
    *PLAIN,
)
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


# Bytes of shared memory by kernel: all that attention with tables launches for the widest heads.
WIDEST = """
import json, sys
import compile_kernels as script
script.compile_for(sys.argv[1])
with script.compiling() as compiled, script.on_a_device():
    script.agents(256, 784, 49)
    script.sampled_keys(256, 28, 49)
print(json.dumps([[kernel, result.metadata.shared] for kernel, _, result in compiled]))
"""


def answer(*command: object) -> Any:
    """What a Python program prints, as JSON."""
    paths = os.pathsep.join(map(str, (ROOT, BENCH)))
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", *command]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def compiled(architecture: str, *cases: str) -> dict[str, dict[str, int]]:
    return answer(BENCH / "compile_kernels.py", architecture, *cases)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED)
def test_heads_of_256_channels_fit_the_shared_memory(architecture):
    used = answer("-c", WIDEST, architecture)
    assert {kernel for kernel, _ in used} >= {"forward", "dq", "dkv", "dpairs", "dbilinear"}
    for kernel, shared in used:
        assert shared <= SHARED[architecture], kernel


@pytest.mark.slow
@pytest.mark.parametrize("architecture", BUDGET["costs"])
def test_a_few_cases_stay_within_their_budget(architecture):
    report = compiled(architecture, *SAMPLE)
    assert len(report) >= 10
    for name, used in report.items():
        assert used["shared"] <= SHARED[architecture], (name, used)
        assert used["matrix"] > 0 or name.startswith(PLAIN), (name, used)
        allowed = BUDGET["costs"][architecture].get(name)
        # Figures belong to one Triton; with another they are compared with none.
        if allowed is not None and version("triton") == BUDGET["triton"]:
            assert used["spills"] <= allowed["spills"], (name, used, allowed)
            assert used["registers"] <= allowed["registers"] + 16, (name, used, allowed)
            assert used["loop"] <= 1.2 * allowed["loop"], (name, used, allowed)


def test_the_budget_holds_all_architectures_and_no_spill():
    assert set(BUDGET["costs"]) == set(SHARED)
    for architecture, rows in BUDGET["costs"].items():
        for name, row in rows.items():
            assert row["spills"] == 0, (architecture, name)
            assert row["matrix"] > 0 or name.startswith(PLAIN), (architecture, name)
            assert row["shared"] <= SHARED[architecture], (architecture, name)


def test_the_table_of_the_readme_is_that_of_the_budget(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    script = import_module("compile_kernels")
    text = script.README.read_text()
    assert script.with_table(text, BUDGET) == text
    assert script.as_json(BUDGET) == script.BUDGET.read_text()


@pytest.mark.parametrize("form", ["nvdisasm", "amdgcn"])
def test_the_hot_loop_is_the_innermost_with_matrix_instructions(form, monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    script = import_module("compile_kernels")
    if form == "nvdisasm":
        line = "        /*{:04x}*/                   {} ;".format
        body = [
            ".L_x_0:", "MOV R1, R2", ".L_x_1:", "HGMMA.64x64x16.F32.BF16 R24", "MUFU.EX2 R1, R2",
            "@P0 BRA `(.L_x_1)", "HGMMA.64x64x16.F32.BF16 R24", "@P1 BRA `(.L_x_0)", ".L_x_2:",
            "NOP", "BRA `(.L_x_2)",
        ]  # fmt: skip
    else:
        line = "\t{1}".format
        body = [
            ".LBB0_0:", "s_mov_b32 s1, s2", ".LBB0_1:", "v_mfma_f32_32x32x8_bf16_1k a[0:15]",
            "v_exp_f32 v1, v2", "s_cbranch_scc1 .LBB0_1", "v_mfma_f32_32x32x8_bf16_1k a[0:15]",
            "s_cbranch_scc0 .LBB0_0",
            ".LBB0_2:", "s_nop 0", "s_branch .LBB0_2",
        ]  # fmt: skip
    code = "\n".join(part if part[0] == "." else line(16 * n, part) for n, part in enumerate(body))
    assert script.hot_loop(code) == 3
    assert script.hot_loop(code.replace("HGMMA", "FFMA").replace("v_mfma", "v_fma")) == 0
