"""Write held-out handwritten digits as PNG files, named by their label, to try `zoo predict` on."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from zoo.recipes.data.digits import held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=10, help="how many images, the labels in turn")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    images, labels = held_out()
    by_label = [[i for i, label in enumerate(labels) if label == digit] for digit in range(10)]
    for n in range(arguments.count):
        index = by_label[n % 10][n // 10]
        picture = Image.fromarray(images[index]).resize((64, 64), Image.Resampling.BICUBIC)
        picture.save(arguments.folder / f"{int(labels[index])}_{index:03d}.png")
    print(f"{arguments.count} images in {arguments.folder}")


if __name__ == "__main__":
    main()
