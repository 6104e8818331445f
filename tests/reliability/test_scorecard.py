"""Every number of the scorecard has tests, and they exist."""

from __future__ import annotations

import runpy
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "reliability.py"


def test_every_check_has_tests_that_exist():
    checks = runpy.run_path(str(SCRIPT))["scorecard"]()
    assert [check.number for check in checks] == [f"R{number:02d}" for number in range(1, 45)]
    assert all(check.fault and check.tests for check in checks)


def test_the_table_tells_what_failed_and_what_did_not_run():
    script = runpy.run_path(str(SCRIPT))
    checks = [script["Check"]("R01", "one", ("a::x", "a::y")), script["Check"]("R02", "two", ("a::z",))]
    rows = script["table"](checks, {"a::x": [("passed", 1.0), ("failure", 2.0)], "a::y": [("skipped", 0.0)]})
    assert "| R01 | one | **1 of 3 fail** | 3 | 3 |" in rows
    assert "| R02 | two | **1 of 1 fail** | 1 | 0 |" in rows
