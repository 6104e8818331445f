"""Images with a mask each, which holds the class of every pixel: folders and published data sets."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageOps

from zoo.errors import ConfigError, DataError
from zoo.recipes.data.images import ENDINGS, FORMATS, MAX_PIXELS, images_below, read_image, reason_of
from zoo.weights.files import open_file

if TYPE_CHECKING:
    from zoo.recipes.data.loader import Images
    from zoo.recipes.schema import SegmentationRecipe

IGNORE = -1  # what a target holds where no class is given, whatever the files have there
_FOREIGN = -2
USUAL_IGNORE = 255  # in files, where a recipe says nothing else
LOSSLESS = tuple(name for name in FORMATS if name not in ("JPEG", "WEBP"))
# How much is looked at before training begins; what is wrong elsewhere is found when it is read.
SIZES_CHECKED, MASKS_CHECKED = 1000, 100
UPRIGHT = 1  # EXIF orientation


class Unreadable(DataError):
    """A file is missing or damaged, where other DataErrors say that its content is not what is wanted."""


class MaskedImages:
    """Pairs of image and mask files. `values` maps a class number in the files to ours.

    Every mask is checked when it is read, and some evenly spread ones at once. Raises DataError naming the
    file for a mask of another size than its image, in colours, or with a number that is no class; for a
    damaged file too, unless `lenient`: then not before it is read.
    """

    def __init__(
        self,
        name: str,
        pairs: Sequence[tuple[str, str]],
        classes: Sequence[str],
        values: dict[int, int],
        *,
        root: Path,
        notes: Sequence[str] = (),
        lenient: bool = False,
    ) -> None:
        self.name, self.root = name, root
        self.images = [image for image, _ in pairs]
        self.masks = [mask for _, mask in pairs]
        self.classes, self.notes = list(classes), list(notes)
        self._values = values
        self._table = np.full(1 << 16, _FOREIGN, dtype=np.int16)
        for value, number in values.items():
            self._table[value] = number
        self._check_some((Unreadable,) if lenient else ())

    def _check_some(self, passed: tuple[type[DataError], ...]) -> None:
        for look, most in ((self._orientation, SIZES_CHECKED), (self.target, MASKS_CHECKED)):
            for index in _spread(len(self), most):
                with suppress(*passed):
                    look(index)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Image.Image:
        """Return one image as upright RGB."""
        return read_image(self.images[index])

    def target(self, index: int) -> np.ndarray:
        """Return the classes int16 [height, width] of an upright image, IGNORE where there is none."""
        path = self.masks[index]
        values = read_mask(path, self._orientation(index))
        numbers = self._table[values]
        if numbers.min(initial=0) == _FOREIGN:
            foreign = np.unique(values[numbers == _FOREIGN]).tolist()
            known = sorted(value for value, number in self._values.items() if number >= 0)
            ignored = [value for value, number in self._values.items() if number == IGNORE]
            raise DataError(
                f"mask {path} holds {', '.join(map(str, foreign[:5]))}{', ...' if len(foreign) > 5 else ''}, "
                f"which is none of the {len(self.classes)} classes ({known[0]} to {known[-1]})"
                + (f" nor no class ({', '.join(map(str, ignored[:3]))})" if 0 < len(ignored) < 4 else "")
                + "; correct the mask, the number of classes or data.ignore_index"
            )
        return numbers

    def _orientation(self, index: int) -> int:
        """Return the EXIF orientation by which a mask turns upright. Raises DataError for another size."""
        image, mask = self.images[index], self.masks[index]
        (width, height), turned = _header(image)
        size, own = _header(mask)
        upright = (height, width) if turned in (5, 6, 7, 8) else (width, height)
        if own != UPRIGHT:
            size = size[::-1] if own in (5, 6, 7, 8) else size
            wanted, turn = [upright], own
        else:  # drawn on the stored pixels it is turned as they are, drawn on the upright ones not
            wanted = [(width, height), upright]
            turn = turned if size == (width, height) else UPRIGHT
        if size not in wanted:
            raise DataError(
                f"mask {mask} has {size[0]}x{size[1]} pixels and its image {image} "
                f"{upright[0]}x{upright[1]}; they must be the same"
            )
        return turn

    def describe(self, index: int) -> str:
        """Return the path of one image."""
        return self.images[index]

    def short(self, index: int) -> str:
        """Return the path of one image below the root, which may have come from a secret."""
        path = Path(self.images[index])
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path.name


def read_mask(path: str | Path, orientation: int = UPRIGHT) -> np.ndarray:
    """Read class numbers uint16 [height, width] from a mask file, turned by an EXIF orientation.

    Numbers are those of a grey image or the indices of a palette. Raises DataError naming the file.
    """
    try:
        with warnings.catch_warnings(), open_file(path) as file:
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as mask:
                if mask.format not in LOSSLESS:
                    raise ValueError(f"{mask.format} changes class numbers; save it as PNG")
                if mask.width * mask.height > MAX_PIXELS:
                    raise ValueError(f"{mask.width}x{mask.height} pixels, more than {MAX_PIXELS:,}")
                if mask.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "RGB"):
                    raise ValueError(f"mode {mask.mode}; wanted one class number for each pixel")
                values = np.asarray(mask)
    # A decoder may raise anything on damaged input.
    except Exception as error:
        kind = DataError if isinstance(error, ValueError) else Unreadable
        raise kind(f"{path} cannot be read as a mask: {reason_of(error, path)}") from None
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise DataError(
                f"mask {path} is in colours; wanted one class number for each pixel, as grey or as a palette"
            )
        values = values[..., 0]
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise DataError(f"mask {path} holds numbers outside 0..65535")
    if orientation != UPRIGHT:
        values = _turn(values.astype(np.int32), orientation)
    return values.astype(np.uint16)


def _turn(values: np.ndarray, orientation: int) -> np.ndarray:
    image = Image.fromarray(values)
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = orientation
    return np.asarray(ImageOps.exif_transpose(image))


def _header(path: str) -> tuple[tuple[int, int], int]:
    """Return width, height and EXIF orientation, for which Pillow decodes a PNG and nothing else."""
    try:
        with warnings.catch_warnings(), open_file(path) as file:
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                orientation = image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
                return image.size, orientation if orientation in range(1, 9) else UPRIGHT
    except Exception as error:
        raise Unreadable(f"{path} cannot be read as an image: {reason_of(error, path)}") from None


def _spread(count: int, most: int) -> list[int]:
    """Return up to `most` of `count` numbers, evenly spread from the first to the last."""
    chosen = min(count, most)
    return [i * (count - 1) // max(1, chosen - 1) for i in range(chosen)]


def class_values(classes: Sequence[str], ignore: int, *, from_one: bool) -> dict[int, int]:
    """Return what the numbers in a mask mean: classes from 0, or from 1 with 0 for none, and `ignore`.

    Raises ConfigError where `ignore` is a class too, unless it is the usual 255, which nobody has chosen.
    """
    values = {number + from_one: number for number in range(len(classes))}
    if from_one:
        values[0] = IGNORE
    number = values.get(ignore, IGNORE)
    if number != IGNORE and ignore != USUAL_IGNORE:
        other = ", or data.reduce_zero_label=true" if ignore == 0 else ""
        raise ConfigError(
            f"data.ignore_index={ignore} is also class {classes[number]!r}; give another number{other}"
        )
    return {ignore: IGNORE, **values}


# ---- folders


def folder_of(
    root: str | Path,
    split: str,
    *,
    classes: Sequence[str],
    ignore: int,
    from_one: bool,
    whole: bool = False,
    lenient: bool = False,
) -> MaskedImages:
    """Return the pairs of `root/<split>/images` and `root/<split>/masks`.

    `whole` takes those of `root/images` and `root/masks` where there is no `root/<split>`; two halves of a
    training would be the same images then.
    """
    root = _folder(root)
    place = root if whole and not (root / split).is_dir() else root / split
    wanted = f"wanted {root}/{split}/images and {root}/{split}/masks"
    for inside in (place, place / "images", place / "masks"):
        if not inside.is_dir():
            folders = sorted(each.name for each in inside.parent.iterdir() if each.is_dir())
            found = ", ".join(folders[:5]) or "no folders"
            raise DataError(f"{inside.parent} has no {inside.name}/ inside (found {found}); {wanted}")
    pairs, notes = match(place / "images", place / "masks")
    values = class_values(classes, ignore, from_one=from_one)
    return MaskedImages(split, pairs, classes, values, root=place, notes=notes, lenient=lenient)


def _folder(root: str | Path) -> Path:
    if not Path(root).is_dir():
        raise DataError(
            f"no folder {root}; wanted one that holds train/ and val/, each with images/ and masks/"
        )
    return Path(root)


def match(images: Path, masks: Path, suffix: str = "") -> tuple[list[tuple[str, str]], list[str]]:
    """Pair images and masks of the same path but for the ending, and say which masks are left over."""
    others: Counter[str] = Counter()
    by_name: dict[str, str] = {}
    for file in images_below(masks, others):
        name = Path(file).relative_to(masks).with_suffix("").as_posix()
        if name in by_name:
            raise DataError(f"two masks for one image: {by_name[name]} and {file}; keep one of them")
        by_name[name] = file
    pairs, missing = [], []
    for file in images_below(images, others):
        name = Path(file).relative_to(images).with_suffix("").as_posix()
        mask = by_name.pop(name, None)
        if mask is None:
            missing.append(Path(file).name)
        else:
            pairs.append((file, mask))
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(
            f"{len(missing)} of {len(missing) + len(pairs)} images in {images} have no mask of the same name "
            f"in {masks}: {some}"
        )
    if not pairs:
        raise DataError(f"no image in {images}; images end in {', '.join(ENDINGS[:4])} ...")
    notes = [f"{len(by_name)} masks in {masks} have no image"] if by_name else []
    return pairs, notes


def folder_classes(root: str | Path, file: str | None, count: int | None) -> list[str]:
    """Return class names from a text file, one a line (`classes.txt` in the folder), or that many numbers.

    Raises ConfigError where neither is given, DataError for a file that does not fit.
    """
    path = Path(file) if file is not None else _folder(root) / "classes.txt"
    if not path.exists():
        if file is not None:
            raise DataError(f"no file {path} with the names of the classes, one a line")
        if count is None:
            raise ConfigError(
                f"how many classes do the masks in {root} have? Write their names into {path}, one a line, "
                "or give model.num_classes=NUMBER"
            )
        return [str(number) for number in range(count)]
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    twice = [name for name, times in Counter(names).items() if times > 1]
    if not names or twice:
        found = f"{twice[0]!r} twice" if twice else "no name"
        raise DataError(f"{path} holds {found}; wanted the name of a class in each line")
    return names


# ---- published data sets


VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train",
    "tv monitor",
)  # fmt: skip


def ade20k(root: str | Path, *, train: bool, download: bool, lenient: bool = False) -> MaskedImages:
    """Return a half of ADE20K's scene parsing benchmark: 150 classes, 0 in the files is none of them."""
    root = Path(root)
    if (root / "ADEChallengeData2016").is_dir():
        root = root / "ADEChallengeData2016"
    split = "training" if train else "validation"
    for part in ("images", "annotations"):
        if not (root / part / split).is_dir():
            raise DataError(
                f"{root} has no {part}/{split}; wanted the folder ADEChallengeData2016 as it is published"
            )
    names = [str(number) for number in range(1, 151)]
    listed = root / "objectInfo150.txt"
    if listed.exists():
        rows = [line.split("\t") for line in listed.read_text(encoding="utf-8").splitlines()[1:]]
        names = [row[-1].split(",")[0].strip() for row in rows if len(row) > 1]
        names = [name if names.count(name) == 1 else f"{name} {i + 1}" for i, name in enumerate(names)]
    pairs, notes = match(root / "images" / split, root / "annotations" / split)
    values = class_values(names, USUAL_IGNORE, from_one=True)
    return MaskedImages(split, pairs, names, values, root=root, notes=notes, lenient=lenient)


def voc(root: str | Path, *, train: bool, download: bool, lenient: bool = False) -> MaskedImages:
    """Return a half of Pascal VOC 2012's segmentation: 21 classes with the background."""
    from torchvision.datasets import VOCSegmentation

    split = "train" if train else "val"
    try:
        base = VOCSegmentation(str(root), year="2012", image_set=split, download=download)
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(
            _unusable("voc", root, error, "VOCdevkit/VOC2012 inside, or data.download=true")
        ) from None
    pairs = list(zip(base.images, base.masks, strict=True))
    values = class_values(VOC, USUAL_IGNORE, from_one=False)
    return MaskedImages(split, pairs, VOC, values, root=Path(root), lenient=lenient)


def cityscapes(root: str | Path, *, train: bool, download: bool, lenient: bool = False) -> MaskedImages:
    """Return a half of Cityscapes' fine annotations: the 19 classes that are evaluated."""
    from torchvision.datasets import Cityscapes

    split = "train" if train else "val"
    try:
        base = Cityscapes(str(root), split=split, mode="fine", target_type="semantic")
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(_unusable("cityscapes", root, error, "leftImg8bit/ and gtFine/ inside")) from None
    pairs = [(image, mask) for image, (mask,) in zip(base.images, base.targets, strict=True)]
    judged = sorted(
        (each for each in base.classes if 0 <= each.train_id < 255), key=lambda each: each.train_id
    )
    values = {each.id: IGNORE for each in base.classes if each.id >= 0}
    values |= {each.id: each.train_id for each in judged}
    names = [each.name for each in judged]
    return MaskedImages(split, pairs, names, values, root=Path(root), lenient=lenient)


def _unusable(name: str, root: str | Path, error: Exception, wanted: str) -> str:
    reason = " ".join(str(error).split())[:160]
    return f"data set {name!r} is not usable in {root} ({reason}); wanted a folder with {wanted}"


PUBLISHED = {"ade20k": ade20k, "voc": voc, "cityscapes": cityscapes}
NAMES = ("digit_scenes", "folder", *PUBLISHED)


# ---- of a recipe


def load_half(recipe: SegmentationRecipe, *, train: bool) -> Images:
    """Return the training or the validation images of a recipe.

    Raises ConfigError where `data.root` is needed and not given, DataError for what is wrong with the files.
    """
    data = recipe.data
    if data.name == "digit_scenes":
        from zoo.recipes.data.digit_scenes import DigitScenes

        return DigitScenes(train=train)
    if data.root is None:
        wanted = (
            "FOLDER with train/ and val/, each with images/ and masks/" if data.name == "folder" else "FOLDER"
        )
        raise ConfigError(f"data.name={data.name} needs data.root={wanted}")
    if data.name == "folder":
        classes = folder_classes(data.root, data.classes, recipe.model.num_classes)
        return half_of_folder(recipe, data.root, classes, "train" if train else "val")
    lenient = data.bad_images == "skip"
    return PUBLISHED[data.name](data.root, train=train, download=data.download, lenient=lenient)


def half_of_folder(
    recipe: SegmentationRecipe, root: str | Path, classes: Sequence[str], split: str, *, whole: bool = False
) -> MaskedImages:
    """Return the pairs of `folder_of` with as many classes as a recipe says. Raises DataError."""
    data = recipe.data
    wanted = recipe.model.num_classes
    if wanted is not None and wanted != len(classes):
        raise DataError(
            f"model.num_classes={wanted}, but {len(classes)} classes are listed ({', '.join(classes[:5])}"
            f"{', ...' if len(classes) > 5 else ''}); correct one of them"
        )
    return folder_of(
        root,
        split,
        classes=classes,
        ignore=data.ignore_index,
        from_one=data.reduce_zero_label,
        whole=whole,
        lenient=data.bad_images == "skip",
    )
