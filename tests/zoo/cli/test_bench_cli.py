"""`zoo bench`: the files it writes, and one clear line for a mistake."""

from __future__ import annotations

import json

import pytest
import torch

from zoo.cli import main


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(["bench", *arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_a_model_runs_against_its_peer(capsys, tmp_path):
    arguments = ("nat_digits", "--against", "dat_digits", "--seconds", "0", "--no-memory", "--output")
    status, out, err = run(capsys, *arguments, str(tmp_path))
    assert status == 0, err
    made = json.loads((tmp_path / "bench.json").read_text())
    assert [row["name"] for row in made["rows"]] == ["dat_digits", "nat_digits"]
    assert "torch" in made["about"] and "nat_digits" in out


def test_a_comparison_draws_a_chart_and_a_report_shows_it(capsys, tmp_path):
    arguments = ("--compare", "attention=window,global", "--size", "7,14", "--seconds", "0", "--no-memory")
    status, out, err = run(capsys, *arguments, "--output", str(tmp_path))
    assert status == 0, err
    assert "exponents in the number of tokens" in out
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.png"}
    page = tmp_path / "page.html"
    status, _, err = run(capsys, "report", str(tmp_path / "bench.json"), "--output", str(page))
    assert status == 0, err
    assert "attention over resolution" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "name models or operations"),
        (["nat_digits", "--compare", "attention=window"], 2, "one of the two"),
        (["nat_digit"], 2, "did you mean nat_digits"),
        (["swin_tiny_patch4_window7"], 2, "did you mean swin_tiny_patch4_window7_224"),
        (["nat_digits", "--size", "big"], 2, "--size must be positive numbers"),
        (["nat_digits", "--dtype", "int8"], 2, "--dtype must be"),
        (["--compare", "mechanism=window"], 2, "--compare must be attention="),
        (["--compare", "attention=windw"], 2, "did you mean window"),
        (["--compare", "attention=window", "--compile"], 2, "takes neither --against nor --compile"),
        (["report"], 2, "needs files"),
        (["report", "nowhere.json"], 3, "no file nowhere.json"),
    ],
)
def test_a_mistake_is_one_line(arguments, status, message, capsys):
    found, _, err = run(capsys, *arguments)
    assert found == status and message in err and len(err.splitlines()) <= 3


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("nat_digits@tritn",), 2, "did you mean triton"),
        pytest.param(
            ("nat_digits@triton",),
            5,
            "backend 'triton' cannot run",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it runs where there is a GPU"),
        ),
        (("nat_digits", "--device", "gpu"), 2, "device must be cpu or cuda, found 'gpu'"),
        (("neighborhood_attention", "--size", "²"), 2, "--size must be positive numbers"),
        (("neighborhood_attention", "--size", "5"), 2, "error: kernel_size * dilation = 7 * 1 must not"),
        (("window_attention", "--size", "10"), 2, "error: the map's 10 rows must be a multiple"),
    ],
)
def test_backends_devices_and_sizes_that_are_not_there(arguments, status, message, capsys):
    found, _, err = run(capsys, *arguments, "--seconds", "0", "--no-memory")
    assert found == status and message in err and len(err.splitlines()) == 1


def test_a_report_of_something_else_names_the_file(tmp_path, capsys):
    (tmp_path / "list.json").write_text("[]")
    status, _, err = run(capsys, "report", str(tmp_path / "list.json"))
    assert status != 0 and "list.json: this is no benchmark" in err
