"""Write the table of parity into README.md: the largest relative error of every family against the stored
outputs of its published code. Needs the golden cases (`ZOO_GOLDENS` names their folder).

python scripts/parity_table.py; with --check it compares and writes nothing. Either fails where an error
exceeds its case's tolerance.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch

import zoo

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
START, END = "<!-- parity -->", "<!-- /parity -->"
FAMILIES = ("nat", "biformer", "dat", "davit", "agent")


def folder() -> Path:
    """Where the cases lie."""
    return Path(os.environ.get("ZOO_GOLDENS", ROOT.parent / "shared" / "goldens"))


def loader() -> ModuleType:
    """What reads them, from beside them."""
    spec = importlib.util.spec_from_file_location("golden", folder() / "golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def errors(golden: ModuleType, case: Path) -> tuple[float, float]:
    """Relative error of the logits, and the largest of the stored features of stages, 0 if there are none."""
    facts, stored = golden.load_case(case)
    state = golden.reference_state_dict(facts)
    # Tables that the published NAT files hold and that follow from the sizes; our loader leaves them out.
    derived = (
        {key: torch.zeros(shape) for key, shape in facts["derived"]} if case.parent.name == "nat" else {}
    )
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "published.pth"
        torch.save(state | derived, file)
        model = zoo.create_model(facts["zoo_name"], checkpoint_path=file).eval()
    image = golden.seeded_normal("input", facts["input_shape"], facts["seed"])
    with torch.no_grad():
        last, features = model.forward_intermediates(image)
        logits = model.forward_head(last)
    worst = 0.0
    kept = [name for name in stored if name.startswith("feat")]
    for name, feature in zip(kept, features[-len(kept) :] if kept else (), strict=True):
        # Of large maps every so many pixels and channels are stored.
        steps = facts["features"]["stored"][name].strip("[]").split(",")[1:]
        part = feature[(slice(None), *(slice(None, None, int(step.strip(" :") or 1)) for step in steps))]
        worst = max(worst, golden.relative_error(part, stored[name]))
    error = golden.relative_error(logits, stored["logits"])
    allowed = facts["tolerance"]
    if error > allowed["logits"] or worst > allowed["feats"]:
        sys.exit(
            f"error: {case.name} is off by {error:.1e} in its logits and {worst:.1e} in its features; "
            f"allowed are {allowed['logits']:.0e} and {allowed['feats']:.0e}"
        )
    return error, worst


def table() -> str:
    """One row for each family; in amplified cases rounding of float32 grows with everything else."""
    golden = loader()
    rows = [
        "| family | cases | logits | features of the stages | logits, weights amplified |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for family in FAMILIES:
        cases = [case.with_suffix("") for case in sorted((folder() / family).glob("*.json"))]
        found = {case: errors(golden, case) for case in cases if "logits" in golden.load_case(case)[1]}
        if not found:
            sys.exit(f"error: no golden cases of {family} in {folder()}; set ZOO_GOLDENS")
        plain = [pair for case, pair in found.items() if not case.name.endswith("_gain")]
        loud = [logits for case, (logits, _) in found.items() if case.name.endswith("_gain")]
        logits, features = map(max, zip(*plain, strict=True))
        stages = f"{features:.1e}" if features else "-"
        amplified = f"{max(loud):.1e}" if loud else "-"
        rows.append(f"| {family} | {len(found)} | {logits:.1e} | {stages} | {amplified} |")
    return "\n".join(rows)


def outdated(printed: str, made: str) -> list[str]:
    """Rows of a printed table that are no longer what was measured.

    Rounding differs between processors: an error may be three times the printed one, or a third of it.
    """
    old, new = (text.strip().splitlines() for text in (printed, made))
    if len(old) != len(new):
        return new
    return [row for row, now in zip(old, new, strict=True) if not _alike(row, now)]


def _alike(row: str, now: str) -> bool:
    number = re.compile(r"\d\.\de-\d+")
    pairs = zip(number.findall(row), number.findall(now), strict=False)
    close = all(float(new) / 3 <= float(old) <= 3 * float(new) for old, new in pairs)
    return close and number.sub("x", row) == number.sub("x", now)


def main() -> None:
    torch.set_num_threads(1)
    made = table()  # takes minutes, in which the text may change
    before, _, rest = README.read_text().partition(START)
    printed, _, after = rest.partition(END)
    if "--check" not in sys.argv[1:]:
        README.write_text(f"{before}{START}\n{made}\n{END}{after}")
    elif wrong := outdated(printed, made):
        sys.exit("\n".join(["error: README.md is out of date; run scripts/parity_table.py", *wrong]))


if __name__ == "__main__":
    main()
