"""Write into zoo/analysis/README.md how well relevance finds a digit, for every shipped family of backbones.

python scripts/relevance.py; a minute on one core. A model sees four held-out digits of four classes beside
each other, 64 x 64 pixels, and is asked for one of them: a grid pointing game (Boehle et al. 2021,
arXiv:2104.00032). What counts is how much of the relevance lies on that digit's ink, and in its quarter, over
the share of the area: 1 for a map that finds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zoo import analysis
from zoo.analysis.maps import on_image
from zoo.recipes.data.digits import Digits
from zoo.recipes.data.transforms import InputSettings, eval_transform
from zoo.recipes.run_folder import load_trained

README = Path(__file__).resolve().parent.parent / "zoo" / "analysis" / "README.md"
START, END = "<!-- relevance -->", "<!-- /relevance -->"
FAMILIES = ("agent", "biformer", "dat", "davit", "nat")


@dataclass(frozen=True)
class Mosaic:
    """Four digits beside each other and the one that is asked for."""

    images: Tensor  # [B, 3, 64, 64]
    classes: Tensor  # [B]
    ink: Tensor  # bool [B, 64, 64] of the digit that is asked for
    quarter: Tensor  # bool [B, 64, 64] that it stands in


def ink_of(images: Tensor) -> Tensor:
    """Pixels [B, Y, X] in the brighter half of each image's range."""
    grey = images.mean(1)
    low, high = grey.amin((1, 2), keepdim=True), grey.amax((1, 2), keepdim=True)
    return grey > (low + high) / 2


def mosaics(settings: InputSettings, step: int) -> Mosaic:
    """Every `step`th held-out digit among three of other classes; places and neighbours have a fixed seed."""
    digits, prepare, random = Digits(train=False), eval_transform(settings), np.random.RandomState(0)
    images, masks, quarters = [], [], []
    asked = range(0, len(digits), step)
    labels = np.asarray(digits.labels)
    for number in asked:
        others = random.permutation([c for c in range(10) if c != labels[number]])[:3]
        numbers = [random.choice(np.flatnonzero(labels == c)) for c in others]
        place = random.randint(4)
        numbers.insert(place, number)
        four = torch.stack([prepare(digits.load(n)) for n in numbers])  # [4, 3, 32, 32]
        chosen = torch.zeros(4, 1, *four.shape[2:], dtype=torch.bool)
        chosen[place] = True
        images.append(two_by_two(four))
        masks.append(two_by_two(ink_of(four)[:, None] & chosen)[0])
        quarters.append(two_by_two(chosen)[0])
    return Mosaic(
        torch.stack(images), torch.as_tensor(labels[list(asked)]), torch.stack(masks), torch.stack(quarters)
    )


def two_by_two(four: Tensor) -> Tensor:
    """Join [4, C, Y, X] to [C, 2 Y, 2 X]."""
    return torch.cat([torch.cat(tuple(four[:2]), -1), torch.cat(tuple(four[2:]), -1)], -2)


def concentration(relevance: Tensor, mask: Tensor) -> float:
    """Share of relevance [B, y, x] in a mask [B, Y, X] over the mask's share of the area, mean of images."""
    relevance = on_image(relevance, tuple(mask.shape[-2:]))
    share = (relevance * mask).sum((1, 2)) / relevance.sum((1, 2)).clamp_min(1e-30)
    return (share / mask.float().mean((1, 2))).mean().item()


def measure(family: str, step: int = 4) -> dict[str, float]:
    """All figures of one family, by column."""
    trained = load_trained(f"{family}_digits")
    model, scenes = trained.model, mosaics(trained.settings, step)
    with torch.no_grad():
        highest = model(scenes.images).topk(4).indices
    plain, guided = (
        analysis.gradient_relevance(model, scenes.images, target=scenes.classes, guided=guided)
        for guided in (False, True)
    )
    digits, prepare = Digits(train=False), eval_transform(trained.settings)
    alone = torch.stack([prepare(digits.load(number)) for number in range(0, len(digits), step)])
    return {
        "guided, ink": concentration(guided, scenes.ink),
        "guided, quarter": concentration(guided, scenes.quarter),
        "plain, ink": concentration(plain, scenes.ink),
        "plain, quarter": concentration(plain, scenes.quarter),
        "one digit alone, ink": concentration(
            analysis.gradient_relevance(model, alone, target=scenes.classes), ink_of(alone)
        ),
        "among the four highest": (highest == scenes.classes[:, None]).any(1).float().mean().item(),
    }


def table() -> str:
    """One row for each family."""
    found = {family: measure(family) for family in FAMILIES}
    columns = list(found["nat"])
    rows = [
        "| model | " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for family, figures in found.items():
        rows.append(
            f"| `{family}_digits` | " + " | ".join(f"{value:.2f}" for value in figures.values()) + " |"
        )
    return "\n".join(rows)


def main() -> None:
    torch.set_num_threads(1)
    made = table()
    before, _, rest = README.read_text().partition(START)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{START}\n{made}\n{END}{after}")
    print(made)


if __name__ == "__main__":
    main()
