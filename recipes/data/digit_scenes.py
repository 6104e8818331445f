"""Scenes of two real digits on real textures, with exact masks; nothing is downloaded.

Digits of scikit-learn lie on crops of scikit-image's brick, grass and gravel. A third of the digits and a
strip of each texture are held out for the validation scenes.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

from zoo.errors import ResourceError
from zoo.recipes.data import digits

CLASSES = ["ground", *digits.CLASSES]
SIDE = 48  # pixels
DIGIT = (22, 30)  # the side of a digit, smallest and largest
INK = 0.3  # from which a pixel belongs to the digit
TRAINING_SCENES, HELD_OUT_SCENES = 3200, 400
HELD_OUT_ROWS = 128  # of 512, at the bottom of each texture


class DigitScenes:
    """One half of the scenes. A scene follows from its number alone, so it is the same for ever."""

    classes = CLASSES

    def __init__(self, train: bool) -> None:
        self.train = train
        self.notes: list[str] = []

    def __len__(self) -> int:
        return TRAINING_SCENES if self.train else HELD_OUT_SCENES

    def load(self, index: int) -> Image.Image:
        """Return one scene as RGB, 48x48."""
        return Image.fromarray(compose(index, train=self.train)[0]).convert("RGB")

    def target(self, index: int) -> np.ndarray:
        """Return the classes int16 [48, 48] of one scene: 0 is the ground, 1 the digit zero."""
        return compose(index, train=self.train)[1].copy()

    def describe(self, index: int) -> str:
        """Return which scene this is."""
        return f"{'training' if self.train else 'held-out'} scene {index}"

    short = describe


@cache  # image and mask are asked for one by one, and again in every epoch: 25 MB for all scenes
def compose(index: int, *, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return a scene, uint8 [48, 48], and its classes, int16 [48, 48]."""
    # The legacy generator is frozen by NumPy: a scene is the same for ever.
    random = np.random.RandomState(2 * index + train)
    images, labels = digits.training() if train else digits.held_out()
    ground = _textures()[random.randint(3)]
    rows = (0, len(ground) - HELD_OUT_ROWS) if train else (len(ground) - HELD_OUT_ROWS, len(ground))
    top = random.randint(rows[0], rows[1] - SIDE + 1)
    left = random.randint(ground.shape[1] - SIDE + 1)
    scene = ground[top : top + SIDE, left : left + SIDE] * random.uniform(0.35, 0.7)
    classes = np.zeros((SIDE, SIDE), dtype=np.int16)
    quadrants = random.permutation(4)[:2]
    while True:
        drawn = [_draw(quadrant, images, random) for quadrant in quadrants]
        # Drawn again until no ink lies on the other digit's: a mixture of two has no right class.
        if not (drawn[0][1] * drawn[1][1]).any():
            break
    for number, ink in drawn:
        scene += ink * (255 * random.uniform(0.85, 1.0) - scene)
        classes[ink > INK] = 1 + labels[number]
    return np.round(scene).clip(0, 255).astype(np.uint8), classes


def _draw(quadrant: int, images: np.ndarray, random: np.random.RandomState) -> tuple[int, np.ndarray]:
    """Return the number of one of the digits and its ink, 0 to 1 [48, 48], in one quarter of a scene."""
    number = random.randint(len(images))
    side = random.randint(DIGIT[0], DIGIT[1] + 1)
    y, x = (_place(half, side, random) for half in divmod(quadrant, 2))
    small = Image.fromarray(images[number]).resize((side, side), Image.Resampling.BICUBIC)
    ink = np.zeros((SIDE, SIDE))
    ink[y : y + side, x : x + side] = np.asarray(small, dtype=np.float64) / 255
    return number, ink


def _place(half: int, side: int, random: np.random.RandomState) -> int:
    """Return where a digit begins on an axis: near the lower or the upper border."""
    shift = random.randint(5)
    return SIDE - side - shift if half else shift


@cache
def _textures() -> tuple[np.ndarray, ...]:
    try:
        from skimage import data
    except ImportError:
        raise ResourceError("the scenes need scikit-image: pip install 'attnzoo[recipes]'") from None
    return tuple(make().astype(np.float64) for make in (data.brick, data.grass, data.gravel))
