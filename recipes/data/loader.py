"""Batches that depend on seed, epoch and position only: not on workers, not on where a run was stopped."""

from __future__ import annotations

import hashlib
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from zoo.errors import DataError, ResourceError
from zoo.recipes.data.transforms import JointTransform

WORKER_TIMEOUT = 1800  # seconds without a batch before a reader counts as hung


class Images(Protocol):
    """What a data set offers: upright RGB images, what is wanted for each (a class number), and its name."""

    classes: list[str]
    notes: list[str]  # what the user should know before training, one sentence each

    def __len__(self) -> int: ...
    def load(self, index: int) -> Image.Image: ...
    def target(self, index: int) -> Any: ...
    def describe(self, index: int) -> str: ...
    def short(self, index: int) -> str: ...


def reseed(*numbers: int | str) -> None:
    """Set the random state of Python, NumPy and torch to what follows from these numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # torch.manual_seed asks every backend each time, which costs 0.2 ms
        torch.cuda.manual_seed_all(seed)


@dataclass(frozen=True)
class BadImage:
    """An image that could not be read; it travels in its batch, because an exception would lose its text."""

    index: int
    reason: str


class Samples(Dataset):
    """Image and target for a key (epoch, index), the randomness of the transform seeded by both."""

    def __init__(self, images: Images, transform: JointTransform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Any] | BadImage:
        epoch, index = key
        try:
            image, target = self.images.load(index), self.images.target(index)
        except DataError as error:
            return BadImage(index, str(error))
        reseed(self.seed, "item", epoch, index)
        return self.transform(image, target)


class EpochBatches(Sampler):
    """Keys (epoch, index) of one process's batches, from `epoch` and `batch` on, which anyone may set."""

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        *,
        shuffle: bool,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        self.epoch = self.batch = self.rank = 0
        self.world = 1

    def order(self, epoch: int) -> torch.Tensor:
        """Return the order of all images in an epoch, the same in every process."""
        if not self.shuffle:
            return torch.arange(self.length)
        generator = torch.Generator().manual_seed((self.seed << 32) + epoch)
        if self.weights is not None:  # as many as there are, some several times
            return torch.multinomial(self.weights, self.length, replacement=True, generator=generator)
        return torch.randperm(self.length, generator=generator)

    def indices(self, epoch: int, batch: int, order: torch.Tensor | None = None) -> list[int]:
        """Return which images a batch of this process holds."""
        order = self.order(epoch) if order is None else order
        start = (batch * self.world + self.rank) * self.batch_size
        return order[start : start + self.batch_size].tolist()

    def __len__(self) -> int:
        step = self.batch_size * self.world
        if not self.shuffle:
            return -(-self.length // step)
        # Training drops an incomplete last step, unless it is the only one.
        return max(1, self.length // step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self.order(self.epoch)
        for batch in range(self.batch, len(self)):
            # The last step of a validation may have no image left for this process.
            yield [(self.epoch, index) for index in self.indices(self.epoch, batch, order)]


@dataclass(frozen=True)
class Collate:
    """Stack the good samples of a batch and hand the bad ones on; `fill` repeats good ones in their place."""

    fill: bool

    def __call__(self, samples: list[Any]) -> tuple[Any, list[BadImage]]:
        good = [sample for sample in samples if not isinstance(sample, BadImage)]
        bad = [sample for sample in samples if isinstance(sample, BadImage)]
        if self.fill and good:
            good += [good[i % len(good)] for i in range(len(bad))]
        try:
            return (default_collate(good) if good else None), bad
        except RuntimeError:  # raised here it would lose its text on the way from another process
            return DataError("the images of a batch have different sizes; use data.val_batch_size=1"), bad


def _ignore_signals(_worker: int) -> None:
    # The main process decides when to stop; a reader that died first would look like a crash.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class EpochLoader:
    """Iterates over the rest of an epoch from `position`, always the same batches for the same position.

    Yields what the transform made of images and of targets, stacked. A bad image raises DataError, or goes to
    `on_bad` and is left out, and counted in `bad`. In validation a pair of None stands for a batch without a
    good image, if there is a better one, and for one that only other processes have: all take as many steps.
    It is no torch DataLoader, so Lightning leaves its order alone.
    """

    def __init__(
        self,
        images: Images,
        transform: JointTransform,
        *,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        train: bool = False,
        weights: Sequence[float] | None = None,
        on_bad: Callable[[Images, BadImage], None] | None = None,
    ) -> None:
        self.images = images
        self.batches = EpochBatches(len(images), batch_size, seed, shuffle=train, weights=weights)
        self.on_bad = on_bad
        self.bad = 0  # images in this pass over the data that could not be read
        self._loader = DataLoader(
            Samples(images, transform, seed),
            batch_sampler=self.batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=Collate(fill=train),
            worker_init_fn=_ignore_signals,
            timeout=WORKER_TIMEOUT if workers else 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its draws are not used, and must not come from the global state
        )

    @property
    def position(self) -> tuple[int, int]:
        """Epoch and batch at which the next iteration begins."""
        return self.batches.epoch, self.batches.batch

    @position.setter
    def position(self, epoch_and_batch: tuple[int, int]) -> None:
        self.batches.epoch, self.batches.batch = epoch_and_batch

    def share(self, rank: int, world: int) -> None:
        """Make this process number `rank` of `world` that divide each step among them."""
        self.batches.rank, self.batches.world = rank, world

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        iterator = iter(self._loader)
        left_out, any_good, self.bad = "", False, 0
        while True:
            try:
                batch, bad = next(iterator)
            except StopIteration:
                if left_out and not any_good and self.batches.world == 1:
                    raise DataError(f"no image to validate can be read; the last: {left_out}") from None
                return
            except RuntimeError as error:
                if "DataLoader" not in str(error):
                    raise
                reason = str(error).splitlines()[0]
                # PyTorch raises in whatever this process does when a worker that it watches is killed.
                if iterator._worker_pids_set:
                    torch._C._remove_worker_pids(id(iterator))
                    iterator._worker_pids_set = False
                # They ignore SIGTERM, so one that hangs would keep this process from ending too.
                for worker in iterator._workers:
                    worker.kill()
                raise ResourceError(
                    f"a data worker died or hung ({reason}); lower data.workers or data.batch_size, "
                    "or set data.workers=0"
                ) from None
            self.bad += len(bad)
            for each in bad:
                if self.on_bad is None:
                    raise DataError(each.reason)
                self.on_bad(self.images, each)
            if isinstance(batch, DataError):
                raise batch
            if batch is None:
                if self.batches.shuffle:  # a step of training cannot be left out: their number is fixed
                    raise DataError(f"no image of a whole batch can be read; the last: {bad[-1].reason}")
                left_out = bad[-1].reason if bad else left_out
                yield None, None
                continue
            any_good = True
            yield batch

    def close(self) -> None:
        """End the worker processes."""
        self._loader._iterator = None


def balanced(labels: Sequence[int], strength: float) -> list[float]:
    """Return how often to draw each image: 1 for all at strength 0, each class equally often at 1.

    Between them a class of n images is drawn as often as n^(1 - strength) says.
    """
    counts = Counter(labels)
    return [counts[label] ** -strength for label in labels]


class BadImages:
    """Counts the images that cannot be read, lists them in a file, and stops where they are too many.

    Raises DataError above `share` of the images, and never for fewer than six.
    """

    def __init__(self, share: float, file: Path | None = None) -> None:
        self.share, self.file = share, file
        self.found: set[str] = set()

    def __call__(self, images: Images, bad: BadImage) -> None:
        name = images.short(bad.index)
        if name in self.found:
            return
        self.found.add(name)
        reason = bad.reason.replace(images.describe(bad.index), name)
        if self._is_news(reason):
            # In one piece: other processes write too.
            print(f"skipped: {reason}\n", end="", file=sys.stderr, flush=True)
        if len(self.found) > self.allowed(images):
            raise DataError(
                f"{len(self.found)} of {len(images):,} images cannot be read, more than "
                f"data.max_bad={self.share:g}; the last: {bad.reason}"
            )

    def allowed(self, images: Images) -> float:
        """How many of the images may be bad."""
        return max(5, self.share * len(images))

    def _is_news(self, reason: str) -> bool:
        """List a reason, unless another process did, or this run before it was stopped."""
        if self.file is None:
            return True
        with self.file.open("a+", encoding="utf-8", errors="backslashreplace") as file:
            file.seek(0)
            known = f"{reason}\n" in file
            if not known:
                file.write(f"{reason}\n")
        return not known
