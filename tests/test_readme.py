"""The README runs as printed, and its table is the registry's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_its_python_runs_as_printed(tmp_path):
    """All blocks in order in one fresh interpreter, as a reader would type them."""
    pytest.importorskip("diffusers", reason="the third use needs diffusers: pip install 'attnzoo[diffusion]'")
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    result = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_analysis_page_shows_files_that_exist_and_runs_as_printed(tmp_path):
    page = ROOT / "zoo" / "analysis" / "README.md"
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
    (block,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    pytest.importorskip("triton")
    result = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow  # counts every model, which takes a minute
def test_its_model_table_is_up_to_date():
    check = [sys.executable, str(ROOT / "scripts" / "model_table.py"), "--check"]
    result = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_file_it_points_to_exists():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_scripts_it_names_exist():
    for script in set(re.findall(r"scripts/\w+\.(?:sh|py)", README)):
        assert (ROOT / script).is_file(), script
