"""Data sets by name."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from zoo.errors import ConfigError, DataError
from zoo.recipes.config import Recipe
from zoo.recipes.data import NAMES, load_halves
from zoo.recipes.data.digits import Digits, held_out, training
from zoo.recipes.data.torchvision_sets import SETS


def of(name: str, **values: object) -> Recipe:
    made = Recipe()
    made.data.name = name
    for key, value in values.items():
        setattr(made.data, key, value)
    return made


def test_a_third_of_each_digit_is_held_out_and_the_split_never_changes():
    (train, train_labels), (held, held_labels) = training(), held_out()
    assert (len(train), len(held)) == (1198, 599)
    assert train.dtype == held.dtype == np.uint8 and train.shape[1:] == (8, 8)
    counts = np.bincount(held_labels) / (np.bincount(held_labels) + np.bincount(train_labels))
    assert np.allclose(counts, 1 / 3, atol=0.005)
    assert hashlib.sha256(held.tobytes() + held_labels.tobytes()).hexdigest()[:16] == "feeaed246858a6ba"


def test_digits_are_grey_images_with_their_labels():
    digits = Digits(train=False)
    image = digits.load(0)
    assert (image.mode, image.size, digits.classes[digits.labels[0]]) == ("RGB", (8, 8), "1")
    red, green, blue = np.asarray(image).transpose(2, 0, 1)
    assert (red == green).all() and (red == blue).all()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "digits"])
def test_data_on_disk_needs_a_root(name):
    with pytest.raises(ConfigError, match="data.root"):
        load_halves(of(name))


@pytest.mark.parametrize("name", sorted(SETS))
def test_torchvision_names_exist_and_missing_files_are_one_line(name, tmp_path):
    with pytest.raises(DataError, match="data.download=true") as caught:
        load_halves(of(name, root=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_another_number_of_classes_is_refused():
    made = of("digits")
    made.model.num_classes = 12
    with pytest.raises(DataError, match="model.num_classes=12, but the data has 10 classes"):
        load_halves(made)


def test_a_torchvision_set_is_read_like_any_other(tmp_path):
    """CIFAR-10 in its own file format, five images a file."""
    import pickle

    from torchvision.datasets import CIFAR10

    folder = Path(tmp_path) / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (5, 3 * 32 * 32), dtype=np.uint8)
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for name in names:
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1, 2, 3, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))

    def with_hashes(files: list[list[str]]) -> list[list[str]]:
        return [[name, hashlib.md5((folder / name).read_bytes()).hexdigest()] for name, _ in files]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR10, "train_list", with_hashes(CIFAR10.train_list))
        patch.setattr(CIFAR10, "test_list", with_hashes(CIFAR10.test_list))
        patch.setattr(
            CIFAR10,
            "meta",
            CIFAR10.meta | {"md5": hashlib.md5((folder / "batches.meta").read_bytes()).hexdigest()},
        )
        train, val = load_halves(of("cifar10", root=str(tmp_path)))
    assert (len(train), len(val), len(train.classes)) == (25, 5, 10)
    assert train.labels[:5] == [0, 1, 2, 3, 9]
    assert train.load(3).size == (32, 32)
