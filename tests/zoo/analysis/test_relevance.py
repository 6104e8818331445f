"""How well relevance finds the digit in the shipped models: what `guided` is, and the table of the README."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

import zoo
from zoo import analysis

ROOT = Path(__file__).resolve().parents[3]
README = ROOT / "zoo" / "analysis" / "README.md"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("relevance_script", ROOT / "scripts" / "relevance.py")
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


def test_guided_relevance_is_relevance_times_the_class_activation_map():
    """Behind a mean and a linear classifier Grad-CAM is the classifier applied to every token."""
    model = zoo.create_model("nat_digits", pretrained=True).eval()
    images = torch.randn(2, 3, 48, 64)
    classes = torch.tensor([3, 8])
    with torch.no_grad():
        last = model.forward_features(images)  # [B, Y, X, C]
        weights = model.get_classifier().weight[classes]
        cam = torch.einsum("byxc,bc->byx", last, weights).clamp(min=0) / last[0, ..., 0].numel()
    plain = analysis.gradient_relevance(model, images, target=classes)
    wanted = plain * F.interpolate(cam[:, None], size=plain.shape[1:], mode="bilinear")[:, 0]
    found = analysis.gradient_relevance(model, images, target=classes, guided=True)
    assert found.max() > 0
    torch.testing.assert_close(found, wanted)


def test_a_class_token_needs_no_guide():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    with pytest.raises(zoo.ConfigError, match="VisionTransformer has none: leave guided out"):
        analysis.gradient_relevance(model, torch.randn(1, 3, 32, 32), guided=True)


def test_a_mosaic_holds_the_digit_that_is_asked_for_in_one_quarter(script):
    scenes = script.mosaics(script.load_trained("nat_digits").settings, 120)
    assert scenes.images.shape == (5, 3, 64, 64)
    assert (scenes.quarter.float().mean((1, 2)) == 0.25).all()
    assert scenes.ink.any() and not (scenes.ink & ~scenes.quarter).any()


def test_guided_relevance_lies_on_the_digit_that_is_asked_for(script):
    """Twice its share of the area and more, where the plain map is held to more than chance."""
    found = script.measure("nat", 25)
    assert found["guided, ink"] > 2 and found["guided, quarter"] > 2 and found["plain, ink"] > 1.2


@pytest.mark.slow
def test_the_table_is_what_the_models_do(script):
    """And in every family at least twice as much lies on the digit's ink as its area says."""
    rows = re.findall(r"^\| `(\w+)_digits` \| (.+) \|$", README.read_text(), re.MULTILINE)
    assert [family for family, _ in rows] == list(script.FAMILIES)
    for family, text in rows:
        found = script.measure(family)
        assert list(found.values()) == pytest.approx([float(cell) for cell in text.split(" | ")], abs=0.03), (
            family
        )
        assert found["guided, ink"] >= 2 and found["guided, quarter"] >= 2, family
