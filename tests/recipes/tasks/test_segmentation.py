"""Segmentation: it stops and goes on exactly, its losses and metrics are what they say."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from stops import Killed, assert_same, kill, terminate
from torch.nn import functional as F

from zoo.cli import main
from zoo.errors import ConfigError, DataError, ZooError
from zoo.recipes import api, pictures
from zoo.recipes.data.masks import IGNORE
from zoo.recipes.tasks import segmentation
from zoo.recipes.tasks.segmentation import cross_entropy, dice_loss, iou, mean_iou

STEPS = 6


@pytest.fixture
def run(masked_recipe, tmp_path, monkeypatch):
    """Train the small recipe without its pictures: run("folder", "key=value", ..., resume=...)."""
    for name in ("curves", "confusion", "class_iou", "overlays"):
        monkeypatch.setattr(pictures, name, lambda *_, **__: None)

    def train(name: str, *overrides: str, **keywords: object):
        made = api.recipe(masked_recipe, overrides)
        if "resume" not in keywords:
            keywords["run_dir"] = tmp_path / name
        return api.train(made, **keywords)

    return train


def slow(*values: object):
    """A case for the slow tests."""
    return pytest.param(*values, marks=pytest.mark.slow)


# ---- a run


def test_a_run_leaves_its_model_and_pictures(segmented):
    assert {path.name for path in segmented.iterdir()} >= {
        "config.yaml", "classes.json", "metrics.csv", "model.safetensors", "curves.png", "confusion.png",
        "iou.png", "overlays.png",
    }  # fmt: skip
    with (segmented / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "epoch", "step", "lr", "train_loss", "val_loss", "val_miou", "val_pixel_accuracy",
    ]  # fmt: skip
    assert [row["step"] for row in rows if row["val_miou"]] == ["3", "6"]
    best = torch.load(segmented / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["recipe"]["head"]["name"] == "upernet" and best["classes"] == ["ground", "light", "dark"]


def test_after_a_kill_all_goes_on_exactly(run, segmented, at_step, tmp_path):
    """At the end of an epoch; test_exact_resume has other points."""
    at_step(3, kill)
    with pytest.raises(Killed):
        run("killed")
    run("killed", resume=tmp_path / "killed")
    assert_same(segmented, tmp_path / "killed")


@pytest.mark.slow
def test_workers_change_nothing_not_even_after_a_stop(run, segmented, at_step, tmp_path):
    at_step(5, kill)
    with pytest.raises(Killed):
        run("workers", "data.workers=2")
    run("workers", "data.workers=1", resume=tmp_path / "workers")
    assert_same(segmented, tmp_path / "workers")


@pytest.mark.parametrize(("where", "validating"), [(2, False), slow(3, False), slow(1, True)])
def test_sigterm_saves_the_step_it_came_in(run, segmented, at_step, tmp_path, where, validating):
    at_step(where, terminate, validating=validating)
    with pytest.raises(SystemExit) as stopped:
        run("stopped")
    assert stopped.value.code == 143
    run("stopped", resume=tmp_path / "stopped")
    assert_same(segmented, tmp_path / "stopped")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("head.channels=16", "head.channels 8 -> 16"),
        ("data.max_side=30", "data.max_side None -> 30"),
        ("data.reduce_zero_label=true", "data.reduce_zero_label False -> True"),
        ("inference.flip=false", "inference.flip True -> False"),
    ],
)
def test_another_decoder_or_another_validation_is_another_run(run, segmented, override, words):
    with pytest.raises(ConfigError, match="; resume it with its own values") as refused:
        run("x", override, resume=segmented)
    assert words in str(refused.value)


def test_a_loss_that_is_not_finite_stops_within_its_step(run, monkeypatch, tmp_path):
    monkeypatch.setattr(segmentation, "dice_loss", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(ZooError, match=r"the loss became nan at step 1 .*images/\d\d.png"):
        run("broken")
    assert not list((tmp_path / "broken" / "checkpoints").glob("*.ckpt"))


@pytest.mark.parametrize(
    "overrides",
    [
        "head.name=semantic_fpn head.auxiliary=0 head.norm=false loss.dice=0",
        slow("head.stages=[0,2] loss.cross_entropy=0 trainer.channels_last=true data.max_side=30"),
        slow("optim.layer_decay=0.7 trainer.precision=bf16-mixed model.grad_checkpointing=true"),
        slow("inference.window=null inference.scales=[1.0] inference.flip=false augment.crop_size=40"),
    ],
)
def test_every_choice_trains(run, overrides):
    result = run("choice", "optim.epochs=1", *overrides.split())
    assert np.isfinite(result.metrics["val_loss"])
    assert 0 <= result.metrics["val_miou"] <= 1


def test_images_of_one_size_may_be_validated_together_and_others_are_one_line(run):
    with pytest.raises(DataError, match="data.val_batch_size=1"):
        run("sizes", "data.val_batch_size=2")


def test_bad_images_are_skipped_when_asked(run, masked_folder, tmp_path):
    """Each is a validation batch of its own, the first and the last of them too."""
    folder = shutil.copytree(masked_folder, tmp_path / "bad")
    bad = ["train/images/03.png", "val/images/00.png", "val/images/04.png", "val/masks/02.png"]
    for name in bad:
        (folder / name).write_bytes((folder / name).read_bytes()[:-24])
    result = run("lenient", f"data.root={folder}", "data.bad_images=skip", "optim.epochs=1")
    assert (result.evaluation.images, result.evaluation.skipped) == (2, 3)
    assert len((result.folder / "bad_files.txt").read_text().splitlines()) == 4


# ---- what is wrong is known before a model is built


@pytest.fixture
def no_model(monkeypatch):
    def build(*_, **__):
        raise AssertionError("a model was built")

    monkeypatch.setattr(segmentation, "build_backbone", build)


@pytest.fixture
def own_folder(masked_folder, tmp_path):
    return shutil.copytree(masked_folder, tmp_path / "own")


def test_a_wrong_label_names_file_and_number(run, own_folder, no_model):
    file = own_folder / "train" / "masks" / "04.png"
    mask = np.array(Image.open(file))
    mask[5, 5] = 7
    Image.fromarray(mask).save(file)
    with pytest.raises(DataError, match=r"masks/04.png holds 7, which is none of the 3 classes \(0 to 2\)"):
        run("x", f"data.root={own_folder}")


def test_a_missing_mask_names_the_image(run, own_folder, no_model):
    (own_folder / "val" / "masks" / "02.png").unlink()
    with pytest.raises(DataError, match=r"1 of 5 images in .*val/images have no mask .*: 02.png"):
        run("x", f"data.root={own_folder}")


def test_a_mask_of_another_size_names_both(run, own_folder, no_model):
    Image.new("L", (9, 8)).save(own_folder / "train" / "masks" / "00.png")
    with pytest.raises(DataError, match=r"masks/00.png has 9x8 pixels and its image .*00.png 26x24"):
        run("x", f"data.root={own_folder}")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.num_classes=4"], r"model.num_classes=4, but 3 classes are listed"),
        (["loss.class_weights=[1, 1]"], r"class_weights has 2 numbers and the data 3 classes"),
        (["data.root=null"], "needs data.root=FOLDER"),
        (["data.classes=nowhere.txt"], "no file nowhere.txt"),
    ],
)
def test_counts_that_do_not_fit_are_one_line(run, no_model, overrides, words):
    with pytest.raises((ConfigError, DataError), match=words) as refused:
        run("x", *overrides)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("head.name=upernett", "did you mean upernet"),
        ("augment.scale=[2,1]", "smaller number to the larger"),
        ("inference.stride=40", "leaves gaps between windows of 32"),
        ("inference.window=null inference.stride=4", "give inference.window"),
        ("data.batch_size=1", "too few for the batch norm"),
        ("loss.dice=0 loss.cross_entropy=0", "nothing to minimise"),
        ("augment.mixup=0.8", "unknown key 'augment.mixup'"),
        ("head.stages=[0.5]", "head.stages"),
        ("task=segmentatio", "did you mean segmentation"),
    ],
)
def test_a_wrong_recipe_is_one_line(masked_recipe, override, words):
    with pytest.raises(ConfigError, match=words) as refused:
        api.recipe(masked_recipe, override.split())
    assert "\n" not in str(refused.value)


# ---- loss and metrics


def random_scores(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.float64).log_softmax(1)
    targets = torch.randint(-1, 4, (2, 5, 6), generator=generator)
    return scores, targets


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 0.0, 2.0], dtype=torch.float64)])
def test_cross_entropy_is_torchs_mean_over_known_pixels(weights):
    scores, targets = random_scores()
    expected = F.cross_entropy(scores, targets, weights, ignore_index=IGNORE)
    assert cross_entropy(scores, targets, weights).item() == pytest.approx(expected.item(), rel=1e-6)


def test_dice_is_the_definition():
    scores, targets = random_scores()
    losses = []
    for label in range(4):
        p, t, known = scores.exp()[:, label], targets == label, targets != IGNORE
        losses.append(1 - 2 * (p * t).sum() / ((p * known).sum() + t.sum()))
    assert dice_loss(scores, targets).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)


@pytest.mark.parametrize("loss", [cross_entropy, dice_loss])
def test_without_a_known_pixel_the_loss_is_zero_and_so_is_its_gradient(loss):
    scores = torch.randn(1, 3, 4, 4).log_softmax(1).requires_grad_()
    value = loss(scores, torch.full((1, 4, 4), IGNORE))
    value.backward()
    assert value.item() == 0 and scores.grad.isfinite().all() and not scores.grad.any()


@pytest.mark.parametrize("loss", [cross_entropy, dice_loss])
def test_a_perfect_answer_costs_nothing(loss):
    targets = random_scores()[1]
    scores = (100.0 * F.one_hot(targets.clamp(min=0), 4).movedim(-1, 1)).log_softmax(1)
    assert loss(scores, targets).item() == pytest.approx(0, abs=1e-6)


def test_iou_counts_what_is_common_and_leaves_out_what_does_not_occur():
    confusion = np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    assert iou(confusion)[:2].tolist() == [6 / 9, 3 / 6] and np.isnan(iou(confusion)[2])
    assert mean_iou(confusion) == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert mean_iou(np.zeros((2, 2))) == 0


# ---- use


def test_evaluation_repeats_what_training_reported(run, masked_folder):
    result = run("reported", "optim.epochs=1")
    again = api.evaluate(result.folder)
    assert again.metrics() == result.metrics
    with (result.folder / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["val_miou"]][-1]
    for name, value in result.metrics.items():
        assert float(logged[name]) == pytest.approx(value, rel=1e-5)
    assert again.images == 5 and len(again.worst) == 5 and again.worst[0][1] <= again.worst[-1][1]
    known = sum((np.array(Image.open(file)) != 255).sum() for file in masked_folder.glob("val/masks/*"))
    assert again.confusion.sum() == known
    assert api.evaluate(result.folder, masked_folder).metrics() == result.metrics
    assert api.evaluate(result.folder, masked_folder / "train").images == 13


def test_a_mask_has_the_size_of_its_image(segmented, masked_folder):
    files = sorted((masked_folder / "val" / "images").glob("*.png"))
    for file, prediction in zip(files, api.predict(segmented, files), strict=True):
        with Image.open(file) as image:
            assert prediction.mask.shape == (image.height, image.width)
        assert prediction.mask.max() < 3
        assert sum(prediction.shares) == pytest.approx(1)
        assert prediction.shares == sorted(prediction.shares, reverse=True)


def test_the_command_line_writes_masks_and_overlays(segmented, masked_folder, tmp_path, capsys):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no")
    images = [
        str(masked_folder / "val" / "images" / "00.png"),
        str(masked_folder / "train" / "images" / "00.png"),
    ]
    output = tmp_path / "out"
    status = main(
        ["predict", str(segmented), *images, str(bad), "--output", str(output), "--json", str(tmp_path / "p")]
    )
    printed = capsys.readouterr()
    assert status == 3 and len(printed.out.splitlines()) == 2 and "bad.png" in printed.err
    assert {file.name for file in output.iterdir()} == {
        "00_mask.png", "00_overlay.png", "00__mask.png", "00__overlay.png",
    }  # fmt: skip
    expected = api.predict(segmented, images[0])[0]
    with Image.open(output / "00_mask.png") as mask:
        assert mask.mode == "P" and (np.asarray(mask) == expected.mask).all()
    assert json.loads((tmp_path / "p").read_text())["predictions"][0]["classes"] == expected.classes
    assert main(["predict", str(segmented), images[0], "--explain", str(output)]) == 2
    assert "--explain is for models that classify" in capsys.readouterr().err


def test_eval_says_miou_and_every_class(segmented, tmp_path, capsys):
    assert main(["eval", str(segmented), "inference.scales=[1.0]", "--json", str(tmp_path / "e")]) == 0
    assert "mIoU" in capsys.readouterr().out
    facts = json.loads((tmp_path / "e").read_text())
    assert list(facts["class_iou"]) == ["ground", "light", "dark"]


@pytest.mark.parametrize("override", ["data.image_size=48", "data.max_side=20", "inference.flip=false"])
def test_an_evaluation_sees_the_images_as_it_is_told(segmented, override):
    assert api.evaluate(segmented, overrides=[override]).loss != api.evaluate(segmented).loss


def test_an_evaluation_takes_no_other_decoder(segmented):
    with pytest.raises(ConfigError, match=r"head.channels=16 is of the network .* data.\*, inference.\*$"):
        api.evaluate(segmented, overrides=["head.channels=16"])


def test_colours_of_overlays_are_where_the_classes_are():
    image, mask = Image.new("RGB", (4, 2), (100, 100, 100)), np.array([[-1, 0, 1, 2]] * 2)
    pixels = np.asarray(pictures.overlay(image, mask))
    assert (pixels[:, 0] == 100).all()
    assert (pixels[0, 1:] == np.round((100 + pictures.palette(3).astype(float)) / 2)).all()
    many = np.arange(300).reshape(20, 15)
    assert np.asarray(pictures.mask_image(many)).max() == 299


# ---- the recipes that come with it


@pytest.mark.slow
def test_the_digit_scenes_are_learnt(tmp_path):
    """After two of the recipe's four epochs; what all of them reach is in the recipe."""
    made = api.recipe("segmentation/digit_scenes", overrides=["optim.epochs=2"])
    result = api.train(made, run_dir=tmp_path / "scenes")
    assert result.metrics["val_miou"] >= 0.78
