"""Image files are read upright, in RGB, 16 bits scaled; what cannot be read is named; folders are checked."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.errors import DataError
from zoo.recipes.config import Recipe
from zoo.recipes.data import load_half, load_halves
from zoo.recipes.data.images import ImageFolder, image_files, read_image


def gradient(height: int = 24, width: int = 32) -> np.ndarray:
    rows = np.linspace(0, 200, height)[:, None, None]
    columns = np.linspace(0, 55, width)[None, :, None]
    return np.round(rows + columns + np.array([0, 0, 0])).astype(np.uint8)


def mean(image: Image.Image) -> float:
    return float(np.asarray(image, dtype=np.float64).mean())


# ---- what an image file may be


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "CMYK", "1", "YCbCr", "LAB"])
def test_every_mode_becomes_rgb_of_the_same_brightness(tmp_path, mode):
    source = Image.fromarray(gradient())
    ending = {"CMYK": "jpg", "YCbCr": "jpg", "LAB": "tif"}.get(mode, "png")
    file = tmp_path / f"image.{ending}"
    converted = source.convert("RGB").convert(mode) if mode != "LAB" else source
    try:
        converted.save(file)
    except OSError:
        pytest.skip(f"Pillow writes no {mode} into {ending}")
    image = read_image(file)
    assert (image.mode, image.size) == ("RGB", (32, 24))
    assert mean(image) == pytest.approx(mean(source), abs=3 if mode != "1" else 12)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bits_are_scaled_and_not_clipped(tmp_path, ending):
    pixels = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / f"deep.{ending}")
    image = read_image(tmp_path / f"deep.{ending}")
    assert mean(image) == pytest.approx(127.5, abs=1)
    assert np.asarray(image).max() == 255


def test_transparency_lies_over_white(tmp_path):
    ink = np.zeros((8, 8, 4), dtype=np.uint8)
    ink[2:6, 2:6, 3] = 255  # black where opaque, and black where transparent
    Image.fromarray(ink).save(tmp_path / "ink.png")
    pixels = np.asarray(read_image(tmp_path / "ink.png"))
    assert pixels[0, 0].tolist() == [255] * 3
    assert pixels[3, 3].tolist() == [0] * 3


def test_a_transparent_palette_lies_over_white(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "palette.png", transparency=0)
    pixels = np.asarray(read_image(tmp_path / "palette.png"))
    assert pixels[0, 0].tolist() == [255] * 3 and pixels[1, 1].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    image = Image.fromarray(gradient(20, 40))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").size == ((40, 20) if orientation <= 4 else (20, 40))


# ---- what cannot be read


def png_with_short_data() -> bytes:
    """Whole chunks with right checksums, but too little image data: some decoders die of it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 512, 512, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"ab"))
        + chunk(b"IEND", b"")
    )


def damaged(folder: Path, kind: str) -> Path:
    file = folder / f"{kind}.png"
    Image.fromarray(gradient()).save(file)
    whole = file.read_bytes()
    if kind == "truncated":
        file.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "web-page":
        file.write_bytes(b"<html>not found</html>")
    elif kind == "text":
        file.write_bytes(b"P3 this is no picture")
    elif kind == "short-data":
        file.write_bytes(png_with_short_data())
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    elif kind == "missing":
        file.unlink()
    elif kind == "float":
        file = file.with_suffix(".tif")
        Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(file)
    elif kind == "line":
        Image.new("L", (1, 5000)).save(file)
    elif kind == "other-format":
        Image.fromarray(gradient()).save(file, format="ICO")
    elif kind == "huge":
        Image.new("1", (10_000, 9_000)).save(file)
    return file


KINDS = [
    "truncated", "empty", "web-page", "text", "short-data", "folder", "missing", "float", "line",
    "other-format", "huge",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_read_is_named_with_the_reason(tmp_path, kind):
    file = damaged(tmp_path, kind)
    with pytest.raises(DataError) as caught:
        read_image(file)
    message = str(caught.value)
    assert message.startswith(f"{file} cannot be read as an image: ")
    assert len(message) > len(f"{file} cannot be read as an image: ") + 3
    assert "\n" not in message


def test_one_pixel_is_an_image(tmp_path):
    Image.new("L", (1, 1), 7).save(tmp_path / "dot.png")
    assert read_image(tmp_path / "dot.png").size == (1, 1)


def test_no_damaged_file_ends_the_process(tmp_path):
    """Bytes changed at random in every format: each file is read, or refused with its name."""
    code = """
import io, random, sys
from pathlib import Path
import numpy as np
from PIL import Image
from zoo.errors import DataError
from zoo.recipes.config import Recipe
from zoo.recipes.data import load_half, load_halves
from zoo.recipes.data.images import read_image
random.seed(0)
pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
folder = Path(sys.argv[1])
for ending in ("png", "jpg", "webp", "tif", "bmp", "gif"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format={"jpg": "jpeg", "tif": "tiff"}.get(ending, ending))
    for number in range(60):
        data = bytearray(buffer.getvalue())
        for _ in range(random.randint(1, 20)):
            data[random.randrange(len(data))] = random.randrange(256)
        file = folder / f"image.{ending}"
        file.write_bytes(data[: random.randint(1, len(data))] if number % 3 == 0 else data)
        try:
            assert read_image(file).mode == "RGB"
        except DataError as error:
            assert str(file) in str(error)
print("alive")
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert result.stdout.strip() == "alive", result.stderr


@pytest.mark.slow
def test_bombs_are_refused_by_what_they_declare(tmp_path):
    """A header of 225 million pixels, 169 million real ones in half a megabyte: neither is decoded."""
    code = """
import resource, struct, sys, zlib
from pathlib import Path
from PIL import Image
from zoo.errors import DataError
from zoo.recipes.data.images import read_image

def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

def png(file, side, data):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    file.write_bytes(b"\\x89PNG\\r\\n\\x1a\\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b""))

folder = Path(sys.argv[1])
png(folder / "header.png", 15_000, zlib.compress(b"ab"))
packer = zlib.compressobj(9)
row = bytes(1 + 3 * 13_000)
png(folder / "real.png", 13_000, b"".join(packer.compress(row) for _ in range(13_000)) + packer.flush())
Image.new("L", (8, 8)).save(folder / "good.png")
read_image(folder / "good.png")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in ("header.png", "real.png"):
    try:
        read_image(folder / name)
    except DataError as error:
        print(name in str(error))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    *refused, megabytes = result.stdout.split()
    assert refused == ["True", "True"]
    assert int(megabytes) < 300


# ---- folders


def tree(root: Path, *files: str) -> Path:
    for name in files:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".png", ".PNG", ".jpg")):
            Image.new("RGB", (4, 4)).save(file, format="png")
        else:
            file.write_text("?")
    return root


def test_a_folder_gives_sorted_classes_and_images_also_from_sub_folders(tmp_path):
    images = ImageFolder(tree(tmp_path, "b/2.png", "b/1.PNG", "a/deep/er/3.jpg", "a/0.png"))
    assert images.classes == ["a", "b"]
    assert images.labels == [0, 0, 1, 1]
    assert [images.short(i).split("/", 1)[1] for i in range(4)] == [
        "a/0.png",
        "a/deep/er/3.jpg",
        "b/1.PNG",
        "b/2.png",
    ]


def test_hidden_folders_and_files_are_ignored(tmp_path):
    images = ImageFolder(
        tree(tmp_path, "a/1.png", "b/1.png", ".ipynb_checkpoints/1.png", "a/.hidden/2.png", "a/._1.png")
    )
    assert images.classes == ["a", "b"]
    assert len(images) == 2
    assert images.notes == []


def test_links_are_followed_but_no_image_is_found_twice(tmp_path):
    root = tree(tmp_path / "root", "red/1.png", "red/deep/2.png", "blue/3.png")
    tree(tmp_path / "elsewhere", "4.png", "5.png")
    (root / "red" / "up").symlink_to("..")
    (root / "red" / "deep" / "self").symlink_to(".")
    (root / "blue" / "more").symlink_to(tmp_path / "elsewhere")
    (root / "blue" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    (root / "green").symlink_to(tmp_path / "elsewhere")
    images = ImageFolder(root)
    assert images.classes == ["blue", "green", "red"]
    names = [Path(file).relative_to(root).as_posix() for file in images.files]
    assert names[:5] == ["blue/3.png", "blue/again/4.png", "blue/again/5.png", "green/4.png", "green/5.png"]
    assert names[-2:] == ["red/1.png", "red/deep/2.png"]


def test_files_with_other_endings_are_counted(tmp_path):
    images = ImageFolder(tree(tmp_path, "a/1.png", "a/x.txt", "a/y.txt", "b/1.png", "b/z.heic"))
    assert "3 files" in images.notes[0] and "2 .txt" in images.notes[0]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "no class folders"),
        (["1.png"], "no class folders"),
        (["a/1.png", "b/x.txt", "c/"], "1 of 2 class folders"),
        (["images/a/1.png", "images/b/2.png"], "one level"),
    ],
)
def test_a_folder_of_another_layout_is_refused(tmp_path, files, words):
    with pytest.raises(DataError, match=words) as caught:
        ImageFolder(tree(tmp_path, *[name for name in files if not name.endswith("/")]))
    assert str(tmp_path) in str(caught.value)


def test_a_class_whose_name_is_no_text_is_shown_and_refused(tmp_path):
    root = tree(tmp_path, os.fsdecode(b"l\xfctin/1.png"), "b/1.png")
    with pytest.raises(DataError, match=r"class folder 'l\\udcfctin' in .* not UTF-8; rename it"):
        ImageFolder(root)


def test_a_single_class_is_fine_when_its_images_are_in_it(tmp_path):
    assert ImageFolder(tree(tmp_path, "only/1.png")).classes == ["only"]


def of_folder(root: Path) -> Recipe:
    made = Recipe()
    made.data.name, made.data.root = "folder", str(root)
    return made


def test_validation_alone_needs_no_training_images(tmp_path):
    assert len(load_half(of_folder(tree(tmp_path, "val/a/1.png", "val/b/1.png")), train=False)) == 2


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["train/a/1.png"], r"no val/ inside"),
        (["a/1.png"], r"no train/ inside \(found a\)"),
        (
            ["train/a/1.png", "train/b/1.png", "val/a/1.png", "val/c/1.png"],
            "only in train: b; only in val: c",
        ),
        (["train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/x.txt"], "hold no image: b"),
    ],
)
def test_training_and_validation_must_match(tmp_path, files, words):
    with pytest.raises(DataError, match=words):
        load_halves(of_folder(tree(tmp_path, *files)))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="no folder .*nowhere"):
        load_halves(of_folder(tmp_path / "nowhere"))


def test_a_folder_at_home_is_found_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tree(tmp_path, "data/val/a/1.png", "data/val/b/1.png")
    assert len(load_half(of_folder(Path("~/data")), train=False)) == 2
    assert len(ImageFolder("~/data/val")) == len(image_files(["~/data"])) == 2
    with pytest.raises(DataError, match="no folder ~nobody-of-that-name/data"):
        ImageFolder("~nobody-of-that-name/data")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_named(tmp_path):
    (tmp_path / "train").mkdir(mode=0)
    with pytest.raises(DataError, match="train"):
        ImageFolder(tmp_path / "train")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("closed", ["a", "a/deep"])
def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, closed):
    root = tree(tmp_path, "a/1.png", "a/deep/2.png", "b/3.png")
    (root / closed).chmod(0)
    try:
        for find in (ImageFolder, lambda folder: image_files([folder])):
            with pytest.raises(DataError, match=rf"/{closed} cannot be read \(Permission denied\)"):
                find(root)
    finally:
        (root / closed).chmod(0o755)


# ---- what a user names on the command line


def test_files_folders_and_patterns_are_found_once_and_in_order(tmp_path):
    tree(tmp_path, "b/2.png", "b/10.png", "a.png", "notes.txt", "c.png")
    found = image_files([tmp_path / "a.png", tmp_path / "b", f"{tmp_path}/*.png"])
    assert [Path(file).relative_to(tmp_path).as_posix() for file in found] == [
        "a.png",
        "b/10.png",
        "b/2.png",
        "c.png",
    ]


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path):
    tree(tmp_path, "a[1].png")
    assert image_files([tmp_path / "a[1].png"]) == [str(tmp_path / "a[1].png")]


@pytest.mark.parametrize("source", ["empty", "empty/*.png", "**/*.tif"])
def test_a_folder_or_pattern_without_images_is_refused(tmp_path, source):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image"):
        image_files([f"{tmp_path}/{source}"])
