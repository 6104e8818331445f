"""Noising: what is predicted, its weights and its times are what the formulas and diffusers say."""

from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from zoo.diffusion.sampling import make_scheduler
from zoo.recipes.noising import Noising
from zoo.recipes.schema import Diffusion

OBJECTIVES = ("rectified_flow", "ddpm_epsilon", "ddpm_v")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_predicted_leads_back_to_the_image(objective):
    noising = Noising(Diffusion(objective=objective))
    x, noise = torch.randn(2, 64, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    t = noising.even(64).double()
    noisy, target = noising.noised(x, noise, t), noising.target(x, noise, t)
    image, level = (each[:, None, None, None] for each in noising.levels(t))
    found = {
        "rectified_flow": noisy - level * target,
        "ddpm_epsilon": (noisy - level * target) / image,
        "ddpm_v": image * noisy - level * target,
    }[objective]
    torch.testing.assert_close(found, x)
    assert noising.levels(t)[1].diff().min() > 0, "noise grows with t"


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddpm_is_that_of_diffusers(schedule):
    noising = Noising(Diffusion(objective="ddpm_v", noise_schedule=schedule))
    theirs = make_scheduler("ddpm", "ddpm_v", noise_schedule=schedule)
    x, noise = torch.randn(2, 32, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t = noising.even(32)
    steps = noising.model_time(t).long()
    torch.testing.assert_close(noising.noised(x, noise, t), theirs.add_noise(x, noise, steps))
    torch.testing.assert_close(noising.target(x, noise, t), theirs.get_velocity(x, noise, steps))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_min_snr_weighs_the_error_of_the_image(objective):
    """The same error of the image counts min(SNR, gamma) whatever is predicted."""
    noising = Noising(Diffusion(objective=objective, min_snr=5.0))
    x, noise = torch.randn(2, 50, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    t = noising.even(50).double()
    image, level = noising.levels(t)
    # The prediction of someone who takes the image for y, from the same noisy image.
    y = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    spread = lambda v: v[:, None, None, None]  # noqa: E731
    other = (noising.noised(x, noise, t) - spread(image) * y) / spread(level)
    error = (noising.target(x, noise, t) - noising.target(y, other, t)).square().mean((1, 2, 3))
    expected = (image / level).square().clamp(max=5) * (x - y).square().mean((1, 2, 3))
    torch.testing.assert_close(noising.weight(t) * error, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"times": "uniform"},
        {"times": "logit_normal", "times_mean": 0.3},
        {"times": "mode", "mode_scale": 0.8},
    ],
)
def test_times_are_those_of_diffusers(settings):
    """diffusers weighs indices of a list that begins with noise: u there is 1 - t for logit-normal times."""
    torch.manual_seed(0)
    ours = Noising(Diffusion(**settings)).times(1000)
    torch.manual_seed(0)
    scheme = "none" if settings["times"] == "uniform" else settings["times"]
    theirs = compute_density_for_timestep_sampling(
        scheme, 1000, settings.get("times_mean", 0.0), 1.0, settings.get("mode_scale", 1.29)
    )
    torch.testing.assert_close(ours, theirs.clamp(1e-5, 1 - 1e-5))


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        ({"times": "uniform"}, 0.48, 0.52),
        ({"times": "csas"}, 0.55, 0.65),
        ({"times": "logit_normal", "times_mean": -1.0}, 0.25, 0.35),
        ({"times": "uniform", "shift": 3.0}, 0.6, 0.75),
    ],
)
def test_one_is_noise_for_every_kind_of_times(settings, low, high):
    torch.manual_seed(0)
    times = Noising(Diffusion(**settings)).times(4000)
    assert times.min() > 0 and times.max() < 1
    assert low < times.mean() < high
