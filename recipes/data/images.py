"""Image files: reading them rightly, and folders of them with one sub-folder for each class."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NoReturn, TypeVar

import numpy as np
from PIL import Image, ImageOps

from zoo.errors import DataError
from zoo.weights.files import open_file

Split = TypeVar("Split")

# Only these decoders may run on a file, whatever its ending claims.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm")
MAX_PIXELS = 89_478_485  # Pillow's own warning limit: a quarter of a gigabyte of RGB
MAX_ASPECT = 100  # the shorter side is resized to the model's, so a line of pixels would become a huge image


def read_image(path: str | Path, opened: Callable[[str | Path], IO[bytes]] = open_file) -> Image.Image:
    """Read an image file, or what `opened` gives for its name, as upright 8-bit RGB.

    EXIF orientation is applied, 16-bit grey is scaled (not clipped), transparency is laid over white,
    palettes, CMYK and grey are converted. Raises DataError naming the file and the reason.
    """
    try:
        with warnings.catch_warnings(), opened(path) as file:
            # What Pillow warns of in a damaged file is either an error below or does not matter.
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS:,}")
                if max(image.size) > MAX_ASPECT * min(image.size):
                    raise ValueError(
                        f"{image.width}x{image.height} pixels, a side over {MAX_ASPECT} times the other"
                    )
                return to_rgb(ImageOps.exif_transpose(image))
    # A decoder may raise anything on damaged input.
    except Exception as error:
        raise DataError(f"{path} cannot be read as an image: {reason_of(error, path)}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as 8-bit RGB: 16-bit grey scaled, transparency over white. Raises ValueError."""
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit values outside 0..65535; save it with 8 or 16 bits")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point values of unknown range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def reason_of(error: Exception, path: str | Path) -> str:
    """Say in a few words why a file could not be read."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "it is a folder"
    if isinstance(error, Image.UnidentifiedImageError):
        if Path(path).is_file() and Path(path).stat().st_size == 0:
            return "the file is empty"
        return f"damaged, or none of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200]


class ImageFolder:
    """Images in one sub-folder for each class: `root/<class>/**/<image>`, in sorted order.

    Hidden folders are ignored, files with other endings are counted in `notes`. Raises DataError where there
    is no class folder, a class without an image, or one level of folders too many.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = at_home(root)
        if not self.root.is_dir():
            raise DataError(f"no folder {self.root}; wanted one sub-folder for each class of images")
        self.classes = sorted(entry.name for entry in _entries(self.root) if entry.is_dir())
        if not self.classes:
            raise DataError(f"{self.root} holds no class folders; wanted {self.root}/<class>/<image>")
        for name in self.classes:
            _refuse_no_text(name, self.root)
        self.files: list[str] = []
        self.labels: list[int] = []
        others: Counter[str] = Counter()
        empty = []
        for label, name in enumerate(self.classes):
            found = images_below(self.root / name, others)
            if not found:
                empty.append(name)
            self.files += found
            self.labels += [label] * len(found)
        if empty:
            some = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
            raise DataError(
                f"{len(empty)} of {len(self.classes)} class folders in {self.root} hold no image: {some}; "
                f"images end in {', '.join(ENDINGS[:4])} ..."
            )
        self._refuse_extra_level()
        self.notes = []
        if others:
            kinds = ", ".join(
                f"{count} {ending or 'without ending'}" for ending, count in others.most_common(3)
            )
            self.notes.append(
                f"{others.total()} files in {self.root} are no images by their ending ({kinds})"
            )

    def _refuse_extra_level(self) -> None:
        only = self.root / self.classes[0]
        if len(self.classes) == 1 and not any(Path(file).parent == only for file in self.files):
            raise DataError(
                f"{self.root} holds one folder {self.classes[0]!r} and the classes seem to be inside it; "
                f"wanted {self.root}/<class>/<image>, so move them up by one level"
            )

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int) -> Image.Image:
        """Return one image as upright RGB."""
        return read_image(self.files[index])

    def target(self, index: int) -> int:
        """Return the class number of one image."""
        return self.labels[index]

    def describe(self, index: int) -> str:
        """Return the path of one image."""
        return self.files[index]

    def short(self, index: int) -> str:
        """Return the path of one image below the root, which may have come from a secret."""
        return Path(self.files[index]).relative_to(self.root.parent).as_posix()


def _refuse_no_text(name: str, root: Path) -> None:
    # The names of the classes are written into every file of a run; those of the images into lists only.
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"the class folder {name!r} in {root} has a name that is not UTF-8; rename it"
        ) from None


def at_home(path: str | Path) -> Path:
    """Return a path with ~ expanded; that of an unknown user stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's own raises for an unknown user


def split_of(root: str | Path, split: str, images_in: Callable[[Path], Split] = ImageFolder) -> Split:
    """Return the images of `root/<split>`. Raises DataError for a missing folder or another layout."""
    root = at_home(root)
    if not root.is_dir():
        raise DataError(f"no folder {root}; wanted one that holds train/ and val/")
    if not (root / split).is_dir():
        found = (
            ", ".join(sorted(entry.name for entry in _entries(root) if entry.is_dir())[:5]) or "no folders"
        )
        raise DataError(f"{root} has no {split}/ inside (found {found}); wanted {root}/train and {root}/val")
    return images_in(root / split)


def image_files(sources: Sequence[str | Path]) -> list[str]:
    """Return the image files that paths, folders and patterns with * stand for, in order, each once.

    A path that is no folder and no pattern is returned as it is, so that reading it can say what is wrong.
    Raises DataError for a folder or a pattern without an image.
    """
    found: dict[str, None] = {}
    for source in sources:
        path = at_home(source)
        if path.is_dir():
            files = images_below(path, Counter())
            missing = f"no image in folder {source}"
        elif not path.exists() and any(mark in str(source) for mark in "*?["):
            anchor, pattern = path.anchor, str(path.relative_to(path.anchor) if path.anchor else path)
            files = sorted(str(file) for file in Path(anchor).glob(pattern) if file.suffix.lower() in ENDINGS)
            missing = f"no image matches {source}"
        else:
            files, missing = [str(path)], ""
        if not files:
            raise DataError(f"{missing}; images end in {', '.join(ENDINGS)}")
        found |= dict.fromkeys(files)
    return list(found)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror})") from None


def _refuse_unreadable(error: OSError) -> NoReturn:
    # Left out, it would be missed by nobody: training would go on with the rest.
    raise DataError(f"{error.filename} cannot be read ({error.strerror})") from None


def _identity(folder: str | Path) -> tuple[int, int] | None:
    """Return what is the same for all paths of a folder, None where it cannot be told."""
    try:
        stat = os.stat(folder)  # noqa: PTH116 - also for text
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def images_below(folder: Path, others: Counter[str]) -> list[str]:
    """Return the image files in a folder and those in it, sorted; other files are counted by their ending.

    Links are followed, but to no folder that has been seen or that holds this one. Raises DataError for a
    folder that cannot be read.
    """
    files = []
    own = folder.absolute(), folder.resolve()
    seen = {_identity(each) for path in own for each in (path, *path.parents)}
    for parent, folders, names in os.walk(folder, onerror=_refuse_unreadable, followlinks=True):
        below = {name: _identity(f"{parent}/{name}") for name in sorted(folders) if not name.startswith(".")}
        folders[:] = []
        for name, identity in below.items():
            if identity is None or identity not in seen:
                folders.append(name)
                seen.add(identity)
        for name in sorted(names):
            if name.startswith("."):
                continue
            ending = os.path.splitext(name)[1].lower()  # noqa: PTH122 - a million times, and Path is slow
            if ending in ENDINGS:
                files.append(f"{parent}/{name}")
            else:
                others[ending] += 1
    return files
