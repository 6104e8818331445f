"""Run the reliability scorecard and write its table: python scripts/reliability.py [R06 R35 ...].

The checks are in tests/reliability/scorecard.yaml, the table goes to tests/reliability/README.md. With
numbers, only those run, and the table is printed. `--reports fast.xml slow.xml` takes the outcomes of runs of
all tests, `bash scripts/test.sh --junitxml=fast.xml ...`, instead.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "reliability"
HEAD = """# Reliability scorecard

What must hold whatever goes wrong, by number; `python scripts/reliability.py` runs the tests that
[scorecard.yaml](scorecard.yaml) lists and writes this table. Seconds are of all cases of a check together.

"""


@dataclass(frozen=True)
class Check:
    """One line of the scorecard: what goes wrong, and the test functions that show what happens then."""

    number: str
    fault: str
    tests: tuple[str, ...]  # path::function


def scorecard() -> list[Check]:
    """Every check with its test functions. Raises: ValueError for a test that does not exist."""
    text = yaml.safe_load((FOLDER / "scorecard.yaml").read_text())
    return [Check(number, row["fault"], tuple(_functions(row["tests"]))) for number, row in text.items()]


def _functions(tests: list[str]) -> list[str]:
    """The functions that have one of the names, or begin with it and an underscore."""
    found = []
    for test in tests:
        file, _, wanted = test.partition("::")
        tree = ast.parse((ROOT / file).read_text())
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        matching = [name for name in names if name == wanted or name.startswith(f"{wanted}_")]
        if not matching:
            raise ValueError(f"the scorecard names {test}, which does not exist")
        found += [f"{file}::{name}" for name in matching]
    return found


def run(tests: list[str]) -> dict[str, list[tuple[str, float]]]:
    """What `read` finds after a run of these tests."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "--maxprocesses", "8"]
        subprocess.run([*command, f"--junitxml={report}", *tests], cwd=ROOT, check=False)
        return read([report])


def read(reports: list[Path]) -> dict[str, list[tuple[str, float]]]:
    """Outcome and seconds of every case, by test function; what was not collected is missing."""
    cases = defaultdict(list)
    for case in (case for report in reports for case in ET.parse(report).iter("testcase")):
        kinds = {child.tag for child in case}
        outcome = next((kind for kind in ("error", "failure", "skipped") if kind in kinds), "passed")
        file = case.get("classname").replace(".", "/") + ".py"
        name = f"{file}::{case.get('name').partition('[')[0]}"
        cases[name].append((outcome, float(case.get("time"))))
    return cases


def table(checks: list[Check], cases: dict[str, list[tuple[str, float]]]) -> str:
    """The rows as Markdown."""
    rows = ["| check | fault | result | cases | seconds |", "| --- | --- | --- | --- | --- |"]
    for check in checks:
        found = [case for test in check.tests for case in cases.get(test, [("not run", 0.0)])]
        wrong = [outcome for outcome, _ in found if outcome not in ("passed", "skipped")]
        result = "passes" if not wrong else f"**{len(wrong)} of {len(found)} fail**"
        seconds = sum(seconds for _, seconds in found)
        rows.append(f"| {check.number} | {check.fault} | {result} | {len(found)} | {seconds:.0f} |")
    return "\n".join(rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", help="checks to run, R01 to R44 (default: all)")
    parser.add_argument("--reports", nargs="+", type=Path, metavar="XML", help="outcomes of finished runs")
    arguments = parser.parse_args()
    numbers = arguments.numbers
    checks = scorecard()
    unknown = set(numbers) - {check.number for check in checks}
    if unknown:
        parser.error(f"no check {', '.join(sorted(unknown))}; there are R01 to R{len(checks):02d}")
    chosen = [check for check in checks if not numbers or check.number in numbers]
    wanted = sorted({test for check in chosen for test in check.tests})
    rows = table(chosen, read(arguments.reports) if arguments.reports else run(wanted))
    print(rows)
    if not numbers:
        (FOLDER / "README.md").write_text(HEAD + rows)
    return int("fail**" in rows)


if __name__ == "__main__":
    sys.exit(main())
