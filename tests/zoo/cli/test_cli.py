"""The command line's frame: what it prints, and one clear line with the right status for every mistake."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

import zoo
from zoo.cli import main


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_list_prints_a_name_a_line(capsys):
    status, out, _ = run(capsys, "list", "dinat_s*")
    assert status == 0
    assert out.split() == zoo.list_models("dinat_s*")


def test_the_version_is_told(capsys):
    assert run(capsys, "--version") == (0, f"zoo {zoo.__version__}\n", "")


def test_info_prints_the_facts(capsys):
    status, out, _ = run(capsys, "info", "nat_mini", "--json")
    facts = json.loads(out)
    assert status == 0
    assert (facts["name"], facts["top1"], facts["params"]) == ("nat_mini", 81.8, 19984174)
    assert "19.984 M" in run(capsys, "info", "nat_mini")[1]


def test_doctor_names_every_backend(capsys):
    status, out, _ = run(capsys, "doctor", "--json")
    report = json.loads(out)
    assert status == 0
    assert {"op": "neighborhood_attention", "backend": "cpu", "runs": True, "reason": None} in report[
        "backends"
    ]
    assert report["packages"]["torch"]
    assert "attnzoo[diffusion]" in run(capsys, "doctor")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "nat_tny"], "unknown model 'nat_tny'; did you mean nat_tiny"),
        (["list", "q*"], "no model matches 'q*'"),
        (["list", "--family", "nats"], "unknown family 'nats'; use agent"),
        (["info"], "Missing argument"),
        (["list", "--frobnicate"], "No such option"),
        (["lst"], "No such command"),
        (["train", "classification/digit"], "did you mean classification/digits"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, capsys):
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert message in err
    assert err.startswith("error: ") and len(err.splitlines()) <= 3 and "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (zoo.ConfigError("c"), 2),
        (zoo.DataError("d"), 3),
        (zoo.IntegrityError("i"), 4),
        (zoo.ResourceError("r"), 5),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 5),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 3),
        (MemoryError(), 5),
        (KeyboardInterrupt(), 130),
        (SystemExit(143), 143),
        (RuntimeError("a\nlong\nmessage\nof\nlines"), 1),
        (AssertionError(), 1),
    ],
)
def test_every_error_has_its_status_and_a_text(error, status, capsys, monkeypatch):
    def fail(*arguments, **settings):
        raise error

    monkeypatch.setattr(zoo, "list_models", fail)
    found, _, err = run(capsys, "list")
    assert found == status
    if not isinstance(error, SystemExit):  # which says what it has to say itself
        assert 1 <= len(err.splitlines()) <= 3


@pytest.mark.parametrize(
    ("module", "extra"),
    [("matplotlib.figure", "recipes"), ("diffusers", "diffusion"), ("onnx", "export")],
)
def test_a_package_that_is_not_installed_names_the_extra_that_brings_it(module, extra, capsys, monkeypatch):
    def fail(*arguments, **settings):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(zoo, "list_models", fail)
    status, _, err = run(capsys, "list")
    assert status == 5
    assert err == f"error: this needs {module}, which is not installed; run: pip install 'attnzoo[{extra}]'\n"


def test_debug_shows_the_traceback_wherever_it_stands():
    for arguments in (["--debug", "info", "nat_tny"], ["info", "nat_tny", "--debug"]):
        with pytest.raises(zoo.ConfigError):
            main(arguments)


def test_the_module_is_the_command():
    result = subprocess.run([sys.executable, "-m", "zoo", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert "predict" in result.stdout


def test_generators_are_listed_and_described_beside_the_backbones(capsys):
    code, out, _ = run(capsys, "list", "--task", "generation")
    assert code == 0 and "dit_xl_2" in out.split() and "nat_mini" not in out.split()
    code, out, _ = run(capsys, "info", "dit_s_8", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["task"] == "generation" and facts["input_size"] == [4, 32, 32]


@pytest.mark.parametrize("output", ["file", "file/below/it"])
def test_generate_refuses_a_folder_that_cannot_be_before_images_are_made(
    tmp_path, capsys, monkeypatch, output
):
    from zoo.recipes import generate

    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(generate, "generate", lambda *arguments, **options: pytest.fail("images were made"))
    status, _, err = run(capsys, "generate", "dit_digits", "--output", str(tmp_path / output))
    assert status == 2
    assert err == f"error: --output {tmp_path}/{output}: {tmp_path}/file is a file; name another folder\n"


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_cut_off_by_a_pager_is_no_error(unbuffered):
    reading, writing = os.pipe()
    os.close(reading)  # as a pager leaves it that was quit at its first line
    environment = dict(os.environ, PYTHONUNBUFFERED=unbuffered)
    command = [sys.executable, "-m", "zoo", "list"]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writing)
    assert (result.returncode, result.stderr) == (0, "")
