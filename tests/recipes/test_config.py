"""A recipe is either right or refused in one sentence, before anything is built; and nothing in it runs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml

from zoo.errors import ConfigError
from zoo.recipes.config import all_keys, check, find_recipe, head_comment, recipe, recipe_names
from zoo.recipes.schema import RECIPES, Recipe, put

GOOD = "model: {name: nat_digits}\ndata: {name: digits}\n"


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "mine.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.fixture
def good(tmp_path) -> Path:
    return write(tmp_path, GOOD)


def refused(file: Path | str, *overrides: str, **keywords: bool) -> str:
    """The message of the refusal, which must be one sentence on one line and name no internals."""
    with pytest.raises(ConfigError) as caught:
        recipe(file, overrides, **keywords)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert "full_key" not in message and "Traceback" not in message
    return message


def leaves(kind: type = Recipe, prefix: str = "") -> list[tuple[str, dataclasses.Field, object]]:
    """Every field of a recipe: dotted key, field, type."""
    found = []
    for item in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[item.name]
        if dataclasses.is_dataclass(hint):
            found += leaves(hint, f"{prefix}{item.name}.")
        else:
            found.append((f"{prefix}{item.name}", item, hint))
    return found


ALL = leaves()
NUMBERS = [(key, item, hint) for key, item, hint in ALL if "low" in item.metadata]
NAMES = [key for key, item, _ in ALL if "names" in item.metadata]


def literal(hint: object, value: float) -> str:
    if "list" in str(hint):
        return f"[{value}, {value}]" if "." in str(value) or value != value else f"[{value}, {value}]"
    return str(value)


# ---- every field, found by looking


def test_every_number_has_limits_and_every_field_is_found():
    assert len(ALL) == len(all_keys()) > 50
    unlimited = [key for key, item, hint in ALL if "low" not in item.metadata and hint in (int, float)]
    assert unlimited == []


@pytest.mark.parametrize("key", [key for key, _, _ in ALL])
def test_a_misspelt_key_names_the_nearest_one(good, key):
    assert f"did you mean {key}" in refused(good, f"{key}x=1") or key == "model.args"


@pytest.mark.parametrize(("key", "hint"), [(key, hint) for key, _, hint in ALL])
def test_a_wrong_type_is_named_with_its_key(tmp_path, key, hint):
    content = yaml.safe_load(GOOD)
    put(content, key, {"a": {"b": "c"}} if "dict" not in str(hint) else 7)
    message = refused(write(tmp_path, yaml.safe_dump(content)), names=False)
    assert key in message


@pytest.mark.parametrize(("key", "item", "hint"), NUMBERS, ids=[key for key, _, _ in NUMBERS])
def test_numbers_outside_their_limits_are_refused_with_the_limit(good, key, item, hint):
    limits = item.metadata
    length = limits["length"] or 1
    wrong: list[float] = []
    if limits["low"] > float("-inf"):
        wrong.append(limits["low"] - 1)
    if limits["above"] > float("-inf"):
        wrong.append(limits["above"])
    if limits["high"] < float("inf"):
        wrong.append(limits["high"] + 1)
    if "float" in str(hint):
        wrong += [float("nan"), float("inf")]
    assert wrong, f"{key} takes any number"
    for value in wrong:
        whole = "float" not in str(hint)
        text = str(int(value)) if whole else {"nan": ".nan", "inf": ".inf"}.get(str(value), str(value))
        text = f"[{', '.join([text] * length)}]" if "list" in str(hint) else text
        message = refused(good, f"{key}={text}", names=False)
        assert key in message and "must be" in message


@pytest.mark.parametrize("key", NAMES)
def test_an_unknown_name_is_refused(good, key):
    assert key in refused(good, f"{key}=nonesuch-at-all")


@pytest.mark.parametrize(
    ("key", "near", "name"),
    [
        ("model.name", "nat_digit", "nat_digits"),
        ("optim.name", "adamww", "adamw"),
        ("data.name", "digit", "digits"),
        ("optim.schedule", "cosin", "cosine"),
        ("trainer.precision", "bf16-mixd", "bf16-mixed"),
    ],
)
def test_a_misspelt_name_suggests_the_near_one(good, key, near, name):
    assert f"did you mean {name}" in refused(good, f"{key}={near}")


@pytest.mark.parametrize("notation", ["rand-x9", "bogus", ""])
def test_only_timms_notation_is_an_augmentation(good, notation):
    assert "augment.auto_augment" in refused(good, f"augment.auto_augment='{notation}'")


# ---- what must fit together


def test_a_file_to_start_from_takes_the_place_of_the_weights_of_the_recipe():
    start = lambda *told: recipe("classification/folder", ["data.root=x", *told]).model  # noqa: E731
    assert start().pretrained
    assert start("model.checkpoint=null").pretrained
    model = start("model.checkpoint=file.safetensors")
    assert (model.pretrained, model.checkpoint) == (False, "file.safetensors")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.batch_size=7", "augment.mixup=0.8"], "must be even"),
        (["augment.crop_scale=[1.0, 0.5]"], "smaller number to the larger"),
        (["augment.crop_scale=[0.5]"], "2 are wanted"),
        (["data.mean=[0.5, 0.5]"], "3 are wanted"),
        (["optim.epochs=3", "optim.warmup_epochs=4"], "longer than"),
        (["optim.epochs=3", "optim.warmup_epochs=1", "trainer.val_every=4"], "more than all 3 epochs"),
        (
            ["model.pretrained=true", "model.checkpoint=x.pth"],
            "both given; model.pretrained=false starts from",
        ),
        (["data.download=true"], "needs none"),
        (["optim.ema=0.9", "trainer.strategy=fsdp"], "optim.ema=null"),
        (["optim.ema=0.9", "trainer.precision=bf16-true"], "too coarse"),
        (["name=../up"], "folder name"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(good, overrides, words):
    assert words in refused(good, *overrides, names=False)


@pytest.mark.parametrize("devices", [0, -5, "cat", "0,x", ""])
def test_devices_are_checked_before_anything_runs(good, devices):
    with pytest.raises(ConfigError, match="trainer.devices"):
        recipe(good, [f"trainer.devices={devices}"])


@pytest.mark.parametrize("devices", [1, 8, -1, "auto", "'0,1'", "'3,'"])
def test_devices_as_lightning_counts_them(good, devices):
    recipe(good, [f"trainer.devices={devices}"])


@pytest.mark.parametrize("text", ["", "optim.lr", "=3", "a..b=1", "optim.lr=[", "optim=3", "base=x"])
def test_an_override_must_be_key_equals_value(good, text):
    refused(good, text, names=False)


def test_yaml_values_come_through_with_their_types(good):
    made = recipe(
        good,
        ["optim.lr=1e-3", "trainer.devices=2", "data.mean=[0, 0.5, 1]", "model.args={dilations: [[1, 2]]}"],
    )
    assert (made.optim.lr, made.trainer.devices, made.data.mean) == (0.001, 2, [0.0, 0.5, 1.0])
    assert made.model.args == {"dilations": [[1, 2]]}
    assert made.name == "mine"


@pytest.mark.parametrize("text", ["2024_01_05", "007", "on", "1e3", "a #b", "~x", "- x", "My: photos"])
def test_a_text_is_what_was_typed(good, text):
    assert recipe(good, [f"data.root={text}"]).data.root == text
    assert recipe(good, [f"data.root='{text}'"]).data.root == text


@pytest.mark.parametrize("text", ["[odd]/x", "[odd]", "@x", "{a}/b", "{a: b}", "*/x", "'tis/x", "\xfc"])
def test_a_path_needs_no_quotes(good, text):
    made = recipe(good, [f"data.root={text}"])
    assert made.data.root == text
    good.write_text(made.yaml(), encoding="utf-8")
    assert recipe(good).data.root == text


def test_a_path_that_is_not_utf8_is_refused_by_its_key(good):
    message = refused(good, "data.root=l\udcfc")
    assert "override 'data.root=l\\udcfc' is not UTF-8" in message


def test_a_path_at_home_is_found_there(good, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    made = recipe(good, ["data.root=~/photos", "model.checkpoint=~/w.pth"])
    assert (made.data.root, made.model.checkpoint) == ("/home/me/photos", "/home/me/w.pth")
    assert recipe(good, ["data.root=a~/b"]).data.root == "a~/b"
    good.write_text(recipe(good, ["data.root=there"]).yaml().replace("there", "~/photos"), encoding="utf-8")
    assert recipe(good).data.root == "/home/me/photos", "in a file as behind a key"


def test_a_text_that_may_be_missing_can_be_taken_away(good):
    assert recipe(good, ["model.checkpoint=w.pth", "model.checkpoint=null"]).model.checkpoint is None


@pytest.mark.parametrize("key", [key for key, _, _ in ALL if key != "task"])
def test_what_is_given_later_must_be_given_and_is_shown_as_such(tmp_path, key):
    content = yaml.safe_load(GOOD)
    put(content, key, "???")
    file = write(tmp_path, yaml.safe_dump(content))
    assert refused(file, names=False) == f"{file}: {key} is not given; add {key}=... to the command"
    made = recipe(file, allow_missing=True, names=False)
    if key != "name":  # that of the file stands in for it
        assert made.shown(key) == "???"


def test_what_is_given_later_is_judged_by_what_is_given(tmp_path):
    (tmp_path / "parent.yaml").write_text(GOOD + "optim: {epochs: 7, lr: 0.5, warmup_epochs: 0}\n")
    file = write(tmp_path, "base: parent.yaml\noptim:\n  epochs: ???\n  lr: ???\n  warmup_epochs: 200\n")
    assert "optim.lr is not given" in refused(file, "optim.epochs=300", names=False)
    made = recipe(file, ["optim.epochs=300", "optim.lr=0.25"], names=False)
    assert (made.optim.epochs, made.optim.lr) == (300, 0.25)
    made = recipe(file, allow_missing=True, names=False)  # 200 is not compared with a default
    assert "epochs: ???" in made.yaml() and "lr: ???" in made.yaml()
    assert "optim.lr is not given" in refused(file, "optim.epochs=300", "optim.lr=???", names=False)


# ---- files


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"# only a comment\n",
        b"4",
        b"null",
        b"- a\n- b\n",
        b"!!set {a}",
        b"model: {name: nat_digits}\nmodel: {name: nat_mini}\n",
        b"model: " + b"[" * 3000,
        b"model: " + b"{a: " * 100_000,
        b"a: " + b"- " * 200_000,
        b"\xff\xfe\x00m",
        b"model: [1]\n",
        b"\tmodel: 1\n",
        b"model: {name: 'unclosed\n",
        b"x" * 2_000_000,
        b"a: &a [1,1,1,1,1,1,1,1,1]\n"
        + b"".join(b"%c: &%c [*%c,*%c,*%c,*%c]\n" % (98 + i, 98 + i, *[97 + i] * 4) for i in range(9)),
    ],
    ids=lambda content: repr(content[:14]),
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(tmp_path, content):
    refused(write(tmp_path, content), names=False)


@pytest.mark.parametrize("key", ["1", "true", "1.5"])
def test_a_key_that_is_no_text_is_named(tmp_path, key):
    file = write(tmp_path, f"model:\n  name: nat_digits\n  args: {{{key}: 3}}\ndata: {{name: digits}}\n")
    message = refused(file, names=False)
    assert f"model.args has the key {key.capitalize()}, which is no text; write it in quotes" in message
    made = recipe(write(tmp_path, file.read_text().replace(f"{{{key}:", f"{{'{key}':")), names=False)
    assert made.model.args == {key: 3}


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "no recipe file" in refused(tmp_path / "none.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert "is a folder" in refused(tmp_path / "folder.yaml")


def test_a_misspelt_recipe_suggests_the_near_one():
    assert "did you mean classification/digits" in refused("classification/digts")
    assert "did you mean classification/digits" in refused("digits")


def test_a_base_gives_what_the_file_leaves_out(tmp_path):
    (tmp_path / "parent.yaml").write_text("data: {name: digits}\noptim: {lr: 0.5, epochs: 7}\n")
    made = recipe(
        write(tmp_path, "base: parent.yaml\nmodel: {name: nat_digits}\noptim: {lr: 0.25}\n"), names=False
    )
    assert (made.optim.lr, made.optim.epochs, made.data.name) == (0.25, 7, "digits")


@pytest.mark.parametrize("parent", ["base: mine.yaml\n" + GOOD, "base: other.yaml\n" + GOOD])
def test_a_base_has_no_base(tmp_path, parent):
    (tmp_path / "parent.yaml").write_text(parent)
    file = write(tmp_path, "base: parent.yaml\n" + GOOD)
    assert "one level" in refused(file)


# ---- nothing runs, nothing leaks


@pytest.mark.parametrize(
    "text",
    [
        "model: {_target_: os.system}",
        "model: {name: nat_digits, args: {class_path: os.system}}",
        "model: {name: nat_digits, args: {norm: torch.nn.Identity}}",
        "model: {name: nat_digits, args: {a: [{_target_: x}]}}",
        "model: {name: nat_digits, args: {pretrained_cfg: {url: x}}}",
        "model: {name: nat_digits, args: {a: 'https://example.org/x'}}",
        "model: !!python/object/apply:os.system [true]",
        "model: {name: !!python/name:os.system }",
        "optim: {lr: '${oc.create:3}'}",
        "optim: {lr: '${eval:1+1}'}",
    ],
)
def test_nothing_in_a_recipe_names_code(tmp_path, text):
    refused(write(tmp_path, text), names=False)


def test_reading_a_recipe_imports_nothing_it_names(tmp_path):
    """Neither what a hostile file names nor torch, which would make a typing mistake cost seconds."""
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    file = write(tmp_path, "model: {name: nat_digits, args: {a: trap.run}}\ndata: {name: digits}")
    code = (
        "import sys\n"
        "from zoo.errors import ConfigError\n"
        "from zoo.recipes.config import recipe\n"
        f"for name, override in (({str(file)!r}, []), ('classification/digits', ['optim.lrr=1'])):\n"
        "    try:\n"
        "        recipe(name, override)\n"
        "    except ConfigError:\n"
        "        print('refused')\n"
        "print([name for name in ('trap', 'torch', 'timm') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.split("\n")[:3] == ["refused", "refused", "[]"], result.stderr


def test_an_interpolation_is_used_and_never_saved(good, monkeypatch):
    monkeypatch.setenv("ZOO_TEST_SECRET", "s3cr3t-value")
    made = recipe(good, ["data.root=${oc.env:ZOO_TEST_SECRET}"], names=False)
    assert made.data.root == "s3cr3t-value"
    assert made.shown("data.root") == "${oc.env:ZOO_TEST_SECRET}"
    assert "s3cr3t" not in made.yaml()
    assert made.conceal("no folder s3cr3t-value") == "no folder ${oc.env:ZOO_TEST_SECRET}"
    made.data.root = "/somewhere/else"
    assert "/somewhere/else" in made.yaml()


@pytest.mark.parametrize("key", [key for key, _, hint in ALL if "dict" not in str(hint)])
def test_no_error_shows_what_an_interpolation_stood_for(good, monkeypatch, key):
    monkeypatch.setenv("ZOO_TEST_SECRET", "s3cr3t-value/..")
    try:
        recipe(good, [f"{key}=${{oc.env:ZOO_TEST_SECRET}}"], names=False)
    except ConfigError as error:
        assert "s3cr3t" not in str(error)
        assert "ZOO_TEST_SECRET" in str(error)


def test_a_variable_that_is_not_set_is_named(good):
    assert "environment variable ZOO_NOT_SET" in refused(good, "data.root=${oc.env:ZOO_NOT_SET}", names=False)


# ---- the recipes that come with the zoo


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_is_right_and_says_what_to_expect(name):
    made = recipe(name, allow_missing=True)
    check(made)
    head = head_comment(find_recipe(name))
    assert made.model.name in head or "base" in head.lower()
    assert f"zoo train {name}" in head


def test_a_recipe_survives_being_saved(tmp_path):
    made = recipe("classification/digits")
    again = recipe(write(tmp_path, made.yaml()))
    assert again.plain() == made.plain()


PUBLISHED = {  # top-1, drop path, epochs, weight decay, start
    "nat_mini": (81.8, 0.2, 300, 0.05, None),
    "nat_tiny": (83.2, 0.2, 300, 0.05, None),
    "nat_small": (83.7, 0.3, 300, 0.05, None),
    "nat_base": (84.3, 0.5, 300, 0.05, None),
    "dinat_mini": (81.8, 0.2, 300, 0.05, None),
    "dinat_tiny": (82.7, 0.2, 300, 0.05, None),
    "dinat_small": (83.8, 0.3, 300, 0.05, None),
    "dinat_base": (84.4, 0.5, 300, 0.05, None),
    "dinat_large": (86.6, 0.35, 30, 1e-4, "dinat_large_21k"),
    "dinat_large_384": (87.4, 0.35, 30, 1e-10, "dinat_large_21k"),
    "dinat_large_384_11x11": (87.5, 0.35, 30, 1e-10, "dinat_large_21k_11x11"),
    "dinat_s_tiny": (81.8, 0.2, 300, 0.05, None),
    "dinat_s_small": (83.5, 0.3, 300, 0.05, None),
    "dinat_s_base": (83.8, 0.5, 300, 0.05, None),
    "dinat_s_large": (86.5, 0.35, 30, 1e-4, "dinat_s_large_21k"),
    "dinat_s_large_384": (87.4, 0.35, 30, 1e-5, "dinat_s_large_21k"),
    "nat_isotropic_small": (80.0, 0.1, 300, 0.05, None),
    "dinat_isotropic_small": (80.8, 0.1, 300, 0.05, None),
    "vitrpb_small": (81.2, 0.1, 300, 0.05, None),
    "nat_isotropic_base": (81.6, 0.4, 300, 0.05, None),
    "dinat_isotropic_base": (82.1, 0.4, 300, 0.05, None),
    "vitrpb_base": (82.5, 0.4, 300, 0.05, None),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_settings(model):
    top1, drop_path, epochs, weight_decay, start = PUBLISHED[model]
    made = recipe(f"classification/{model}")
    optim, augment = made.optim, made.augment
    assert made.model.name == model
    assert f"published top-1 {top1} %" in head_comment(find_recipe(f"classification/{model}"))
    assert (made.model.drop_path_rate, optim.epochs, optim.weight_decay) == (drop_path, epochs, weight_decay)
    assert made.model.checkpoint == start
    assert (optim.name, optim.betas, optim.clip_grad) == ("adamw", [0.9, 0.999], 5.0)
    assert (augment.auto_augment, augment.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert augment.label_smoothing == 0.1
    if start is None:
        slow = model in ("nat_isotropic_base", "dinat_isotropic_base", "vitrpb_base")
        assert (optim.lr, optim.lr_base_batch, optim.schedule) == (1e-3, 1024, "cosine")
        assert (optim.warmup_epochs, optim.cooldown_epochs) == (50 if slow else 20, 10)
        assert (optim.warmup_lr, optim.min_lr, optim.ema) == (1e-6, 5e-6, 0.9998 if slow else None)
        assert (augment.mixup, augment.cutmix, augment.color_jitter) == (0.8, 1.0, 0.4)
    else:
        assert (optim.lr, optim.lr_base_batch, optim.schedule) == (5e-5, 512, "linear")
        assert (optim.warmup_epochs, optim.cooldown_epochs, made.trainer.precision) == (0, 0, "32-true")
        assert (augment.mixup, augment.cutmix) == (0.0, 0.0)
        assert made.data.crop_pct == (1.0 if "384" in model else 0.875)


def test_every_model_with_a_published_accuracy_has_its_recipe():
    from zoo.weights.manifest import all_entries

    published = {
        entry.model for entry in all_entries() if (entry.metric or {}).get("dataset") == "ImageNet-1k"
    }
    assert len(published) > 50
    assert published <= {name.rpartition("/")[2] for name in recipe_names()}


def test_values_given_in_python_are_saved_as_plain_ones():
    import enum

    import numpy as np
    import torch

    made = recipe("classification/digits")
    made.data.root = Path("/data")
    made.model.args = {"a": np.float32(0.5), "b": (1, np.int64(2)), "c": enum.IntEnum("Level", "LOW").LOW}
    made.optim.lr = torch.tensor(0.25)
    plain = made.plain()
    assert plain["data"]["root"] == "/data"
    assert plain["model"]["args"] == {"a": 0.5, "b": [1, 2], "c": 1}
    assert {type(value) for value in (plain["optim"]["lr"], *plain["model"]["args"].values())} == {
        float,
        list,
        int,
    }
    made.model.args = {"a": object()}
    with pytest.raises(ConfigError, match="plain values only"):
        made.plain()


# ---- segmentation


@pytest.mark.parametrize("kind", RECIPES.values(), ids=RECIPES)
def test_every_number_of_every_task_has_limits(kind):
    fields = leaves(kind)
    assert len(fields) == len(all_keys(kind))
    assert [key for key, item, hint in fields if "low" not in item.metadata and hint in (int, float)] == []


PUBLISHED_ADE20K = {  # mIoU, with several scales, drop path, dilations of the third stage, pixels
    "nat_mini": (45.1, 46.4, 0.2, None, 512),
    "nat_tiny": (47.1, 48.4, 0.3, None, 512),
    "nat_small": (48.0, 49.5, 0.5, None, 512),
    "nat_base": (48.5, 49.7, 0.5, None, 512),
    "dinat_mini": (45.8, 47.2, 0.2, 6, 512),
    "dinat_tiny": (47.8, 48.8, 0.3, 18, 512),
    "dinat_small": (48.9, 49.9, 0.5, 18, 512),
    "dinat_base": (49.6, 50.4, 0.5, 18, 512),
    "dinat_large": (54.0, 54.9, 0.3, 18, 640),
    "dinat_s_tiny": (46.0, 47.4, 0.3, 6, 512),
    "dinat_s_small": (48.6, 49.9, 0.3, 18, 512),
    "dinat_s_base": (49.4, 50.2, 0.3, 18, 512),
    "dinat_s_large": (53.4, 54.6, 0.3, 18, 640),
}


@pytest.mark.parametrize("model", PUBLISHED_ADE20K)
def test_published_settings_for_ade20k(model):
    miou, several, drop_path, blocks, pixels = PUBLISHED_ADE20K[model]
    made = recipe(f"segmentation/{model}_ade20k", ["data.root=/data"])
    head = head_comment(find_recipe(f"segmentation/{model}_ade20k"))
    assert f"published mIoU {miou} ({several} multi-scale)" in head
    optim = made.optim
    assert (made.model.name, made.model.drop_path_rate) == (model, drop_path)
    assert (optim.lr, optim.lr_base_batch, optim.weight_decay, optim.schedule) == (6e-5, 16, 0.01, "linear")
    steps = 20210 // 16
    assert abs(optim.epochs * steps - 160_000) < steps and abs(optim.warmup_epochs * steps - 1500) < 10
    assert (made.head.name, made.head.channels, made.head.auxiliary) == ("upernet", 512, 256)
    assert (made.data.image_size, made.data.max_side) == (pixels, 4 * pixels)
    assert (made.augment.scale, made.augment.max_class_share) == ([0.5, 2.0], 0.75)
    assert (made.model.checkpoint is None) == (pixels == 512)
    if blocks is None:
        assert made.model.args == {}
        return
    from zoo import create_model

    dilations = made.model.args["dilations"]
    assert len(dilations[2]) == blocks and max(dilations[0]) == pixels // 32
    if pixels == 512:
        create_model(model, num_classes=0, device="meta", **made.model.args)


UPERNET = {  # mIoU, with several scales (None: nobody says), drop path
    "biformer_small": (49.8, 50.8, 0.3),
    "biformer_base": (51.0, 51.7, 0.4),
    "davit_tiny": (46.3, None, 0.3),
    "davit_small": (48.8, None, 0.3),
    "davit_base": (49.4, None, 0.3),
    "dat_tiny": (45.54, None, 0.2),
    "dat_small": (48.31, None, 0.3),
    "dat_base": (49.38, None, 0.5),
    "dat_plus_tiny": (None, None, 0.3),
    "dat_plus_small": (None, None, 0.5),
    "dat_plus_base": (None, 51.5, 0.7),
    "agent_swin_tiny": (46.68, None, 0.3),
    "agent_swin_small": (48.08, None, 0.3),
    "agent_swin_base": (48.73, None, 0.5),
}
SEMANTIC_FPN = {  # mIoU, drop path, thousands of steps, images in each
    "biformer_small": (48.9, 0.15, 80, 32),
    "biformer_base": (49.9, 0.3, 80, 32),
    "dat_plus_tiny": (None, 0.3, 40, 32),
    "dat_plus_small": (None, 0.4, 40, 32),
    "dat_plus_base": (None, 0.7, 40, 32),
    "agent_pvt_tiny": (40.18, 0.1, 40, 16),
    "agent_pvt_small": (44.18, 0.1, 40, 16),
    "agent_pvt_medium": (44.3, 0.2, 40, 16),
    "agent_pvt_large": (46.52, 0.1, 40, 16),
}
DENSE = {  # what these families change for dense prediction, with the same weights
    "biformer": {"n_win": 8},
    "dat": {"input_size": 512},
    "agent_swin": {"agent_shapes": [[9, 9], [12, 12], [14, 14], [7, 7]]},
    "agent_pvt": {"agent_shapes": [[12, 12], [16, 16], [28, 28], [28, 28]]},
}


def published(name: str, model: str) -> Recipe:
    """The recipe of a model for ADE20K, looked at for what all of them share."""
    from zoo import create_model

    made = recipe(f"segmentation/{name}", ["data.root=/data"])
    assert made.model.name == model and made.model.pretrained
    dense = dict(DENSE.get(model.rpartition("_")[0], {}))
    if model == "agent_swin_small":  # whose third stage has no agents
        dense["agent_shapes"] = [[9, 9], [12, 12], [7, 7], [7, 7]]
    assert made.model.args == dense
    if dense and model.endswith(("tiny", "small")):
        create_model(model, num_classes=0, device="meta", **dense)
    return made


def says(miou: float | None) -> str:
    """How a head comment gives a figure, or that there is none."""
    return "published mIoU: unknown here" if miou is None else f"published mIoU {miou}"


@pytest.mark.parametrize("model", UPERNET)
def test_published_settings_of_upernet(model):
    miou, several, drop_path = UPERNET[model]
    made = published(f"{model}_ade20k", model)
    head = head_comment(find_recipe(f"segmentation/{model}_ade20k"))
    assert says(miou) in head and "arXiv:" in head + head_comment(find_recipe("segmentation/ade20k_fpn"))
    assert (f"{several} multi-scale" in head) == (several is not None)
    assert made.model.drop_path_rate == drop_path
    assert (made.optim.lr, made.optim.lr_base_batch, made.optim.epochs) == (6e-5, 16, 127)
    assert (made.head.name, made.head.channels, made.head.auxiliary) == ("upernet", 512, 256)


@pytest.mark.parametrize("model", SEMANTIC_FPN)
def test_published_settings_of_semantic_fpn(model):
    miou, drop_path, thousands, images = SEMANTIC_FPN[model]
    made = published(f"{model}_ade20k_fpn", model)
    optim = made.optim
    assert says(miou) in head_comment(find_recipe(f"segmentation/{model}_ade20k_fpn"))
    assert made.model.drop_path_rate == drop_path
    steps = 20210 // images
    assert abs(optim.epochs * steps - 1000 * thousands) < steps
    assert (optim.lr, optim.lr_base_batch, optim.weight_decay) == (2e-4, images, 1e-4)
    assert 8 * made.data.batch_size == images
    routed = model.startswith("biformer")
    assert (optim.schedule, optim.min_lr) == (("cosine", 2e-12) if routed else ("poly", 0.0))
    assert abs(optim.warmup_epochs * steps - (1000 if routed else 0)) < 10
    assert (made.head.name, made.head.channels, made.head.auxiliary) == ("semantic_fpn", 128, 0)
    assert made.head.norm != model.startswith("agent_pvt")


def test_every_family_has_its_recipes_for_ade20k():
    from fnmatch import filter as matching

    names = [name.rpartition("/")[2] for name in recipe_names() if "ade20k" in name]
    tables = {f"{name}_ade20k" for name in (*PUBLISHED_ADE20K, *UPERNET)}
    tables |= {f"{name}_ade20k_fpn" for name in SEMANTIC_FPN}
    assert set(names) == tables | {"ade20k", "ade20k_fpn"}
    for family in ("nat", "dinat", "biformer", "davit", "dat", "dat_plus", "agent_swin", "agent_pvt"):
        assert matching(names, f"{family}_*"), family
