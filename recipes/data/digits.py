"""The 1,797 real handwritten digits of scikit-learn (8x8, ten classes); a third of each class is held out."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

from zoo.errors import ResourceError

CLASSES = [str(digit) for digit in range(10)]


def training() -> tuple[np.ndarray, np.ndarray]:
    """Return the 1,198 training digits: images uint8 [N, 8, 8], labels int64 [N]."""
    return _split()[0]


def held_out() -> tuple[np.ndarray, np.ndarray]:
    """Return the 599 digits that no recipe trains on: images uint8 [N, 8, 8], labels int64 [N]."""
    return _split()[1]


@cache
def _split() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ResourceError("the digits need scikit-learn: pip install 'attnzoo[recipes]'") from None
    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
    labels = data.target.astype(np.int64)
    # The legacy generator is frozen by NumPy: the split is the same for ever.
    order = np.random.RandomState(0).permutation(len(labels))
    held = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        mine = order[labels[order] == digit]
        held[mine[: round(len(mine) / 3)]] = True
    return (images[~held], labels[~held]), (images[held], labels[held])


class Digits:
    """One half of the digits, as images for a data loader."""

    classes = CLASSES

    def __init__(self, train: bool) -> None:
        self.images, labels = training() if train else held_out()
        self.labels = labels.tolist()
        self.train = train
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Image.Image:
        """Return one digit as RGB, 8x8."""
        return Image.fromarray(self.images[index]).convert("RGB")

    def target(self, index: int) -> int:
        """Return the class number of one image."""
        return self.labels[index]

    def describe(self, index: int) -> str:
        """Return which digit this is."""
        return f"{'training' if self.train else 'held-out'} digit {index}"

    short = describe
