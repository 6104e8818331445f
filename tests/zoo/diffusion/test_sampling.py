"""Sampling: every sampler finds the image that a model knows; guidance is heeded where it is asked for."""

from __future__ import annotations

import pytest
import torch

from zoo.diffusion.sampling import SAMPLERS, make_scheduler, sample
from zoo.errors import ConfigError
from zoo.recipes.noising import Noising
from zoo.recipes.schema import Diffusion

OBJECTIVES = ("rectified_flow", "ddpm_epsilon", "ddpm_v")


class Oracle(torch.nn.Module):
    """Predicts as if it knew the one image there is; with the condition 0 another one. Counts its samples."""

    def __init__(self, objective: str, images: torch.Tensor) -> None:
        super().__init__()
        self.noising, self.images, self.seen = Noising(Diffusion(objective=objective)), images, 0

    def forward(self, x, time, label, return_dict):
        self.seen += len(x)
        t = (time / 1000 if self.noising.is_flow else (time + 0.5) / 1000).double()
        image, level = (each[:, None, None, None] for each in self.noising.levels(t))
        clean = self.images[label].double()
        noise = (x.double() - image * clean) / level
        return (self.noising.target(clean, noise, t).to(x.dtype),)


ORACLE = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(3)) - 0.5
PAIRS = [
    (sampler, objective)
    for sampler, kinds in SAMPLERS.items()
    for objective in OBJECTIVES
    if kinds[0 if objective == "rectified_flow" else 1] is not None
]


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2
@pytest.mark.parametrize(("sampler", "objective"), PAIRS)
def test_every_sampler_finds_the_image_that_the_model_knows(sampler, objective):
    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.ones(3, dtype=torch.int64)
    found = sample(
        Oracle(objective, ORACLE), make_scheduler(sampler, objective), noise, (labels,), (0 * labels,),
        steps=20, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    torch.testing.assert_close(found, ORACLE[1].expand(3, -1, -1, -1), atol=0.03, rtol=0)


def test_guidance_goes_beyond_the_condition_inside_its_interval_only():
    noise = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    one, none = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)

    def found(guidance: float, interval: tuple[float, float]) -> tuple[torch.Tensor, int]:
        model = Oracle("rectified_flow", ORACLE)
        scheduler = make_scheduler("euler", "rectified_flow")
        x = sample(model, scheduler, noise, (one,), (none,), guidance=guidance, interval=interval, steps=10)
        return x[0], model.seen

    beyond = ORACLE[0] + 3 * (ORACLE[1] - ORACLE[0])
    x, seen = found(3.0, (0.0, 1.0))
    torch.testing.assert_close(x, beyond, atol=1e-4, rtol=0)
    assert seen == 20
    x, seen = found(3.0, (2.0, 3.0))
    torch.testing.assert_close(x, ORACLE[1], atol=1e-4, rtol=0)
    assert seen == 10
    assert found(3.0, (0.5, 1.0))[1] == 15 and found(1.0, (0.0, 1.0))[1] == 10


def test_wrong_samplers_are_one_line():
    with pytest.raises(ConfigError, match="ddim is not for rectified_flow; use euler, heun, dpm, unipc"):
        make_scheduler("ddim", "rectified_flow")
    with pytest.raises(ConfigError, match="unknown sampler 'dimm'; did you mean ddim"):
        make_scheduler("dimm", "ddpm_v")
