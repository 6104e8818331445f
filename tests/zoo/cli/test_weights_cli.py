"""`zoo weights`: list, get, convert, verify and pin, against real files."""

from __future__ import annotations

import hashlib
import json
import re
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

import zoo
from zoo.checkpoints import find_weights
from zoo.cli import main


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.fixture
def published(tmp_path):
    """A file as its authors would publish it: wrapped, with more beside the weights."""
    torch.manual_seed(0)
    model = zoo.create_model("nat_digits")
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "published.pth")
    return tmp_path / "published.pth", model


def test_list_tells_where_weights_lie_and_whether_they_are_here(capsys):
    status, out, _ = run(capsys, "weights", "list", "nat*", "--json")
    rows = {f"{row['model']}.{row['tag']}": row for row in json.loads(out)}
    assert status == 0
    assert rows["nat_digits.digits"]["where"] == "in the package" and rows["nat_digits.digits"]["here"]
    assert rows["nat_mini.in1k"]["where"] == "shi-labs.com"
    assert "nat_mini.in1k" in run(capsys, "weights", "list", "nat_mini")[1]


def test_get_prints_where_the_verified_file_is(capsys):
    status, out, _ = run(capsys, "weights", "get", "nat_digits")
    assert (status, out.strip().endswith("nat_digits.safetensors")) == (0, True)


def test_convert_keeps_every_number_and_says_where_it_came_from(published, tmp_path, capsys):
    source, model = published
    output = tmp_path / "out.safetensors"
    assert run(capsys, "weights", "convert", str(source), "nat_digits", str(output))[0] == 0
    with safe_open(output, framework="pt") as file:
        facts = file.metadata()
    assert facts["model"] == "nat_digits"
    assert facts["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    again = zoo.create_model("nat_digits", checkpoint_path=output)
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    status, _, err = run(capsys, "weights", "convert", str(source), "nat_digits", str(output))
    assert (status, "exists" in err) == (2, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("norm.weight"), "1 missing: norm.weight"),
        (lambda state: state.update(other=torch.zeros(1)), "1 unexpected: other"),
        (lambda state: state.update({"norm.weight": torch.zeros(3)}), r"norm.weight \[3\] instead of \[96\]"),
    ],
)
def test_convert_refuses_what_does_not_fit_and_writes_nothing(change, message, tmp_path, capsys):
    state = zoo.create_model("nat_digits").state_dict()
    change(state)
    torch.save(state, tmp_path / "w.pth")
    status, _, err = run(capsys, "weights", "convert", str(tmp_path / "w.pth"), "nat_digits", "o.safetensors")
    assert status == 4
    assert re.search(message, err) and len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


@pytest.mark.parametrize(("given", "written"), [(["--num-classes", "7"], 7), (["--num-classes", "0"], None)])
def test_convert_writes_no_classifier_that_the_file_has_not(given, written, tmp_path, capsys):
    torch.save(zoo.create_model("nat_digits", num_classes=7).state_dict(), tmp_path / "seven.pth")
    command = [
        "weights",
        "convert",
        str(tmp_path / "seven.pth"),
        "nat_digits",
        str(tmp_path / "o.safetensors"),
    ]
    status, _, err = run(capsys, *command)
    assert status == 2 and "other classes than the 10 of nat_digits; name their number" in err
    assert not (tmp_path / "o.safetensors").exists()
    assert run(capsys, *command, *given)[0] == 0
    head = load_file(tmp_path / "o.safetensors").get("head.weight")
    assert written == (None if head is None else len(head))


def test_verify_looks_at_hash_numbers_and_fit(published, tmp_path, capsys):
    status, out, _ = run(capsys, "weights", "verify")
    assert status == 0
    assert "nat_digits.digits: sound, sha256" in out
    source, _ = published
    assert run(capsys, "weights", "verify", str(source), "--model", "nat_digits")[0] == 0
    status, out, _ = run(capsys, "weights", "verify", str(source), "--model", "nat_mini")
    assert (status, "does not fit" in out) == (4, True)
    state = zoo.create_model("nat_digits").state_dict()
    state["norm.weight"][0] = float("inf")
    torch.save(state, tmp_path / "inf.pth")
    status, out, err = run(capsys, "weights", "verify", str(tmp_path / "inf.pth"))
    assert (status, "norm.weight holds infinite" in out) == (4, True)
    state["norm.weight"][0] = 0
    state["head.weight"].zero_()
    torch.save(state, tmp_path / "zero.pth")
    status, out, _ = run(capsys, "weights", "verify", str(tmp_path / "zero.pth"))
    assert (status, "head.weight is all zero" in out) == (0, True)


def test_verify_needs_no_diffusers_for_the_weights_of_a_generator(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "zoo.diffusion.transformers", None)  # importing it would fail
    status, out, err = run(capsys, "weights", "verify", "dit_digits")
    assert (status, err) == (0, "") and "dit_digits.digits: sound" in out


def test_pin_prints_what_a_manifest_states(capsys):
    status, out, _ = run(capsys, "weights", "pin", "nat_digits")
    entry = find_weights("nat_digits")
    assert (status, out.split()) == (0, ["sha256:", entry.sha256, "size:", str(entry.size)])


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["get", "nat_min"], 2, "no published weights are called 'nat_min'; did you mean nat_mini"),
        (["list", "q*"], 2, "no weights match 'q*'"),
        (["pin", "nat_mini"], 2, "zoo weights get nat_mini"),
        (["verify", "nothere.pth"], 2, "no weights file nothere.pth"),
        (["convert", "nothere.pth", "nat_digits", "o.safetensors"], 2, "no weights file nothere.pth"),
        (["convert", "nothere.pth", "nat_digits", "o.pth"], 2, "must end in .safetensors"),
    ],
)
def test_mistakes_are_one_line(arguments, status, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    found, _, err = run(capsys, "weights", *arguments)
    assert (found, message in err) == (status, True)
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: (100 * x).int(), "torch.int32 instead of"),
        (lambda x: x.to(torch.complex64), "torch.complex64 instead of"),
        (lambda x: x.to("meta"), "is no plain tensor .it is meta."),
    ],
    ids=["integers", "complex", "meta"],
)
def test_what_cannot_be_weights_is_not_sound(change, message, tmp_path, published, capsys):
    state = {
        key: change(value) if value.is_floating_point() else value
        for key, value in published[1].state_dict().items()
    }
    torch.save(state, tmp_path / "odd.pth")
    status, out, err = run(capsys, "weights", "verify", str(tmp_path / "odd.pth"), "--model", "nat_digits")
    assert status == 4 and re.search(message, out)
    assert "is wrong" in err and "delete" not in err  # nobody could fetch it again


def test_a_file_is_told_by_what_it_holds_not_by_its_name(tmp_path, published, capsys):
    path = tmp_path / "WEIGHTS.bin"
    path.write_bytes(save(published[1].state_dict()))
    assert run(capsys, "weights", "verify", str(path), "--model", "nat_digits")[0] == 0


def test_a_misspelt_model_is_no_damage_of_the_file(published, capsys):
    status, out, err = run(capsys, "weights", "verify", str(published[0]), "--model", "nat_digit")
    assert (status, out) == (2, "") and "did you mean nat_digits" in err
