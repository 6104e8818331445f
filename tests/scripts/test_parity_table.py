"""The table of parity in the README is what a run measures; no error in it is larger than its case allows."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from goldens import golden_dir

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "parity_table.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("parity_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("now", "right"),
    [
        ("| nat | 7 | 2.1e-07 | - |", True),  # another processor's rounding
        ("| nat | 7 | 9.9e-06 | - |", False),
        ("| nat | 8 | 3.3e-07 | - |", False),
        ("| nat | 7 | 3.3e-07 | 1.0e-06 |", False),
        ("| nat | 7 | 3.3e-07 | - |\n| dat | 2 | 1.9e-06 | - |", False),
    ],
)
def test_a_table_is_out_of_date_with_another_figure_case_or_family(script, now, right):
    assert (script.outdated("\n| nat | 7 | 3.3e-07 | - |\n", now) == []) is right


@pytest.mark.slow
def test_an_error_beyond_the_tolerance_of_its_case_stops_the_table(script, monkeypatch):
    case = next(iter(sorted((golden_dir() / "nat").glob("vitrpb*.json"))), None)
    if case is None:
        pytest.skip(f"no golden cases in {golden_dir()}; set ZOO_GOLDENS to the folder that has them")
    golden = script.loader()
    monkeypatch.setattr(golden, "relative_error", lambda *_: 3e-5)
    with pytest.raises(SystemExit, match=r"vitrpb_small_224 is off by 3.0e-05 in its logits"):
        script.errors(golden, case.with_suffix(""))


@pytest.mark.slow
@pytest.mark.skipif(not golden_dir().is_dir(), reason="no golden cases; set ZOO_GOLDENS to their folder")
def test_the_table_of_the_readme_is_up_to_date():
    result = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
