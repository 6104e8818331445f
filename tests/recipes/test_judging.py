"""What tells real images from others: distances between sets of them, and the nearest one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.recipes.data import digits
from zoo.recipes.judging import Judge, distances, nearest


def test_distances_are_small_between_real_halves_and_large_to_noise():
    judge = Judge("nat_digits")
    images = [Image.fromarray(image) for image in digits.held_out()[0][:120]]
    noise = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    real, other, far = (
        judge.features(each) for each in (images[:60], images[60:], list(map(Image.fromarray, noise)))
    )
    state = torch.random.get_rng_state()
    near, wide = distances(real, other), distances(real, far)
    assert near["fid"] < wide["fid"] and near["kid"] < wide["kid"]
    assert distances(real, real)["fid"] == pytest.approx(0, abs=1e-3)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_copy_is_found():
    known = np.random.default_rng(0).integers(0, 256, (300, 4, 4, 1), dtype=np.uint8)
    distance, which = nearest(known[[7, 250]], known)
    assert distance.tolist() == [0, 0] and which.tolist() == [7, 250]
    black, white = np.zeros((1, 4, 4, 1), np.uint8), np.full((1, 4, 4, 1), 255, np.uint8)
    assert nearest(black, white)[0][0] == 4  # the root of 16 pixels
