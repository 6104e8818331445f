"""Shards are the folder they were written from, to every program that reads them, or one line says why."""

from __future__ import annotations

import gc
import io
import json
import pickle
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from zoo.cli import main
from zoo.errors import ConfigError, DataError, ZooError
from zoo.recipes.config import recipe
from zoo.recipes.data import load_half, load_halves
from zoo.recipes.data.images import split_of
from zoo.recipes.data.latents import _key as latents_key
from zoo.recipes.data.loader import EpochLoader
from zoo.recipes.data.shards import (
    ImageShards,
    check_shards,
    images_in,
    index_shards,
    index_tar,
    write_shards,
)
from zoo.recipes.data.transforms import ImageOnly, InputSettings, eval_transform
from zoo.recipes.evaluate import evaluate
from zoo.recipes.schema import Recipe
from zoo.recipes.training import Training

SIZE = 6000  # of a shard: four images or so


def of_folder(root: Path) -> Recipe:
    made = Recipe()
    made.data.name, made.data.root = "folder", str(root)
    return made


def quiet(_: str) -> None: ...


@pytest.fixture(scope="module")
def written(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image folder as shards, for reading only."""
    out = tmp_path_factory.mktemp("shards") / "out"
    write_shards(image_folder, out, size=SIZE, tell=quiet)
    return out


@pytest.fixture
def shards(image_folder: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    write_shards(image_folder, tmp_path / "out", size=SIZE, tell=quiet)
    return tmp_path / "out"


def pack(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> Path:
    """Write an archive of these members, as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for each in members:
            if isinstance(each, tarfile.TarInfo):
                tar.addfile(each)
                continue
            member = tarfile.TarInfo(each[0])
            member.size = len(each[1])
            tar.addfile(member, io.BytesIO(each[1]))
    return path


def png(level: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (level,) * 3).save(buffer, format="png")
    return buffer.getvalue()


def refused(act: Callable[[], object], *words: str, error: type[ZooError] = DataError) -> None:
    with pytest.raises(error) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message and message.isprintable()
    assert all(word in message for word in words), message


# ---- what is written and read


def test_shards_are_the_folder_image_for_image(image_folder, written):
    for split, count in (("train", 26), ("val", 10)):
        folder, shards = split_of(image_folder, split), images_in(written / split)
        assert isinstance(shards, ImageShards) and len(shards) == count
        assert (shards.classes, shards.labels, shards.notes) == (folder.classes, folder.labels, [])
        for index in range(count):
            assert np.array_equal(shards.load(index), folder.load(index))
            assert shards.target(index) == folder.target(index)


def test_a_recipe_reads_them_by_the_name_folder(written):
    train, val = load_halves(of_folder(written))
    assert isinstance(train, ImageShards) and isinstance(val, ImageShards)


def test_the_archives_hold_the_files_to_the_byte_and_mix_the_classes(image_folder, written):
    found = {}
    for path in sorted((written / "train").glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    images = sorted((image_folder / "train").rglob("*.png"))
    assert len(found) == 2 * len(images)
    for file in images:
        name = file.relative_to(image_folder / "train").as_posix()
        assert found[name] == file.read_bytes()
        assert found[name.replace(".png", ".cls")] == (b"0" if "dark" in name else b"1")
    with tarfile.open(written / "train" / "000000.tar") as tar:
        assert {member.name.split("/")[0] for member in tar} == {"dark", "light"}


def test_writing_twice_gives_the_same_bytes(written, shards):
    files = sorted(path.relative_to(written) for path in written.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(shards) for path in shards.rglob("*") if path.is_file())
    assert len([name for name in files if name.suffix == ".tar"]) > 4
    assert all((written / name).read_bytes() == (shards / name).read_bytes() for name in files)


def test_they_go_to_reader_processes_by_pickle(written):
    images = pickle.loads(pickle.dumps(images_in(written / "train")))  # noqa: S301
    assert images.load(3).size == (12, 14)


def test_names_that_tar_or_its_readers_would_misread(tmp_path):
    """Points, equal stems, sub-folders, long and other scripts' names: each image has a key of its own."""
    names = [
        "a.b.png",
        "a_b.png",
        "1.png",
        "1.jpg",
        "deep/er/1.PNG",
        "ä é.png",
        f"{'long' * 40}.png",
        "n\nl.png",
    ]
    for split in ("train", "val"):
        for level, name in enumerate(names):
            file = tmp_path / "in" / split / "c.lass" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(20 * level))
    write_shards(tmp_path / "in", tmp_path / "out", tell=quiet)
    folder, shards = split_of(tmp_path / "in", "train"), images_in(tmp_path / "out" / "train")
    assert [np.array(shards.load(i)).max() for i in range(8)] == [
        np.array(folder.load(i)).max() for i in range(8)
    ]
    keys = [name.rsplit("/", 1)[1].split(".")[0] for name in shards.names if "deep" not in name]
    assert len(set(keys)) == 7 and all(name.isprintable() for name in shards.names)


# ---- other programs


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_what_we_write(image_folder, written):
    webdataset = pytest.importorskip("webdataset", reason="pip install webdataset")
    paths = sorted(map(str, (written / "train").glob("*.tar")))
    read = webdataset.WebDataset(paths, shardshuffle=False, empty_check=False).decode("rgb8")
    found = {sample["__key__"]: (sample["png"], sample["cls"]) for sample in read}
    del read
    gc.collect()  # it leaves its files open, of which the next test is not to be told
    assert len(found) == 26
    for key, (pixels, label) in found.items():
        assert np.array_equal(pixels, Image.open(image_folder / "train" / f"{key}.png").convert("RGB"))
        assert label == ("dark", "light").index(key.split("/")[0])


def test_we_read_what_webdataset_writes(image_folder, tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="pip install webdataset")
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        images = split_of(image_folder, split)
        pattern = str(tmp_path / split / "part-%04d.tar")
        with webdataset.ShardWriter(pattern, maxcount=7, verbose=0) as sink:
            for index, file in enumerate(images.files):
                sample = {"png": Path(file).read_bytes(), "cls": images.labels[index], "json": {"from": file}}
                sink.write({"__key__": f"sample{index:04d}", **sample})
    index_shards(tmp_path, tell=quiet)
    folder, shards = split_of(image_folder, "train"), images_in(tmp_path / "train")
    assert shards.classes == ["0", "1"] and shards.labels == folder.labels
    assert all(np.array_equal(shards.load(index), folder.load(index)) for index in range(26))


def test_classes_have_the_names_of_a_list_beside_them(tmp_path):
    pack(tmp_path / "val" / "a.tar", ("x.png", png()), ("x.cls", b"1\n"))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    index_shards(tmp_path, tell=quiet)
    images = load_half(of_folder(tmp_path), train=False)
    assert (images.classes, images.labels) == (["cat", "dog"], [1])


# ---- training


@pytest.fixture
def train(run, written):
    """run("name", "key=value", ...) on the shards."""
    return lambda name, *overrides, **keywords: run(name, f"data.root={written}", *overrides, **keywords)


def same_run(one: Path, other: Path) -> bool:
    left, right = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    metrics = (one / "metrics.csv").read_text() == (other / "metrics.csv").read_text()
    return metrics and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_gets_the_share_it_would_have_of_the_folder(image_folder, written, rank):
    """From the middle of an epoch on, as after a resume."""
    numbers = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    settings = InputSettings(size=(3, 8, 8), **numbers)
    found = []
    for root in (image_folder, written):
        images = load_half(of_folder(root), train=True)
        loader = EpochLoader(images, ImageOnly(eval_transform(settings)), batch_size=4, seed=3, train=True)
        loader.share(rank, 2)
        loader.position = (1, 1)
        found.append(list(loader))
    folder, shards = found
    assert len(folder) == len(shards) == 2
    for (pixels, labels), (others, other_labels) in zip(folder, shards, strict=True):
        assert torch.equal(pixels, others) and torch.equal(labels, other_labels)


def test_training_from_shards_is_training_from_the_folder_bit_for_bit(run, train):
    assert same_run(run("folder").folder, train("shards").folder)


@pytest.mark.slow
def test_reader_processes_change_nothing(run, train):
    assert same_run(run("folder").folder, train("shards", "data.workers=2").folder)


@pytest.mark.slow
def test_a_run_is_measured_on_shards_as_on_their_folder(image_folder, written, finished):
    of_images, of_shards = (evaluate(finished, root) for root in (image_folder, written))
    assert (of_shards.images, of_shards.top1, of_shards.loss) == (10, of_images.top1, of_images.loss)


def test_latents_in_the_cache_are_those_of_the_shards_at_hand(shards):
    """An image that was replaced under its name has other latents."""
    vae = torch.nn.Identity()
    before = latents_key(images_in(shards / "val"), vae, np.abs)
    assert latents_key(images_in(shards / "val"), vae, np.abs) == before
    path = shards / "val" / "shards.json"
    index = json.loads(path.read_text())
    index["samples"]["crc32"][3] ^= 1
    path.write_text(json.dumps(index))
    assert latents_key(images_in(shards / "val"), vae, np.abs) != before


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_goes_on_exactly(run, train, tmp_path, monkeypatch, workers):
    whole = run("folder").folder

    class Killed(BaseException): ...

    original = Training.training_step

    def hooked(self, batch, batch_idx):
        if self.trainer.global_step == 4:
            monkeypatch.setattr(Training, "training_step", original)
            raise Killed
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Training, "training_step", hooked)
    with pytest.raises(Killed):
        train("run", f"data.workers={workers}")
    train("run", resume=tmp_path / "run")
    assert same_run(whole, tmp_path / "run")


# ---- shards that are not what they were


def spoil(shards: Path, index: int = 0) -> str:
    """Change a byte of one training image in its shard; return shard:member."""
    images = ImageShards(shards / "train")
    name = images.short(index)
    path = shards / name.split(":")[0]
    content = path.read_bytes()
    inside = content.index(images.names[index].encode()) + tarfile.BLOCKSIZE + 40
    path.write_bytes(content[:inside] + bytes([content[inside] ^ 1]) + content[inside + 1 :])
    return name


def test_a_changed_image_is_named_by_shard_and_member(shards):
    name = spoil(shards)
    refused(
        lambda: images_in(shards / "train").load(0),
        f"{shards}/{name} cannot be read as an image: ",
        "not those that shards.json was made of",
    )
    assert name.endswith(".tar:dark/00.png")


def test_bad_images_in_shards_are_skipped_and_listed_as_those_of_folders(shards, run):
    name = spoil(shards)
    refused(lambda: run("stops", f"data.root={shards}"), name)
    folder = run("skips", f"data.root={shards}", "data.bad_images=skip", "optim.epochs=1").folder
    assert (folder / "bad_files.txt").read_text().startswith(f"{name} cannot be read as an image: ")


def test_a_damaged_image_is_kept_and_told_when_it_is_read(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "in" / split / "a").mkdir(parents=True)
        for name, content in (("empty", b""), ("page", b"<html>"), ("whole", png())):
            (tmp_path / "in" / split / "a" / f"{name}.png").write_bytes(content)
    write_shards(tmp_path / "in", tmp_path / "out", tell=quiet)
    images = images_in(tmp_path / "out" / "val")
    refused(lambda: images.load(0), "val/000000.tar:a/empty.png", "the file is empty")
    refused(lambda: images.load(1), "val/000000.tar:a/page.png", "damaged, or none of JPEG")
    assert images.load(2).size == (4, 4)


def test_a_cut_or_missing_shard_is_told_before_training(shards):
    path = shards / "train" / "000001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    refused(lambda: images_in(shards / "train"), str(path), "bytes", "copy it again")
    path.unlink()
    refused(lambda: images_in(shards / "train"), str(path), "No such file")


def test_check_reads_all_and_names_what_changed(shards, capsys):
    assert check_shards(shards)[1] == []
    spoil(shards)
    (shards / "val" / "000001.tar").unlink()
    assert main(["data", "check", str(shards)]) == 3
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 2
    assert "another sha256" in printed.err and "val/000001.tar cannot be read" in printed.err


def put(index: dict, where: str, value: object) -> None:
    *parents, leaf = where.split(".")
    for part in parents:
        index = index[int(part) if isinstance(index, list) else part]
    index[int(leaf) if isinstance(index, list) else leaf] = value


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("format", "another"),
        ("classes", 3),
        ("classes", ["dark"]),
        ("shards", {}),
        ("shards.0.file", "../val/000000.tar"),
        ("shards.0.file", "/etc/passwd"),
        ("shards.0.bytes", "many"),
        ("samples", []),
        ("samples.name.0", 3),
        ("samples.label.0", 2),
        ("samples.label.0", -1),
        ("samples.label.0", 0.5),
        ("samples.shard.0", 99),
        ("samples.offset.0", 10**6),
        ("samples.offset.0", 10**30),
        ("samples.size.0", 2**40),
        ("samples.size", [1]),
        ("samples.crc32.0", None),
        ("samples.name", []),
    ],
)
def test_a_wrong_index_is_refused(shards, where, value):
    path = shards / "train" / "shards.json"
    index = json.loads(path.read_text())
    put(index, where, value)
    path.write_text(json.dumps(index))
    refused(lambda: images_in(shards / "train"), str(path), "damaged or no index")


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, "\x00", '{"format": "attnzoo shards 1"}'])
def test_what_is_no_index_is_refused(shards, content):
    (shards / "train" / "shards.json").write_text(content)
    refused(lambda: images_in(shards / "train"), "shards.json is damaged or no index")


def test_an_index_that_is_off_by_a_block_is_seen(shards):
    path = shards / "train" / "shards.json"
    index = json.loads(path.read_text())
    index["samples"]["offset"] = [offset - 512 for offset in index["samples"]["offset"]]
    path.write_text(json.dumps(index))
    refused(lambda: images_in(shards / "train").load(5), "not those that shards.json was made of")


def test_shards_without_an_index_say_what_makes_one(shards):
    (shards / "val" / "shards.json").unlink()
    refused(
        lambda: load_halves(of_folder(shards)), f"{shards}/val holds .tar files", f"zoo data index {shards}"
    )


# ---- archives of others


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.png", b"1")], "no class number (.cls) for 'a'"),
        ([("a.cls", b"1")], "no image for 'a'"),
        ([("a.png", b"1"), ("a.cls", b"0"), ("a.png", b"2")], "two images of 'a'"),
        ([("a.png", b"1"), ("a.jpg", b"1"), ("a.cls", b"0")], "two images of 'a'"),
        ([("a.png", b"1"), ("a.cls", b"0"), ("a.cls", b"0")], "two class numbers of 'a'"),
        ([("a.png", b"1"), ("a.cls", b"cat")], "'a.cls' holds no class number"),
        ([("a.png", b"1"), ("a.cls", b"-1")], "'a.cls' holds no class number"),
        ([("a.png", b"1"), ("a.cls", b"9999999")], "'a.cls' holds no class number"),
        ([("a.json", b"{}")], "holds no images"),
        ([], "holds no images"),
        ([("\x1b[2J\n.png", b"1")], r"'\x1b[2J\n'"),
    ],
)
def test_an_archive_without_one_image_and_class_for_each_key_is_refused(tmp_path, members, words):
    path = pack(tmp_path / "val" / "a.tar", *members)
    refused(lambda: index_shards(tmp_path, tell=quiet), str(path), words)
    assert not (tmp_path / "val" / "shards.json").exists()


def test_too_few_class_names_are_refused(tmp_path):
    pack(tmp_path / "val" / "a.tar", ("a.png", png()), ("a.cls", b"2"))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    refused(lambda: index_shards(tmp_path, tell=quiet), "names 2 classes", "class number 2")


@pytest.mark.parametrize("kind", ["page", "cut", "no end", "header", "compressed"])
def test_a_damaged_archive_is_refused(written, tmp_path, kind):
    whole = (written / "train" / "000000.tar").read_bytes()
    content = {
        "page": b"<html>404</html>",
        "cut": whole[:1000],
        "no end": whole[: len(whole) // 2 // 512 * 512],
        "header": whole[:2048].replace(b"ustar", b"USTAR") + whole[2048:],
        "compressed": b"\x1f\x8b" + whole,
    }[kind]
    path = tmp_path / "val" / "a.tar"
    path.parent.mkdir()
    path.write_bytes(content)
    refused(lambda: index_shards(tmp_path, tell=quiet), str(path), "damaged")


def test_hostile_members_are_never_written_nor_followed(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(99))
    link = tarfile.TarInfo("b.png")
    link.type, link.linkname = tarfile.SYMTYPE, str(secret)
    hostile = ("../../evil.png", png()), ("../../evil.cls", b"0"), (f"{tmp_path}/abs.png", png())
    root = tmp_path / "root"
    pack(root / "val" / "a.tar", *hostile, (f"{tmp_path}/abs.cls", b"0"))
    index_shards(root, tell=quiet)
    images = images_in(root / "val")
    assert [images.load(index).getpixel((0, 0)) for index in range(2)] == [(0, 0, 0)] * 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "a.tar", "root", "secret.png", "shards.json", "val",
    ]  # fmt: skip
    other = tmp_path / "other"
    pack(other / "val" / "a.tar", link, ("b.cls", b"0"))
    refused(lambda: index_shards(other, tell=quiet), "no image for 'b'")


def test_bytes_changed_at_random_are_refused_in_one_line_or_harmless(shards):
    """Archives with right and wrong header checksums, and indexes: DataError is all that can come of them."""
    draw = random.Random(0)
    archive, index = shards / "train" / "000000.tar", shards / "train" / "shards.json"
    whole, written = archive.read_bytes(), index.read_bytes()
    messages = []
    for number in range(80):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            field = draw.choice([0, 100, 124, 130, 148, 156, 257, 345])  # of the header, where it is one
            content[draw.randrange(len(content) // 512) * 512 + field] = draw.choice(b"\0\x80\xff07xgLS")
        for start in range(0, len(content), 512) if number % 2 else ():
            if content[start + 257 : start + 262] == b"ustar":
                content[start + 148 : start + 156] = b" " * 8
                content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
        archive.write_bytes(content)
        try:
            index_tar(archive)
        except DataError as error:
            messages.append(str(error))
    archive.write_bytes(whole)
    for _ in range(80):
        content = bytearray(written)
        place = draw.randrange(len(content))
        content[place : place + 1] = draw.choice(
            [b"-", b"9", b"null", b".5", b"[", b'"', b"1e9", b"NaN", b"\xff"]
        )
        index.write_bytes(content)
        try:
            images = images_in(shards / "train")
            images.load(draw.randrange(len(images)))
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all(message.isprintable() for message in messages)


# ---- what cannot be written


def test_a_taken_place_is_refused_and_left_alone(image_folder, written, tmp_path):
    before = sorted(written.rglob("*"))
    refused(lambda: write_shards(image_folder, written), "exists already", error=ConfigError)
    refused(lambda: index_shards(written), "shards.json exists", error=ConfigError)
    refused(lambda: write_shards(written, tmp_path / "again"), "holds shards already", error=ConfigError)
    assert sorted(written.rglob("*")) == before
    (tmp_path / "new.part").mkdir()
    refused(lambda: write_shards(image_folder, tmp_path / "new"), "new.part is what", error=ConfigError)


def test_nothing_is_left_where_an_image_cannot_be_copied(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "in" / split / "a").mkdir(parents=True)
        (tmp_path / "in" / split / "a" / "1.png").write_bytes(png())
    (tmp_path / "in" / "val" / "a" / "2.png").symlink_to("nowhere.png")
    refused(lambda: write_shards(tmp_path / "in", tmp_path / "out", tell=quiet), "val/a/2.png cannot be read")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["shard", "nowhere", "out"], 3, "no folder nowhere"),
        (["shard", ".", "out"], 3, "has no train/ inside"),
        (["shard", "nowhere", "out", "--size", "big"], 2, "--size 'big' is no size of a shard"),
        (["shard", "nowhere", "out", "--size", "0MB"], 2, "--size '0MB' is no size"),
        (["index", "nowhere"], 3, "nowhere holds no .tar files"),
        (["check", "nowhere"], 3, "nowhere holds no train/shards.json"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, monkeypatch, capsys, arguments, status, words):
    monkeypatch.chdir(tmp_path)
    assert main(["data", *arguments]) == status
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and words in printed.err
    assert list(tmp_path.iterdir()) == []


def test_the_commands_as_typed(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "shard", str(image_folder), "out", "--size", "10kB"]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1] == "out; train from it with: data.name=folder data.root=out"
    )
    for file in (tmp_path / "out").rglob("shards.json"):
        file.unlink()
    assert main(["data", "index", "out"]) == 0
    assert images_in(tmp_path / "out" / "train").classes == ["dark", "light"]
    assert main(["data", "check", "out"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("shards are right")
    assert recipe("classification/folder", ["data.root=out"]).data.root == "out"
