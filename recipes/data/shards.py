"""Image folders as tar shards in the convention of WebDataset, read by index as the folders are.

A shard holds `key.jpg` (or another ending), the bytes of the image file, and `key.cls`, the class number as
text. `shards.json` beside the shards of a split says where in which shard each image lies, and its checksum.
So any image is one seek and one read away: sampling, resuming and shares are those of a folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from zoo.errors import ConfigError, DataError
from zoo.recipes.data.images import ENDINGS, ImageFolder, read_image
from zoo.weights.files import open_file, write_atomically

INDEX, CLASSES = "shards.json", "classes.txt"
FORMAT = "attnzoo shards 1"
SPLITS = ("train", "val")
COLUMNS = ("name", "shard", "offset", "size", "crc32", "label")
MAX_BYTES = 2**30  # of an image file, which is read whole
MAX_CLASSES = 1_000_000
# WebDataset's rule: the key ends at the first point after the last slash.
KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")


class Sample(NamedTuple):
    """An image in a shard: where its bytes lie there, their CRC-32, and the number of its class."""

    name: str
    offset: int
    size: int
    crc32: int
    label: int


# ---- reading


class ImageShards:
    """The images of one split that `zoo data shard` or `zoo data index` described in `shards.json`.

    Raises DataError for an index that is damaged or does not fit its shards, and for shards that are missing
    or of another size. Whether the bytes of an image are those that were indexed is seen when it is read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder / INDEX)
        self.classes: list[str] = index["classes"]
        self.shards: list[dict[str, Any]] = index["shards"]
        samples = index["samples"]
        self.names: list[str] = samples["name"]
        self.labels: list[int] = samples["label"].tolist()
        self._where = np.stack([samples[column] for column in ("shard", "offset", "size", "crc32")], axis=1)
        known = {shard["file"] for shard in self.shards}
        for shard in self.shards:
            self._refuse_shard(shard)
        others = sum(path.name not in known for path in self.folder.glob("*.tar"))
        self.notes = [f"{others} .tar files in {self.folder} are not in its {INDEX}"] if others else []

    def _refuse_shard(self, shard: dict[str, Any]) -> None:
        path = self.folder / shard["file"]
        try:
            found = path.stat().st_size
        except OSError as error:
            raise DataError(
                f"shard {path} cannot be read ({error.strerror}), and its {INDEX} names it"
            ) from None
        if found != shard["bytes"]:
            raise DataError(
                f"shard {path} has {found:,} bytes, its {INDEX} says {shard['bytes']:,}; copy it again"
            )

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int) -> Image.Image:
        """Return one image as upright RGB."""
        return read_image(self.describe(index), lambda _: io.BytesIO(self._bytes(index)))

    def _bytes(self, index: int) -> bytes:
        # Opened for each image, as its file would be: no limit of open files, nothing shared with workers.
        shard, offset, size, crc32 = map(int, self._where[index])
        with open_file(self.folder / self.shards[shard]["file"]) as file:
            file.seek(offset)
            content = file.read(size)
        if zlib.crc32(content) != crc32:
            raise ValueError(f"the shard's bytes are not those that {INDEX} was made of")
        if not content:
            raise ValueError("the file is empty")
        return content

    def target(self, index: int) -> int:
        """Return the class number of one image."""
        return self.labels[index]

    def mark(self, index: int) -> list[int]:
        """Return size and checksum of one image, which tell it from an earlier one of its name."""
        return self._where[index, 2:].tolist()

    def describe(self, index: int) -> str:
        """Return shard:member of one image."""
        return f"{self.folder.parent}{os.sep}{self.short(index)}"

    def short(self, index: int) -> str:
        """Return shard:member of one image below the root, which may have come from a secret."""
        name = "".join(each if each.isprintable() else "?" for each in self.names[index])
        return f"{self.folder.name}/{self.shards[int(self._where[index, 0])]['file']}:{name}"


def images_in(folder: str | Path) -> ImageFolder | ImageShards:
    """Return the images of a folder of classes, or those of a folder of shards. Raises DataError."""
    folder = Path(folder)
    if (folder / INDEX).exists():
        return ImageShards(folder)
    try:
        return ImageFolder(folder)
    except DataError:
        if any(folder.glob("*.tar")):
            raise DataError(
                f"{folder} holds .tar files and no {INDEX}; make it with: zoo data index {folder.parent}"
            ) from None
        raise


def check_shards(root: str | Path) -> tuple[int, list[str]]:
    """Return how many shards of a folder are as they were written, and what is wrong with the others.

    All bytes are read. Raises DataError for a folder without indexed shards.
    """
    right, wrong = 0, []
    found = [Path(root) / split for split in SPLITS if (Path(root) / split / INDEX).exists()]
    if not found:
        raise DataError(f"{root} holds no train/{INDEX} or val/{INDEX}; wanted what `zoo data shard` wrote")
    for folder in found:
        for shard in _read_index(folder / INDEX)["shards"]:
            path = folder / shard["file"]
            try:
                with open_file(path) as file:
                    same = hashlib.file_digest(file, "sha256").hexdigest() == shard["sha256"]
            except OSError as error:
                wrong.append(f"{path} cannot be read ({error.strerror})")
                continue
            if same:
                right += 1
            else:
                wrong.append(f"{path} is not what was indexed (another sha256); copy it again")
    return right, wrong


def _read_index(path: Path) -> dict[str, Any]:
    """Return an index whose every entry can be relied on, columns of numbers as arrays. Raises DataError."""
    try:
        with open_file(path) as file:
            index = json.load(file)
        _refuse_index(index)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path} is damaged or no index of shards ({reason}); make it again") from None
    return index


def _refuse_index(index: Any) -> None:
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT!r}")
    classes, shards, samples = index["classes"], index["shards"], index["samples"]
    if not all(isinstance(name, str) for name in [*classes, *samples["name"]]):
        raise ValueError("a name is no text")
    for shard in shards:
        file = shard["file"]
        # The name is opened, so it may lead nowhere else.
        if not isinstance(file, str) or file != os.path.basename(file) or not file.endswith(".tar"):  # noqa: PTH119
            raise ValueError(f"{file!r} is no name of a shard in its folder")
    numbers = {column: _whole(samples[column], column) for column in COLUMNS[1:]}
    if not len(samples["name"]) or {len(column) for column in numbers.values()} != {len(samples["name"])}:
        raise ValueError("its columns are empty or of different lengths")
    sizes = _whole([shard["bytes"] for shard in shards], "bytes")
    limits = {"shard": len(shards), "label": len(classes), "size": MAX_BYTES, "crc32": 2**32}
    for column, limit in limits.items():
        if numbers[column].max() >= limit:
            raise ValueError(f"{column} {numbers[column].max()} is not below {limit}")
    if (numbers["offset"] + numbers["size"] > sizes[numbers["shard"]]).any():
        raise ValueError("an image lies behind the end of its shard")
    samples.update(numbers)


def _whole(values: list[int], column: str) -> np.ndarray:
    numbers = np.asarray(values)
    if numbers.dtype.kind != "i" or numbers.ndim != 1 or numbers.min() < 0 or numbers.max() > 2**62:
        raise ValueError(f"{column} holds more than whole numbers from 0")
    return numbers


# ---- writing


def write_shards(
    root: str | Path, out: str | Path, *, size: int = 256_000_000, tell: Callable[[str], None] = print
) -> None:
    """Write the image folder `root` (train/ and val/, a sub-folder for each class) as shards into `out`.

    Image files are copied as they are, in an order shuffled once, so that readers which stream see no class
    for long; a shard ends after `size` bytes. `out` appears when all of it is written. Raises ConfigError
    where it exists, DataError for what is wrong with the images, ResourceError for a full disk.
    """
    from zoo.recipes.data import load_halves
    from zoo.recipes.schema import GenerationRecipe

    out = Path(out).resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} exists already; name a new folder")
    made = GenerationRecipe()  # not every task refuses a single class
    made.data.name, made.data.root = "folder", str(root)
    halves = dict(zip(SPLITS, load_halves(made), strict=True))  # just what training would accept
    for split, images in halves.items():
        if not isinstance(images, ImageFolder):
            raise ConfigError(f"{Path(root) / split} holds shards already")
    broken = next((name for name in halves["train"].classes if "\n" in name), None)
    if broken is not None:
        raise DataError(f"the class folder {broken!r} in {root} has a line break in its name; rename it")
    part = out.with_name(f"{out.name}.part")
    try:
        part.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(
            f"{part} is what a stopped command left, or one that still writes; remove it, or name another"
        ) from None
    try:
        for split, images in halves.items():
            for note in images.notes:
                tell(note)
            _write_split(images, part / split, size, tell)
        names = "".join(f"{name}\n" for name in halves["train"].classes).encode(errors="surrogateescape")
        write_atomically(part / CLASSES, lambda file: file.write(names))
        part.replace(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _write_split(images: ImageFolder, folder: Path, size: int, tell: Callable[[str], None]) -> None:
    folder.mkdir()
    keys = _keys(images)
    pending = list(range(len(images)))
    random.Random(0).shuffle(pending)
    shards: list[dict[str, Any]] = []
    samples: dict[int, tuple[int, Sample]] = {}
    while pending:
        path = folder / f"{len(shards):06d}.tar"
        written: list[int] = []
        write_atomically(path, partial(_write_tar, images, keys, pending, size, written))
        facts, found = index_tar(path)
        samples |= {number: (len(shards), each) for number, each in zip(written, found, strict=True)}
        shards.append(facts)
        tell(f"{folder.name}/{path.name}: {len(found):,} images, {facts['bytes'] / 1e6:,.1f} MB")
    _write_index(folder, images.classes, shards, [samples[number] for number in range(len(images))])


def _keys(images: ImageFolder) -> list[str]:
    """Return a key for each image: its path below the split without its ending, each once."""
    keys: dict[str, None] = {}
    for file in images.files:
        folder, name = os.path.split(os.path.relpath(file, images.root))
        stem = os.path.splitext(name)[0].replace(".", "_")  # noqa: PTH122
        # What cannot be printed or encoded would make the archive depend on who reads it.
        key = "".join(each if each.isprintable() else "_" for each in f"{folder}/{stem}")
        number, free = 1, key
        while free in keys:
            number += 1
            free = f"{key}_{number}"
        keys[free] = None
    return list(keys)


def _write_tar(
    images: ImageFolder, keys: list[str], pending: list[int], size: int, written: list[int], file: IO[bytes]
) -> None:
    with tarfile.open(fileobj=file, mode="w") as tar:
        while pending and tar.offset < size:
            number = pending.pop()
            path = images.files[number]
            try:
                with open_file(path) as source:
                    content = source.read(MAX_BYTES)
            except OSError as error:
                raise DataError(f"{path} cannot be read ({error.strerror})") from None
            if len(content) == MAX_BYTES:
                raise DataError(f"{path} has {MAX_BYTES:,} bytes or more, too many for an image")
            ending = os.path.splitext(path)[1].lower()  # noqa: PTH122
            for name, data in ((ending, content), (".cls", str(images.labels[number]).encode())):
                member = tarfile.TarInfo(keys[number] + name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            written.append(number)


def _write_index(
    folder: Path, classes: list[str], shards: list[dict[str, Any]], samples: list[tuple[int, Sample]]
) -> None:
    rows = [(each.name, shard, *each[1:]) for shard, each in samples]
    columns = dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
    index = {"format": FORMAT, "classes": classes, "shards": shards, "samples": columns}
    write_atomically(folder / INDEX, lambda file: file.write(json.dumps(index).encode()))


# ---- shards that others wrote


def index_shards(root: str | Path, *, tell: Callable[[str], None] = print) -> None:
    """Write the index of shards that any WebDataset writer left in `root`/train and `root`/val.

    Class names come from `root`/classes.txt, one a line, or are the class numbers. Raises ConfigError where
    an index exists, DataError for what is wrong with a shard.
    """
    root = Path(root)
    folders = [root / split for split in SPLITS if any((root / split).glob("*.tar"))]
    if not folders:
        raise DataError(f"{root} holds no .tar files in train/ or val/; wanted {root}/train/NAME.tar")
    for folder in folders:
        if (folder / INDEX).exists():
            raise ConfigError(
                f"{folder / INDEX} exists; remove it to make it again, which may order images anew"
            )
    splits = {}
    for folder in folders:
        shards, samples = [], []
        for number, path in enumerate(sorted(folder.glob("*.tar"))):
            facts, found = index_tar(path)
            shards.append(facts)
            samples += [(number, each) for each in found]
            tell(f"{folder.name}/{path.name}: {len(found):,} images, {facts['bytes'] / 1e6:,.1f} MB")
        splits[folder] = shards, samples
    count = 1 + max(each.label for _, samples in splits.values() for _, each in samples)
    classes = _class_names(root / CLASSES, count)
    for folder, (shards, samples) in splits.items():
        _write_index(folder, classes, shards, samples)


def _class_names(path: Path, count: int) -> list[str]:
    if not path.exists():
        return [str(number) for number in range(count)]
    with open_file(path) as file:
        text = file.read().decode(errors="surrogateescape")
    names = [name.removesuffix("\r") for name in text.removesuffix("\n").split("\n")]
    if len(names) < count:
        raise DataError(
            f"{path} names {len(names)} classes, but there are images of class number {count - 1}"
        )
    if len(set(names)) < len(names):
        raise DataError(f"{path} holds a name twice; wanted another one in each line")
    return names


def index_tar(path: Path) -> tuple[dict[str, Any], list[Sample]]:
    """Return file name, size and hash of a shard, and its images in order. Nothing is unpacked.

    Raises DataError for a damaged archive, and a key that has not just one image and one class.
    """
    try:
        with open_file(path) as file:
            total = os.fstat(file.fileno()).st_size
            samples = _samples(file, total, path)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except DataError:
        raise
    # tarfile may raise anything on damaged input.
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"{path} is damaged or no tar file ({reason})") from None
    return {"file": path.name, "bytes": total, "sha256": digest}, samples


def _samples(file: IO[bytes], total: int, path: Path) -> list[Sample]:
    images: dict[str, tuple[str, int, int, int]] = {}
    labels: dict[str, int] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        last = -1
        while (member := tar.next()) is not None:
            if member.offset <= last or member.size < 0 or member.offset_data + member.size > total:
                raise DataError(f"{path} is damaged: {member.name!r} goes beyond its end")
            last = member.offset
            match = KEY.fullmatch(member.name)
            if match is None or not member.isreg():
                continue  # folders, and links, which lead nowhere here
            key, kind = match[1], match[2].lower()
            if f".{kind}" not in ENDINGS and kind != "cls":
                continue
            if key in (labels if kind == "cls" else images):
                raise DataError(
                    f"{path} holds {'two class numbers' if kind == 'cls' else 'two images'} of {key!r}"
                )
            if member.issparse() or member.size >= MAX_BYTES:
                raise DataError(f"{path}: {member.name!r} is sparse or has {MAX_BYTES:,} bytes or more")
            file.seek(member.offset_data)
            content = file.read(member.size)
            if kind == "cls":
                labels[key] = _label(content, f"{path}: {member.name!r}")
            else:
                images[key] = (member.name, member.offset_data, member.size, zlib.crc32(content))
        # A damaged header in the middle looks to tarfile like the end.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(f"{path} is damaged or cut off at byte {tar.offset:,}")
    alone = next(iter(images.keys() ^ labels.keys()), None)
    if alone is not None:
        missing = "class number (.cls)" if alone in images else "image"
        raise DataError(f"{path} holds no {missing} for {alone!r}")
    if not images:
        raise DataError(f"{path} holds no images; wanted key.jpg (or .png ...) and key.cls for each")
    return [Sample(*where, labels[key]) for key, where in images.items()]


def _label(content: bytes, name: str) -> int:
    text = content.strip()
    if not (text.isdigit() and len(text) < 10 and int(text) < MAX_CLASSES):
        raise DataError(f"{name} holds no class number below {MAX_CLASSES:,}")
    return int(text)
