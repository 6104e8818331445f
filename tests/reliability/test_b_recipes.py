"""R21 to R25 as somebody types them: whatever a recipe says, nothing of it runs, and one sentence answers."""

from __future__ import annotations

import dataclasses
import os
import sys
from enum import Enum
from pathlib import Path

import numpy as np
import pytest

import zoo
from zoo.recipes.schema import RECIPES

GOOD = "model: {name: nat_digits}\ndata: {name: digits}\n"


# ---- R21


@pytest.mark.parametrize(
    "text",
    [
        "model: {_target_: evil.run}\ndata: {name: digits}",
        "model: {name: nat_digits, args: {_target_: evil.run}}\ndata: {name: digits}",
        "model: {name: evil.run}\ndata: {name: digits}",
        "model: {class_path: evil.run, init_args: {}}\ndata: {name: digits}",
        "model: {_component_: evil.run}\ndata: {name: digits}",
        "model: {name: nat_digits}\ndata: {name: evil.Data}",
        "model: {name: nat_digits}\ndata: {name: digits}\noptim: {name: evil.run}",
        "task: evil.run\nmodel: {name: nat_digits}\ndata: {name: digits}",
        "base: ../../evil.py\nmodel: {name: nat_digits}",
        "model: !!python/object/apply:evil.run []\ndata: {name: digits}",
        "model: !!python/module:evil\ndata: {name: digits}",
        "model: {name: !!python/name:evil.run }\ndata: {name: digits}",
        "model: {name: '${evil:run}'}\ndata: {name: digits}",
        "model: {name: '${oc.decode:evil}'}\ndata: {name: digits}",
    ],
)
@pytest.mark.parametrize("command", [("train",), ("recipes", "check")])
def test_r21_nothing_in_a_recipe_is_imported_or_run(home, monkeypatch, refused, text, command):
    (home / "evil.py").write_text(f"open({str(home / 'canary')!r}, 'w').close()\ndef run(*a, **k): pass\n")
    monkeypatch.syspath_prepend(home)
    (home / "r.yaml").write_text(text)
    refused(2, *command, "r.yaml")
    assert not (home / "canary").exists() and "evil" not in sys.modules and not (home / "runs").exists()


@pytest.mark.parametrize(
    "override", ["model._target_=evil.run", "model.args={_target_: evil.run}", "base=evil"]
)
def test_r21_neither_is_what_is_typed(home, refused, override):
    refused(2, "train", "tiny.yaml", override)


# ---- R22


@pytest.mark.parametrize(
    "key",
    ["optim.lr", "data.batch_size", "model.name", "optim.name", "data.root", "model.checkpoint", "task"],
)
def test_r22_no_error_shows_a_secret(home, monkeypatch, refused, capfd, key):
    monkeypatch.setenv("ZOO_TEST_SECRET", "canary-3f9a")
    sentence = refused(
        3 if key == "data.root" else 2, "train", "tiny.yaml", f"{key}=${{oc.env:ZOO_TEST_SECRET}}"
    )
    assert "canary-3f9a" not in sentence + "".join(capfd.readouterr())
    assert not any("canary" in path.read_text(errors="replace") for path in home.rglob("*") if path.is_file())


# ---- R23


def keys() -> list[tuple[str, str, type]]:
    """Every key of every task with the type that it is annotated with."""
    found = []
    for task, kind in RECIPES.items():
        for section in dataclasses.fields(kind):
            if dataclasses.is_dataclass(made := section.default_factory):
                found += [
                    (task, f"{section.name}.{field.name}", field.type) for field in dataclasses.fields(made)
                ]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("task", RECIPES)
def test_r23_a_mistyped_key_names_its_neighbour_before_any_model_is_built(home, monkeypatch, refused, task):
    monkeypatch.setattr(zoo, "create_model", None)
    for _, key, _ in (row for row in keys() if row[0] == task):
        sentence = refused(2, "train", "tiny.yaml", f"task={task}", f"{key}x=1")
        assert "unknown key" in sentence and key.rpartition(".")[2] in sentence


@pytest.mark.slow
@pytest.mark.parametrize("task", RECIPES)
def test_r23_a_value_of_another_type_is_named_with_its_key(home, monkeypatch, refused, task):
    monkeypatch.setattr(zoo, "create_model", None)
    for _, key, kind in (row for row in keys() if row[0] == task):
        if str(kind).startswith(("int", "float", "bool")) and "str" not in str(kind):
            assert key in refused(2, "train", "tiny.yaml", f"task={task}", f"{key}=[a, b]")


@pytest.mark.parametrize("arguments", ["{depths: -1}", "{depths: [1, 1]}", "{kernel_size: x}", "{kernel: 3}"])
def test_r23_arguments_of_a_model_are_checked_by_name_and_type(home, refused, arguments):
    refused(2, "train", "tiny.yaml", f"model.args={arguments}")


@pytest.mark.parametrize("arguments", ["{foo: 3}", "{lr: 3}", "{eps: x}"])
def test_r23_arguments_of_an_optimiser_too(home, refused, arguments):
    assert "optim.args" in refused(2, "train", "tiny.yaml", f"optim.args={arguments}")


# ---- R24


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"3",
        b"- a\n- b",
        b"!!set {a, b}",
        GOOD.encode() + b"model: {name: nat_mini}\n",
        b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n" + GOOD.encode(),
        b"model: " + b"[" * 3000,
        b"\xff\xfe\x00",
        b"\x89PNG\r\n\x1a\n\x00\x00",
        b"model:\n\tname: nat_digits",
        b"model: {name: nat_digits}\n---\ndata: {name: digits}",
        b"# " + b"x" * (2 << 20),
        b"model: {name: '${data.name}'}\ndata: {name: '${model.name}'}",
    ],
)
def test_r24_a_file_that_is_no_recipe(home, refused, content):
    (home / "r.yaml").write_bytes(content)
    assert len(refused(2, "train", "r.yaml")) < 500


@pytest.mark.parametrize("kind", ["missing", "folder", "loop", "pipe", "device"])
def test_r24_a_path_that_is_no_file(home, refused, kind):
    path = home / "r.yaml"
    make = {
        "missing": lambda: None,
        "folder": path.mkdir,
        "loop": lambda: path.symlink_to(path),
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
    }
    make[kind]()
    assert "r.yaml" in refused(2, "train", "r.yaml")


# ---- R25


class Level(Enum):
    SEVEN = 7


def test_r25_values_of_python_are_kept_as_plain_ones(home):
    made = zoo.recipe("tiny.yaml")
    made.data.root, made.seed, made.optim.lr = Path("images"), Level.SEVEN, np.float32(0.5)
    plain = made.plain()
    assert (plain["data"]["root"], plain["seed"], plain["optim"]["lr"]) == ("images", 7, 0.5)
    (home / "again.yaml").write_text(made.yaml())
    assert zoo.recipe("again.yaml").plain() | {"name": ""} == plain | {"name": ""}
