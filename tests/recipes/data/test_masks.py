"""A mask belongs to its image, whatever the layout and the file; and what does not fit is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torchvision import tv_tensors

from zoo.errors import ConfigError, DataError
from zoo.recipes.data import digit_scenes, load_halves, masks
from zoo.recipes.data.digit_scenes import CLASSES, DigitScenes, compose
from zoo.recipes.data.joint import JointTraining, RandomScale, Views, fitting
from zoo.recipes.data.masks import IGNORE, MaskedImages, class_values, folder_classes, read_mask
from zoo.recipes.data.transforms import InputSettings
from zoo.recipes.schema import SegmentationAugment, SegmentationRecipe

SETTINGS = InputSettings(
    size=(3, 16, 16), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bicubic", crop_pct=1.0
)


def write(file, values, **options) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = values if isinstance(values, Image.Image) else Image.fromarray(np.asarray(values))
    image.save(file, **options)


def numbers(height: int = 4, width: int = 6) -> np.ndarray:
    return (np.arange(height * width).reshape(height, width) % 3).astype(np.uint8)


def pair(tmp_path, image, mask, count: int = 3, **options) -> MaskedImages:
    write(tmp_path / "a.png", image, **options)
    write(tmp_path / "m.png", mask)
    classes = [str(i) for i in range(count)]
    values = class_values(classes, 255, from_one=False)
    files = [(str(tmp_path / "a.png"), str(tmp_path / "m.png"))]
    return MaskedImages("train", files, classes, values, root=tmp_path)


# ---- reading a mask


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "RGB"])
def test_class_numbers_come_out_as_they_were_written(tmp_path, mode):
    image = Image.fromarray(numbers())
    if mode == "P":
        image.putpalette([7, 200, 3] * 256)
    elif mode == "I;16":
        image = Image.fromarray(numbers().astype(np.uint16))
    elif mode == "RGB":
        image = image.convert("RGB")
    write(tmp_path / "m.png", image)
    assert (read_mask(tmp_path / "m.png") == numbers()).all()


def test_lossy_and_coloured_masks_are_refused(tmp_path):
    write(tmp_path / "m.jpg", numbers())
    with pytest.raises(DataError, match="m.jpg cannot be read as a mask: JPEG changes class numbers"):
        read_mask(tmp_path / "m.jpg")
    write(tmp_path / "c.png", np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8))
    with pytest.raises(DataError, match="c.png is in colours"):
        read_mask(tmp_path / "c.png")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_turns_with_its_image(tmp_path, orientation):
    """The mask was drawn on the pixels as they are stored."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    pixels = np.repeat(100 * numbers()[..., None], 3, axis=2)
    both = pair(tmp_path, pixels, numbers(), exif=exif)
    upright = np.asarray(both.load(0))[..., 0] // 100
    assert (both.target(0) == upright).all()


def test_a_mask_drawn_on_the_upright_image_stays(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    both = pair(tmp_path, np.zeros((4, 6, 3), np.uint8), numbers(6, 4), exif=exif)
    assert both.load(0).size == (4, 6) and (both.target(0) == numbers(6, 4)).all()


def test_what_has_no_class_is_ignored_and_what_is_none_is_named(tmp_path):
    mask = numbers()
    mask[0, 0] = 255
    target = pair(tmp_path, np.zeros((4, 6, 3), np.uint8), mask).target(0)
    assert target[0, 0] == IGNORE and (target[1:] == mask[1:]).all()
    mask[2, 2:5] = (9, 8, 3)
    with pytest.raises(DataError, match=r"m.png holds 3, 8, 9, which is none of the 3 classes \(0 to 2\)"):
        pair(tmp_path, np.zeros((4, 6, 3), np.uint8), mask)


@pytest.mark.parametrize(
    ("ignore", "from_one", "words"),
    [
        (0, False, "=0 is also class 'bg'; give another number, or data.reduce_zero_label=true"),
        (1, False, "=1 is also class 'cat'; give another number$"),
        (2, True, "=2 is also class 'cat'; give another number$"),
    ],
)
def test_what_has_no_class_cannot_be_a_class_too(ignore, from_one, words):
    with pytest.raises(ConfigError, match=f"data.ignore_index{words}"):
        class_values(["bg", "cat"], ignore, from_one=from_one)


def test_what_nobody_has_chosen_gives_way_to_a_class(tmp_path):
    many = [str(i) for i in range(257)]
    assert class_values(many, 255, from_one=False) == {i: i for i in range(257)}
    assert class_values(["a"], 0, from_one=True) == {0: IGNORE, 1: 0}
    with pytest.raises(DataError, match=r"the 257 classes \(0 to 256\); correct"):
        pair(tmp_path, np.zeros((4, 6, 3), np.uint8), numbers().astype(np.uint16) + 300, 257)


@pytest.mark.parametrize("count", [1, 2, 3, 12, 13])
def test_the_first_look_is_spread_over_all(count):
    found = masks._spread(13, count)
    assert len(set(found)) == count and found[0] == 0 and (count == 1 or found[-1] == 12)


def test_classes_come_from_a_file_or_a_count(tmp_path):
    with pytest.raises(ConfigError, match="model.num_classes=NUMBER"):
        folder_classes(tmp_path, None, None)
    assert folder_classes(tmp_path, None, 2) == ["0", "1"]
    (tmp_path / "classes.txt").write_text("sky\n\nroad \n")
    assert folder_classes(tmp_path, None, None) == ["sky", "road"]
    (tmp_path / "classes.txt").write_text("sky\nsky\n")
    with pytest.raises(DataError, match="'sky' twice"):
        folder_classes(tmp_path, None, None)


# ---- folders


def masked_tree(root: Path, *places: str) -> Path:
    for place in places:
        write(root / place / "images" / "a.png", np.zeros((4, 6, 3), np.uint8))
        write(root / place / "masks" / "a.png", numbers())
    return root


@pytest.mark.parametrize("layout", ["split below", "no split"])
def test_two_halves_are_never_the_same_images(tmp_path, layout):
    root = masked_tree(tmp_path, ".")
    if layout == "split below":
        for part in ("images", "masks"):
            for split in ("train", "val"):
                (root / part / split).mkdir()
                shutil.copy(root / part / "a.png", root / part / split)
            (root / part / "a.png").unlink()
    made = SegmentationRecipe()
    made.data.name, made.data.root, made.model.num_classes = "folder", str(root), 3
    with pytest.raises(DataError, match=r"no train/ inside \(found images, masks\); wanted .*/train/images"):
        load_halves(made, masks.load_half)
    other = masks.half_of_folder(made, root, ["a", "b", "c"], "val", whole=True)
    assert len(other) == (2 if layout == "split below" else 1)


@pytest.mark.parametrize("part", ["images", "masks"])
def test_a_damaged_file_is_named_at_once_unless_it_is_to_be_skipped(tmp_path, part):
    file = masked_tree(tmp_path, "val") / "val" / part / "a.png"
    file.write_bytes(file.read_bytes()[:-24])
    given = {"classes": ["a", "b", "c"], "ignore": 255, "from_one": False}
    with pytest.raises(DataError, match=f"{part}/a.png cannot be read"):
        masks.folder_of(tmp_path, "val", **given)
    assert len(masks.folder_of(tmp_path, "val", lenient=True, **given)) == 1
    write(tmp_path / "val" / "masks" / "a.png", numbers() + 3)
    write(tmp_path / "val" / "images" / "a.png", np.zeros((4, 6, 3), np.uint8))
    with pytest.raises(DataError, match="none of the 3 classes"):
        masks.folder_of(tmp_path, "val", lenient=True, **given)


# ---- published layouts


def test_ade20k_counts_from_one(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for split in ("training", "validation"):
        write(root / "images" / split / "ADE_1.jpg", np.zeros((2, 3, 3), np.uint8))
        write(root / "annotations" / split / "ADE_1.png", np.array([[0, 1, 150]] * 2, np.uint8))
    (root / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n" + "".join(f"{i}\t0\t0\t0\tthing {i}, stuff\n" for i in range(1, 151))
    )
    half = masks.ade20k(tmp_path, train=False, download=False)
    assert half.target(0)[0].tolist() == [IGNORE, 0, 149] and half.classes[149] == "thing 150"
    with pytest.raises(DataError, match="ADEChallengeData2016 as it is published"):
        masks.ade20k(tmp_path / "nowhere", train=True, download=False)


def test_voc_is_read_in_its_own_layout(tmp_path):
    base = tmp_path / "VOCdevkit" / "VOC2012"
    write(base / "JPEGImages" / "2007_1.jpg", np.zeros((2, 3, 3), np.uint8))
    write(base / "SegmentationClass" / "2007_1.png", np.array([[0, 20, 255]] * 2, np.uint8))
    (base / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split in ("train", "val"):
        (base / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("2007_1\n")
    half = masks.voc(tmp_path, train=True, download=False)
    assert half.target(0)[0].tolist() == [0, 20, IGNORE] and len(half.classes) == 21
    with pytest.raises(DataError, match="'voc' is not usable"):
        masks.voc(tmp_path / "nowhere", train=True, download=False)


def test_cityscapes_judges_nineteen_classes(tmp_path):
    for split in ("train", "val"):
        write(
            tmp_path / "leftImg8bit" / split / "ulm" / "ulm_0_leftImg8bit.png", np.zeros((1, 4, 3), np.uint8)
        )
        labels = np.array([[7, 26, 33, 0]], np.uint8)  # road, car, bicycle, unlabelled
        write(tmp_path / "gtFine" / split / "ulm" / "ulm_0_gtFine_labelIds.png", labels)
    half = masks.cityscapes(tmp_path, train=True, download=False)
    assert half.target(0)[0].tolist() == [0, 13, 18, IGNORE]
    assert len(half.classes) == 19 and half.classes[13] == "car"


# ---- scenes


def test_scenes_are_the_same_for_ever_and_share_nothing_between_the_halves():
    scene, classes = compose(0, train=True)
    assert (compose.__wrapped__(0, train=True)[0] == scene).all() and scene.shape == classes.shape == (48, 48)
    assert (compose(0, train=False)[0] != scene).any()
    held_out = DigitScenes(train=False)
    assert held_out.load(3).size == (48, 48) and len(held_out.classes) == len(CLASSES) == 11
    seen = np.bincount(np.concatenate([held_out.target(i).ravel() for i in range(100)]), minlength=11)
    assert (seen > 0).all() and 0.7 < seen[0] / seen.sum() < 0.85
    assert all(2 <= len(np.unique(held_out.target(i))) <= 3 for i in range(100))


def test_digits_of_a_scene_do_not_cover_each_other(monkeypatch):
    drawn = []
    draw = digit_scenes._draw
    monkeypatch.setattr(digit_scenes, "_draw", lambda *given: drawn.append(draw(*given)) or drawn[-1])
    for index in range(20):
        _, classes = compose.__wrapped__(index, train=True)
        first, second = (ink for _, ink in drawn[-2:])
        assert not (first * second).any()
        assert ((classes > 0) == (first + second > digit_scenes.INK)).all()
    assert len(drawn) > 40, "some had to be drawn again"


# ---- image and mask change together


@pytest.mark.parametrize("size", [(20, 30), (5, 40), (64, 9)])
@pytest.mark.parametrize("rotate", [0.0, 30.0])
def test_a_crop_has_its_size_and_what_lies_beyond_has_no_class(size, rotate):
    augment = SegmentationAugment(rotate=rotate, photometric=0.0)
    image, classes = Image.new("RGB", size[::-1], "white"), np.zeros(size, np.int16)
    for seed in range(4):
        torch.manual_seed(seed)
        pixels, target = JointTraining(SETTINGS, augment, 64)(image, classes)
        assert pixels.shape == (3, 16, 16) and target.shape == (16, 16) and target.dtype == torch.int64
        beyond = target == IGNORE
        assert (pixels[0][beyond].abs() < 0.6).all()


def test_image_and_mask_stay_together():
    """The class is written into the pixels: wherever it goes, the mask must go too."""
    classes = np.kron(np.arange(6).reshape(2, 3), np.ones((12, 12))).astype(np.int16)
    image = Image.fromarray((40 * classes).astype(np.uint8)).convert("RGB")
    for seed in range(6):
        torch.manual_seed(seed)
        augment = SegmentationAugment(photometric=0.0, rotate=15.0)
        pixels, target = JointTraining(SETTINGS, augment, None)(image, classes)
        seen = (pixels[0] * 0.25 + 0.5) * 255 / 40
        inside = target != IGNORE
        assert ((seen - target).abs()[inside] < 0.5).float().mean() > 0.75  # borders are blurred


@pytest.mark.parametrize("side", [16, 23, 48, 100])
def test_a_resized_mask_lies_where_its_image_does(side):
    """Each of its pixels is the one of the file that is nearest to its centre."""
    columns = torch.arange(64, dtype=torch.int16).expand(64, 64)
    mask = RandomScale(side, None, [1.0, 1.0])(tv_tensors.Mask(columns))
    assert isinstance(mask, tv_tensors.Mask) and mask.dtype == torch.int16 and mask.shape == (side, side)
    for lines in (mask, RandomScale(side, None, [1.0, 1.0])(tv_tensors.Mask(columns.T)).T):
        places = lines.as_subclass(torch.Tensor) + 0.5
        assert (places - 64 / side * (torch.arange(side) + 0.5)).abs().max() <= 0.5


def test_a_crop_of_one_class_is_tried_again():
    classes = np.zeros((64, 64), np.int16)
    classes[:, 40:] = 1
    image = Image.new("RGB", (64, 64))

    def mixed(max_class_share: float) -> int:
        augment = SegmentationAugment(
            scale=[4.0, 4.0], hflip=0.0, photometric=0.0, max_class_share=max_class_share
        )
        found = 0
        for seed in range(20):
            torch.manual_seed(seed)
            target = JointTraining(SETTINGS, augment, None)(image, classes)[1]
            found += bool(np.bincount(target.flatten(), minlength=2).max() < 0.75 * 256)
        return found

    assert mixed(0.75) > 2 * mixed(1.0)


def test_the_shorter_side_fits_and_the_longer_one_is_limited():
    assert fitting((100, 200), 50, None) == (50, 100)
    assert fitting((100, 400), 50, 100) == (25, 100)


def test_views_are_one_image_at_several_scales_with_its_classes_untouched():
    views, target = Views(SETTINGS, None, (1.0, 1.5))(Image.new("RGB", (20, 40)), numbers(40, 20))
    assert [tuple(view.shape) for view in views] == [(3, 32, 16), (3, 48, 24)]
    assert (target.numpy() == numbers(40, 20)).all()
