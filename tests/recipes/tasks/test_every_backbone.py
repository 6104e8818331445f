"""Every kind of attention trains in the segmentation recipe, at two sizes."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.recipes.config import recipe
from zoo.recipes.data.loader import reseed
from zoo.recipes.tasks import task_of
from zoo.recipes.training import Training

NAMES = zoo.list_models("*_digits", task="classification")  # one of each kind of attention
SIZES = [(32, 32), (48, 80)]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_trained_at_two_sizes(name):
    overrides = [f"model.name={name}", "model.pretrained=false", "optim.ema=null", "head.auxiliary=8"]
    made = recipe("segmentation/digit_scenes", overrides)
    task = task_of(made)
    reseed(0)
    model = task.build_model(made, 11).train()
    objective = task.objective(made, [str(number) for number in range(11)])
    module = Training(model, made, [None], objective)
    optimizer = module._optimizer(model, 1e-3)
    for height, width in SIZES:
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        targets = torch.randint(-1, 11, (2, height, width))
        loss = objective.loss(model, (torch.randn(2, 3, height, width), targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
        still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
        assert not still, still
