"""Batches follow from seed, epoch and position alone."""

from __future__ import annotations

import multiprocessing
import random
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.errors import DataError, ResourceError
from zoo.recipes.data.loader import BadImages, EpochBatches, EpochLoader, reseed
from zoo.recipes.data.transforms import ImageOnly, InputSettings, eval_transform, train_transform
from zoo.recipes.schema import Augment

SETTINGS = InputSettings(
    size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0
)
EVERYTHING = Augment(rotate=20, shift=0.1, vflip=0.5, random_erasing=0.5, auto_augment="rand-m9-mstd0.5-inc1")
TRAIN, EVAL = ImageOnly(train_transform(SETTINGS, EVERYTHING)), ImageOnly(eval_transform(SETTINGS))


class Numbered:
    """Images that can be told apart; those in `bad` cannot be read."""

    classes = ["even", "odd"]

    def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
        self.count, self.bad, self.notes = count, bad, []

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> Image.Image:
        if index in self.bad:
            raise DataError(f"/root/{index}.png cannot be read as an image: damaged")
        pixels = np.random.default_rng(index).integers(0, 255, (20, 20, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    def target(self, index: int) -> int:
        return index % 2

    def describe(self, index: int) -> str:
        return f"/root/{index}.png"

    def short(self, index: int) -> str:
        return f"{index}.png"


def batches(
    position: tuple[int, int] = (0, 0), *, workers: int = 0, **keywords: object
) -> list[torch.Tensor]:
    loader = EpochLoader(Numbered(21), TRAIN, batch_size=4, seed=3, workers=workers, train=True)
    loader.position = position
    try:
        return [images for images, _ in loader]
    finally:
        loader.close()


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def test_the_same_epoch_gives_the_same_batches_whatever_came_before():
    first = batches((1, 0))
    random.random(), np.random.rand(), torch.rand(9)
    assert same(first, batches((1, 0)))
    assert not same(first, batches((2, 0)))


def test_a_later_position_gives_the_rest_of_the_same_epoch():
    assert same(batches((1, 0))[3:], batches((1, 3)))


def test_workers_change_nothing():
    assert same(batches((1, 1)), batches((1, 1), workers=2))


def test_workers_that_stay_follow_the_position():
    loader = EpochLoader(Numbered(21), TRAIN, batch_size=4, seed=3, workers=1, train=True)
    try:
        for position in ((0, 0), (1, 0), (1, 3)):
            loader.position = position
            assert same([images for images, _ in loader], batches(position))
    finally:
        loader.close()


@pytest.mark.parametrize("numbers", [(0,), (1, "step", 2), (2**31, "item", 5, 6)])
def test_reseeding_sets_all_three_generators(numbers):
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    reseed(*numbers)
    first = draw()
    reseed(*numbers)
    assert draw() == first
    reseed(*numbers, 0)
    assert not set(draw()) & set(first)


def shares(length: int, world: int, *, shuffle: bool) -> list[list[list[int]]]:
    ranks = []
    for rank in range(world):
        plan = EpochBatches(length, 4, 0, shuffle=shuffle)
        plan.rank, plan.world = rank, world
        ranks.append([[index for _, index in keys] for keys in plan])
    return ranks


@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_gives_every_process_as_many_whole_batches_and_no_image_twice(world):
    ranks = shares(50, world, shuffle=True)
    assert {len(batches) for batches in ranks} == {50 // (4 * world)}
    assert {len(batch) for batches in ranks for batch in batches} == {4}
    assert max(Counter(i for batches in ranks for batch in batches for i in batch).values()) == 1


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 5, 24, 50])
def test_processes_take_turns_with_the_batches_of_a_validation(length, world):
    (alone,), ranks = shares(length, 1, shuffle=False), shares(length, world, shuffle=False)
    in_turns = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert in_turns == alone + [[]] * (len(in_turns) - len(alone))
    assert [i for batch in alone for i in batch] == list(range(length))


def test_one_step_of_several_processes_is_one_large_step_of_one():
    """So a checkpoint between epochs can go on with another number of processes."""
    alone = EpochBatches(50, 8, 0, shuffle=True)
    pair = shares(50, 2, shuffle=True)
    for step, keys in enumerate(alone):
        assert [index for _, index in keys] == pair[0][step] + pair[1][step]


def test_a_set_smaller_than_a_batch_is_one_batch():
    assert shares(3, 1, shuffle=True)[0] == [
        sorted(range(3), key=EpochBatches(3, 4, 0, shuffle=True).order(0).tolist().index)
    ]


# ---- images that cannot be read


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_with_its_path(workers):
    loader = EpochLoader(Numbered(8, bad=(5,)), EVAL, batch_size=4, workers=workers)
    with pytest.raises(DataError, match=r"^/root/5.png cannot be read as an image: damaged$"):
        list(loader)
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_training_without_bad_images_keeps_its_batch_size_and_lists_them(workers, tmp_path, capsys):
    skip = BadImages(0.5, tmp_path / "bad_files.txt")
    loader = EpochLoader(
        Numbered(8, bad=(5, 6)),
        EVAL,
        batch_size=4,
        workers=workers,
        train=True,
        on_bad=skip,
    )
    for epoch in range(2):
        loader.position = (epoch, 0)
        assert [len(images) for images, _ in loader] == [4, 4]
    loader.close()
    assert sorted((tmp_path / "bad_files.txt").read_text().splitlines()) == [
        "5.png cannot be read as an image: damaged",
        "6.png cannot be read as an image: damaged",
    ]
    assert "skipped: 5.png" in capsys.readouterr().err


def test_validation_leaves_bad_images_out():
    loader = EpochLoader(Numbered(8, bad=(5,)), EVAL, batch_size=4, on_bad=BadImages(0.5))
    assert [len(images) for images, _ in loader] == [4, 3]


def test_too_many_bad_images_stop_the_run():
    bad = tuple(range(7))
    loader = EpochLoader(Numbered(100, bad=bad), EVAL, batch_size=50, on_bad=BadImages(0.01))
    with pytest.raises(DataError, match="6 of 100 images cannot be read, more than data.max_bad=0.01"):
        list(loader)


@pytest.mark.parametrize("bad", [(0,), (2, 3), (4,), (0, 2, 4)])
def test_nothing_stands_for_a_batch_of_a_validation_without_a_good_image(bad):
    loader = EpochLoader(Numbered(5, bad=bad), EVAL, batch_size=1, on_bad=BadImages(1.0))
    seen = [None if images is None else targets.tolist() for images, targets in loader]
    assert seen == [None if i in bad else [i % 2] for i in range(5)]
    assert loader.bad == len(bad)


@pytest.mark.parametrize("workers", [0, 2])
def test_each_of_several_processes_validates_as_many_batches_some_of_them_empty(workers):
    seen = []
    for rank in range(2):
        loader = EpochLoader(
            Numbered(5, bad=(1, 2)), EVAL, batch_size=1, workers=workers, on_bad=BadImages(1.0)
        )
        loader.share(rank, 2)
        seen.append([None if images is None else targets.tolist() for images, targets in loader])
        assert len(seen[-1]) == len(loader)
        loader.close()
    assert seen == [[[0], None, [0]], [None, [1], None]]


@pytest.mark.parametrize(("train", "words"), [(True, "of a whole batch"), (False, "to validate")])
def test_nothing_but_bad_images_is_an_error(train, words):
    images = Numbered(2, bad=(0, 1))
    loader = EpochLoader(images, EVAL, batch_size=1 + train, train=train, on_bad=BadImages(1.0))
    with pytest.raises(DataError, match=f"no image {words} can be read; the last: /root/[01].png cannot"):
        list(loader)


def test_a_killed_worker_says_what_to_change():
    class Deadly(Numbered):
        def load(self, index: int) -> Image.Image:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

    loader = EpochLoader(Deadly(8), EVAL, batch_size=4, workers=1)
    with pytest.raises(ResourceError, match="data.workers=0"):
        list(loader)
    loader.close()


def test_a_hung_worker_is_waited_for_no_longer_than_the_limit_and_ended(monkeypatch):
    class Hung(Numbered):
        def load(self, index: int) -> Image.Image:
            threading.Event().wait()
            raise AssertionError

    monkeypatch.setattr("zoo.recipes.data.loader.WORKER_TIMEOUT", 1)
    hung = EpochLoader(Hung(8), EVAL, batch_size=4, workers=1)
    with pytest.raises(ResourceError, match="timed out after 1 seconds.*data.workers=0"):
        list(hung)
    hung.close()
    assert not [child for child in multiprocessing.active_children() if child.is_alive()]


# ---- transforms


@pytest.mark.parametrize("size", [(20, 20), (40, 18), (1, 1)])
def test_transforms_give_the_size_the_network_wants(size):
    image = Image.new("RGB", size, "white")
    for transform in (
        eval_transform(SETTINGS),
        train_transform(SETTINGS, Augment()),
        train_transform(SETTINGS, EVERYTHING),
    ):
        assert transform(image).shape == (3, 16, 16)


def test_without_a_crop_the_whole_image_is_seen():
    whole = Augment(crop_scale=None, hflip=0.0)
    image = Numbered(1).load(0)
    assert torch.equal(train_transform(SETTINGS, whole)(image), eval_transform(SETTINGS)(image))


def test_settings_survive_being_saved():
    assert InputSettings.from_plain(SETTINGS.plain()) == SETTINGS
