"""Every registered model, without exception: at three image sizes, with gradients, and image by image."""

from __future__ import annotations

import pytest
import torch

import zoo

SIZES = [(224, 224), (256, 320), (97, 131)]
LARGE = {
    name
    for pattern in ("davit_large*", "davit_huge*", "davit_giant", "dinat_large*", "dinat_s_large*")
    for name in zoo.list_models(pattern)
}
MODELS = [
    pytest.param(name, marks=[pytest.mark.large] if name in LARGE else [])
    for name in zoo.list_models(task="classification")
]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", MODELS)
def test_it_runs_at_three_sizes_or_says_why_not(name):
    model = zoo.create_model(name).eval()
    channels = model.default_cfg["input_size"][0]
    ran = []
    for size in SIZES:
        try:
            out = model(torch.randn(1, channels, *size))
        except zoo.ConfigError as error:
            assert model.default_cfg["fixed_input_size"] and "images" in str(error), error
            continue
        assert out.isfinite().all()
        out.square().mean().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)
        model.zero_grad()
        ran.append(size)
    assert ran or model.default_cfg["input_size"][1:] != (224, 224)


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_is_its_images_one_by_one(name):
    model = zoo.create_model(name).eval()
    channels, height, width = model.default_cfg["input_size"]
    size = (height, width) if model.default_cfg["fixed_input_size"] or height < 97 else (97, 131)
    images = torch.randn(8, channels, *size)
    with torch.inference_mode():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5 * max(1.0, alone.abs().max().item()))
