"""Pictures with a prompt each: two real digits and where they lie, as in "a seven left of a three"."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

from zoo.recipes.data import digits

NAMES = ("digit_pairs",)
SIDE = 32  # pixels
DIGIT = 16  # the side of a digit
SHIFT = 3  # pixels that a digit may lie off its place, along the axis that the prompt does not speak of
TRAINING_PAIRS, HELD_OUT_PAIRS = 6400, 400
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# relation: the upper left corners of the first and of the second digit
PLACES = {
    "left of": ((8, 0), (8, 16)),
    "right of": ((8, 16), (8, 0)),
    "above": ((0, 8), (16, 8)),
    "below": ((16, 8), (0, 8)),
}
WORDS = ["a", "left", "right", "of", "above", "below", *NUMBERS]


class DigitPairs:
    """One half of the pairs. A pair follows from its number alone, so it is the same for ever.

    `classes` are the words of the prompts.
    """

    classes = WORDS

    def __init__(self, train: bool) -> None:
        self.train = train
        self.notes: list[str] = []

    def __len__(self) -> int:
        return TRAINING_PAIRS if self.train else HELD_OUT_PAIRS

    def load(self, index: int) -> Image.Image:
        """Return one pair as RGB, 32x32."""
        return Image.fromarray(compose(index, train=self.train)[0]).convert("RGB")

    def target(self, index: int) -> str:
        """Return what one pair shows."""
        return compose(index, train=self.train)[1]

    def describe(self, index: int) -> str:
        """Return which pair this is."""
        return f"{'training' if self.train else 'held-out'} pair {index}"

    short = describe


@cache  # 7 MB for all pairs
def compose(index: int, *, train: bool) -> tuple[np.ndarray, str]:
    """Return a picture, uint8 [32, 32], and its prompt."""
    # The legacy generator is frozen by NumPy: a pair is the same for ever.
    random = np.random.RandomState(2 * index + train)
    images, labels = digits.training() if train else digits.held_out()
    relation = list(PLACES)[random.randint(len(PLACES))]
    picture = np.zeros((SIDE, SIDE), dtype=np.uint8)
    names = []
    for top, left in PLACES[relation]:
        number = random.randint(len(labels))
        shift = random.randint(-SHIFT, SHIFT + 1)
        top, left = (top, left + shift) if top in (0, DIGIT) else (top + shift, left)
        small = Image.fromarray(images[number]).resize((DIGIT, DIGIT), Image.Resampling.BICUBIC)
        picture[top : top + DIGIT, left : left + DIGIT] = np.asarray(small)
        names.append(NUMBERS[labels[number]])
    return picture, f"a {names[0]} {relation} a {names[1]}"


def parts(picture: Image.Image, prompt: str) -> list[tuple[Image.Image, str]]:
    """Return the two halves of a pair's picture and which digit each should show.

    A half is what may hold its digit, made square.
    """
    first, _, second = prompt.removeprefix("a ").rpartition(" a ")
    first, _, relation = first.partition(" ")
    found = []
    for name, (top, left) in zip((first, second), PLACES[relation], strict=True):
        half = np.asarray(picture)[top : top + DIGIT] if top in (0, DIGIT) else np.asarray(picture)
        half = half if top in (0, DIGIT) else half[:, left : left + DIGIT]
        found.append((Image.fromarray(_around_the_ink(half)), str(NUMBERS.index(name))))
    return found


def _around_the_ink(half: np.ndarray) -> np.ndarray:
    """Cut the square with most ink out of a strip whose shorter side is the square's."""
    ink = half.mean(-1) if half.ndim == 3 else half
    axis = int(ink.shape[1] > ink.shape[0])
    profile = ink.sum(1 - axis, dtype=np.float64)
    starts = range(ink.shape[axis] - DIGIT + 1)
    best = max(starts, key=lambda start: profile[start : start + DIGIT].sum())
    return np.ascontiguousarray(half.take(range(best, best + DIGIT), axis=axis))
