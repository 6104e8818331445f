"""How well relevance finds the digit in the shipped models: the table of its README, recomputed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from zoo import analysis
from zoo.analysis.maps import on_image
from zoo.recipes.data.digits import Digits
from zoo.recipes.data.transforms import eval_transform
from zoo.recipes.run_folder import load_trained

README = Path(__file__).resolve().parents[3] / "zoo" / "analysis" / "README.md"


def concentration(family: str, step: int) -> tuple[float, float]:
    """Mean share of relevance on the ink over the ink's share of the image, and the most it could be."""
    digits = Digits(train=False)
    trained = load_trained(f"{family}_digits")
    prepare = eval_transform(trained.settings)
    images = torch.stack([prepare(digits.load(i)) for i in range(0, len(digits), step)])
    relevance = on_image(analysis.gradient_relevance(trained.model, images), tuple(images.shape[-2:]))
    ink = images.mean(1)
    low, high = ink.amin((1, 2), keepdim=True), ink.amax((1, 2), keepdim=True)
    ink = (ink - low) > 0.5 * (high - low)
    area = ink.float().mean((1, 2))
    share = (relevance * ink).sum((1, 2)) / relevance.sum((1, 2))
    return (share / area).mean().item(), (1 / area).mean().item()


@pytest.mark.slow
def test_the_table_is_what_the_models_do():
    rows = re.findall(r"^\| `(\w+)_digits` \| ([\d.]+) \| ([\d.]+) \|", README.read_text(), re.MULTILINE)
    assert [family for family, *_ in rows] == ["agent", "biformer", "dat", "davit", "nat"]
    for family, found, most in rows:
        assert concentration(family, 6) == pytest.approx((float(found), float(most)), abs=0.02), family
