"""What a run left can be evaluated and used, wherever it is, and nothing else passes for it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file

from zoo.errors import ConfigError, DataError, IntegrityError, ResourceError
from zoo.recipes import api
from zoo.recipes.data.transforms import InputSettings
from zoo.recipes.judging import Judge, distances
from zoo.recipes.run_folder import Trained, load_trained


@pytest.fixture(params=["folder", "model.safetensors", "checkpoints/best.ckpt", "checkpoints/last.ckpt"])
def source(request, finished) -> str:
    return str(finished if request.param == "folder" else finished / request.param)


def test_every_form_of_a_run_can_be_evaluated_and_used(source, image_folder):
    result = api.evaluate(source)
    assert result.images == 10 and result.classes == ["dark", "light"]
    assert result.confusion.sum() == 10 and np.trace(result.confusion) == round(10 * result.top1)
    assert len(result.mistakes) == 10 - np.trace(result.confusion)
    predictions = api.predict(source, image_folder / "val" / "dark")
    assert len(predictions) == 5
    assert sorted(predictions[0].classes) == ["dark", "light"]
    assert sum(predictions[0].probabilities) == pytest.approx(1, abs=1e-5)
    assert predictions[0].probabilities[0] >= predictions[0].probabilities[1]


def test_evaluation_repeats_what_training_reported(run):
    result = run("reported", "optim.epochs=1")
    again = api.evaluate(result.folder)
    assert (again.top1, again.loss) == (result.metrics["val_top1"], result.metrics["val_loss"])
    assert again.confusion.tolist() == result.evaluation.confusion.tolist()


def test_a_model_file_works_away_from_its_run(finished, image_folder, tmp_path):
    shutil.copy(finished / "model.safetensors", tmp_path / "elsewhere.safetensors")
    trained = load_trained(tmp_path / "elsewhere.safetensors")
    assert (trained.name, trained.classes) == ("nat_digits", ["dark", "light"])
    assert trained.settings.size == (3, 32, 32)
    assert api.evaluate(trained, image_folder).images == 10
    assert api.evaluate(trained, image_folder / "train").images == 26


def test_a_file_from_a_machine_with_other_variables_is_usable(run, image_folder, monkeypatch):
    monkeypatch.setenv("ZOO_TEST_DATA", str(image_folder))
    folder = run("moved", "optim.epochs=1", "data.root=${oc.env:ZOO_TEST_DATA}").folder
    monkeypatch.delenv("ZOO_TEST_DATA")
    assert len(api.predict(folder, image_folder / "val" / "dark" / "00.png")) == 1
    with pytest.raises(ConfigError, match="data.root"):
        api.evaluate(folder)
    assert api.evaluate(folder, overrides=[f"data.root={image_folder}"]).images == 10


def test_a_relative_folder_of_images_is_looked_for_where_the_command_runs(
    run, image_folder, monkeypatch, tmp_path
):
    monkeypatch.chdir(image_folder.parent)
    root = f"data.root={image_folder.name}"
    folder = run("here", "optim.epochs=1", root).folder
    assert api.evaluate(folder).images == 10
    monkeypatch.chdir(tmp_path)
    words = f"no folder {image_folder.name};.*; {root} is relative to where the command runs: .*=FOLDER"
    with pytest.raises(DataError, match=words):
        api.evaluate(folder)
    with pytest.raises(DataError, match=words):
        run("here", "optim.epochs=1", root, resume=folder)
    assert api.evaluate(folder, overrides=[f"data.root={image_folder}"]).images == 10
    with pytest.raises(DataError, match=f"no folder {image_folder.name}; wanted.*val/$"):
        run("new", root)
    with pytest.raises(DataError, match="no folder /nowhere; wanted one that holds train/ and val/$"):
        api.evaluate(folder, overrides=["data.root=/nowhere"])


@pytest.mark.parametrize(
    "override",
    [
        "data.image_size=48",
        "data.mean=[0, 0, 0]",
        "data.std=[1, 1, 1]",
        "data.crop_pct=0.5",
        "data.interpolation=nearest",
    ],
)
def test_an_evaluation_sees_the_images_as_it_is_told(finished, override):
    trained = load_trained(finished)
    own, settings = api.evaluate(trained), trained.settings
    assert api.evaluate(trained, overrides=[override]).loss != own.loss
    assert trained.settings == settings and api.evaluate(trained).loss == own.loss


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.name=dat_digits", "model.name=dat_digits is of the network or its training"),
        ("model.args={kernel_size: 5}", "an evaluation takes data.*"),
        ("optim.lr=1", "optim.lr=1.0 is of the network"),
        ("name=other", "name=other is of"),
        ("data.balance=1", "data.balance=1.0 has no effect on an evaluation"),
    ],
)
def test_an_override_that_an_evaluation_does_not_read_is_refused(finished, override, words):
    with pytest.raises(ConfigError) as refused:
        api.evaluate(finished, overrides=[override])
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_an_evaluation_has_one_place_of_images(finished, image_folder):
    with pytest.raises(ConfigError, match="data.root=x and data=.* are both given; choose one"):
        api.evaluate(finished, image_folder, overrides=["data.root=x"])


def test_a_network_of_one_size_says_so(image_folder):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2)
    trained = Trained(
        model=model,
        name="timm/vit_tiny_patch16_224",
        classes=["dark", "light"],
        settings=InputSettings.of(model),
        recipe=None,
        source="x",
    )
    with pytest.raises(
        ConfigError, match="vit_tiny_patch16_224 does not take data.image_size=48: Input height"
    ):
        api.evaluate(trained, image_folder, overrides=["data.image_size=48", "data.workers=0"])


def test_a_model_of_fewer_classes_does_not_judge_unknown_ones(finished, image_folder, tmp_path):
    shutil.copytree(image_folder / "val", tmp_path / "val")
    (tmp_path / "val" / "dark").rename(tmp_path / "val" / "gloomy")
    with pytest.raises(DataError, match="does not know: gloomy"):
        api.evaluate(finished, tmp_path)
    shutil.rmtree(tmp_path / "val" / "gloomy")
    some = api.evaluate(finished, tmp_path)
    assert some.images == 5 and some.confusion[0].sum() == 0


def test_predictions_come_in_the_order_of_the_images_and_in_batches(finished, image_folder):
    files = sorted((image_folder / "val").rglob("*.png"))
    together = api.predict(finished, files)
    assert [prediction.file for prediction in together] == [str(file) for file in files]
    for file, one in zip(files, together, strict=True):
        alone = api.predict(finished, file)[0]
        assert alone.classes == one.classes
        assert alone.probabilities == pytest.approx(one.probabilities, abs=1e-5)
    assert [p.probabilities for p in api.predict(finished, files, batch_size=3, top_k=1)] == [
        pytest.approx(p.probabilities[:1], abs=1e-5) for p in together
    ]


def test_an_image_in_memory_is_predicted_like_its_file(finished, image_folder):
    file = image_folder / "val" / "light" / "01.png"
    with Image.open(file) as image:
        assert api.predict(finished, image)[0].probabilities == api.predict(finished, file)[0].probabilities


def test_an_image_in_memory_is_turned_upright_like_its_file(finished, image_folder, tmp_path):
    with Image.open(image_folder / "val" / "light" / "01.png") as image:
        turned = image.convert("RGB")
    exif = turned.getexif()
    exif[ExifTags.Base.Orientation] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        alone = api.predict(finished, image)[0]
    assert alone.probabilities == api.predict(finished, tmp_path / "turned.png")[0].probabilities


@pytest.mark.parametrize("image", [Image.new("F", (8, 8)), Image.new("RGB", (0, 5))], ids=["float", "empty"])
def test_a_bad_image_in_memory_raises_or_is_reported(finished, image):
    with pytest.raises(DataError, match="image 0 cannot be read as an image"):
        api.predict(finished, image)
    assert api.predict(finished, [image], bad_images="skip")[0].error is not None


def test_a_bad_image_raises_or_is_reported(finished, image_folder, tmp_path):
    good, bad = image_folder / "val" / "dark" / "00.png", tmp_path / "bad.png"
    bad.write_bytes(b"no")
    with pytest.raises(DataError, match="bad.png"):
        api.predict(finished, [good, bad])
    results = api.predict(finished, [bad, good, tmp_path / "missing.png"], bad_images="skip")
    assert [result.error is None for result in results] == [False, True, False]
    assert "no such file" in results[2].error


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("top_k", 0), ("batch_size", 0), ("bad_images", "ignore")),
        *(("device", "abacus"), ("device", "cuda:99")),
    ],
)
def test_wrong_arguments_are_named(finished, image_folder, name, value):
    with pytest.raises(ConfigError, match=name):
        api.predict(finished, image_folder / "val", **{name: value})


def test_no_images_are_an_error(finished):
    with pytest.raises(DataError, match="no images given"):
        api.predict(finished, [])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nat_digit", "did you mean nat_digits"),
        ("runs/nowhere", "no run folder or file"),
        ("missing.ckpt", "no run folder or file"),
        (".", "holds no trained model"),
        ("notes.txt", "neither a run folder nor"),
        ("timm/resnet10t.c3_in2k", "timm has no weights of .*did you mean timm/resnet10t.c3_in1k"),
    ],
)
def test_what_is_no_source_is_named(tmp_path, monkeypatch, source, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=words):
        load_trained(source)


@pytest.mark.parametrize("name", ["timm/nat_base", "timm/nope", "timm/zoo_davit_tiny"])
def test_models_of_the_zoo_are_none_of_timms_own(name):
    with pytest.raises(ConfigError, match=f"timm has no weights of {name}; did you mean timm/") as refused:
        load_trained(name)
    near = str(refused.value).partition("did you mean ")[2].removesuffix("?").split(" or ")
    for each in near:
        assert timm.models.model_entrypoint(each.removeprefix("timm/")).__module__.startswith("timm.")


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """A model of timm's own whose file lies in the hub's cache, as after a first use."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo = tmp_path / "hub" / "models--timm--test_resnet.r160_in1k"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots" / ("0" * 40)).mkdir(parents=True)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    save_file(model.state_dict(), repo / "snapshots" / ("0" * 40) / "model.safetensors")
    return model


def test_published_models_of_timm_are_used_by_name(fetched):
    trained = load_trained("timm/test_resnet.r160_in1k")
    assert trained.settings.size == (3, 160, 160) and trained.classes[0] == "tench"
    x = torch.randn(2, 3, 160, 160)
    assert torch.equal(trained.model(x), fetched(x))


def test_images_are_compared_by_the_features_of_any_model_of_timm(fetched):
    images = [Image.fromarray(np.full((16, 16, 3), 20 * shade, np.uint8)) for shade in range(12)]
    features = Judge("timm/test_resnet.r160_in1k").features(images)
    assert features.shape == (12, fetched.num_features)
    same, other = distances(features, features), distances(features[:6], features[6:])
    assert same["fid"] < 1e-3 < other["fid"] and same["kid"] < other["kid"]


def test_weights_of_timm_that_cannot_be_fetched_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ResourceError, match="timm's weights of test_resnet.r160_in1k cannot be fetched") as e:
        load_trained("timm/test_resnet.r160_in1k")
    assert "\n" not in str(e.value)


def changed(finished, tmp_path, **facts: str | None):
    from safetensors import safe_open

    with safe_open(finished / "model.safetensors", framework="pt") as file:
        metadata = {key: value for key, value in (file.metadata() | facts).items() if value is not None}
    save_file(load_file(finished / "model.safetensors"), tmp_path / "changed.safetensors", metadata=metadata)
    return tmp_path / "changed.safetensors"


@pytest.mark.parametrize(
    "facts",
    [
        {"recipe": None},
        {"classes": "[1"},
        {"input": "{}"},
        {"recipe": "4"},
        {"recipe": "model: {_target_: os.system}"},
        {"recipe": "model: {name: nonesuch}\ndata: {name: digits}"},
        {"recipe": "model: {name: nat_mini}\ndata: {name: digits}"},
        {"classes": json.dumps(["a", "b", "c"])},
    ],
    ids=lambda facts: str(facts)[:40],
)
def test_a_file_whose_facts_do_not_fit_is_refused(finished, tmp_path, facts):
    with pytest.raises((ConfigError, IntegrityError)) as refused:
        load_trained(changed(finished, tmp_path, **facts))
    assert "\n" not in str(refused.value)


def test_weights_without_facts_are_no_trained_model(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "bare.safetensors")
    with pytest.raises(IntegrityError, match="does not say which model it is"):
        load_trained(tmp_path / "bare.safetensors")


def test_imagenet_folders_are_known_by_their_synsets(finished, tmp_path):
    """Published models name their classes in words; the data set names its folders n01440764 and the like."""
    import dataclasses

    from zoo.recipes.run_folder import _class_names

    classes, folders = _class_names(1000)
    assert (classes[1], folders[1]) == ("goldfish", "n01443537")
    trained = dataclasses.replace(load_trained(finished), classes=["fish", "goldfish"], folders=folders[:2])
    for name, level in (("n01443537", 200), ("n01440764", 40)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / name / "1.png")
    result = api.evaluate(trained, tmp_path)
    assert result.classes == ["fish", "goldfish"] and result.confusion.sum(axis=1).tolist() == [1, 1]


def test_the_shipped_digits_model_is_as_good_as_its_manifest_says():
    from zoo.weights.manifest import entries_of

    (entry,) = entries_of("nat_digits")
    result = api.evaluate("nat_digits")
    assert result.images == 599
    assert 100 * result.top1 == pytest.approx(entry.measured["top1"], abs=0.01)
    assert result.top1 >= 0.985
    assert entry.packaged.stat().st_size == entry.size < 1_000_000


def test_the_shipped_digits_model_reads_image_files(tmp_path):
    from zoo.recipes.data.digits import held_out

    images, labels = held_out()
    for number in range(20):
        large = Image.fromarray(images[number]).resize((64, 64), Image.Resampling.BICUBIC)
        large.save(tmp_path / f"{number:02d}.png")
    predictions = api.predict("nat_digits", tmp_path, top_k=1)
    right = sum(p.classes[0] == str(label) for p, label in zip(predictions, labels, strict=False))
    assert right >= 19
