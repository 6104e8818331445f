"""`zoo runs` tells what runs are there and in what they differ."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from PIL import Image

from zoo.cli import main
from zoo.errors import ConfigError
from zoo.recipes.runs import differences, find_runs, read_run


@pytest.fixture
def folder(finished, tmp_path):
    """Two runs, the second stopped in its first epoch with another rate, and a damaged one."""
    root = tmp_path / "runs"
    shutil.copytree(finished, root / "first")
    shutil.copytree(finished, root / "deeper" / "second")
    second = root / "deeper" / "second"
    (second / "model.safetensors").unlink()
    config = second / "config.yaml"
    config.write_text(config.read_text().replace("epochs: 2", "epochs: 3"))
    rows = (second / "metrics.csv").read_text().splitlines(keepends=True)
    (second / "metrics.csv").write_text("".join(rows[:2]))
    (root / "broken").mkdir()
    (root / "broken" / "config.yaml").write_text("a: [")
    return root


def test_runs_are_listed_and_a_damaged_one_is_named(folder, capsys):
    assert main(["runs", "list", str(folder)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].split()[:3] == ["folder", "model", "data"] and len(lines) == 3
    states = {line.split()[0].rpartition("/")[2]: line.split()[3] for line in lines[1:]}
    assert states == {"first": "finished", "second": "stopped"}
    assert "broken" in printed.err and len(printed.err.splitlines()) == 1
    assert main(["runs", "list", str(folder / "nowhere")]) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("mode", [0, 0o400], ids=["unreadable", "names only"])
def test_a_run_that_cannot_be_read_is_named_too(folder, mode, capsys):
    (folder / "deeper" / "second").chmod(mode)
    try:
        assert main(["runs", "list", str(folder)]) == 0
    finally:
        (folder / "deeper" / "second").chmod(0o755)
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2
    assert any("second" in line and "cannot be read" in line for line in printed.err.splitlines())


def test_the_best_validation_and_the_last_step_are_read(folder):
    found, wrong = find_runs(folder)
    assert len(found) == 2 and len(wrong) == 1
    first = read_run(folder / "first")
    assert (first.step, first.epoch, first.monitor) == (6, 2, "top1")
    assert first.best == max(value for _, value in first.curve) and len(first.curve) == 2
    second = read_run(folder / "deeper" / "second")
    assert (second.step, second.best, second.curve) == (1, None, [])
    assert differences([first, second]) == {"optim.epochs": [2, 3]}


def test_a_comparison_shows_what_differs_and_draws_it(folder, tmp_path, capsys):
    runs = [str(folder / "first"), str(folder / "deeper" / "second")]
    chart = tmp_path / "chart.png"
    assert main(["runs", "compare", *runs, "--chart", str(chart), "--json", "-"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [each["differs"] for each in facts] == [{"optim.epochs": 2}, {"optim.epochs": 3}]
    with Image.open(chart) as image:
        assert image.width > 500
    assert main(["runs", "compare", *runs]) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[1].split() == ["optim.epochs", "2", "3"] and "top1 " in table


def test_one_run_or_none_is_refused(folder, capsys):
    assert main(["runs", "compare", str(folder / "first")]) == 2
    assert "two runs or more" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="did you mean first"):
        read_run(folder / "firs")


@pytest.mark.parametrize("damage", ['{"star', "{}", b"\xff\xfe"])
def test_a_damaged_run_is_named_where_it_is_asked_for(folder, damage, capsys):
    environment = folder / "first" / "environment.json"
    whole = environment.read_bytes()
    try:
        environment.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
        assert main(["runs", "compare", str(folder / "first"), str(folder / "deeper" / "second")]) == 2
        assert "first cannot be read" in capsys.readouterr().err
    finally:
        environment.write_bytes(whole)


@pytest.mark.parametrize("name", ["", "chart.foo"])
def test_a_chart_is_a_file_that_can_be_drawn(folder, name, tmp_path, capsys):
    runs = [str(folder / "first"), str(folder / "deeper" / "second")]
    assert main(["runs", "compare", *runs, "--chart", str(tmp_path / name)]) == 2
    assert "a picture must be a file ending in ." in capsys.readouterr().err
    assert not list(tmp_path.glob("*chart*"))
