"""Segmentation in windows: of the size a model takes, and such that every pixel is seen."""

from __future__ import annotations

import pytest
import timm
import torch

import zoo
from zoo.errors import ConfigError
from zoo.heads import Segmenter, segment
from zoo.heads.inference import only_size


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64}, 64),
        ("vit_tiny_patch16_224", {}, 224),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}, None),
        ("swin_tiny_patch4_window7_224", {"img_size": 64}, 64),
        ("resnet18", {}, None),
    ],
)
def test_the_size_of_a_model_is_the_one_it_was_built_for(name, arguments, size):
    with torch.device("meta"):
        assert only_size(timm.create_model(name, **arguments)) == size


def test_a_model_built_for_another_size_sees_windows_of_it():
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4)
    model = Segmenter(backbone, 3, channels=8).eval()
    with torch.no_grad():
        found = segment(model, [torch.randn(1, 3, 70, 90)], (70, 90))
    assert found.shape == (1, 3, 70, 90) and found.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 16, "stride": 20}, "stride must be at most the window of 16 pixels, found 20"),
        ({"window": 16, "stride": 0}, "stride must be a whole number from 1, found 0"),
        ({"window": 0}, "window must be a whole number from 1, found 0"),
    ],
)
def test_windows_that_leave_pixels_out_are_refused(arguments, message):
    model = Segmenter(zoo.create_model("nat_digits", num_classes=0), 3, channels=8).eval()
    with pytest.raises(ConfigError, match=message):
        segment(model, [torch.randn(1, 3, 40, 40)], (40, 40), **arguments)
