"""Every backbone of the zoo trains in the segmentation recipe, at two sizes."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch

import zoo
from zoo.heads.inference import only_size
from zoo.recipes.config import recipe
from zoo.recipes.data.loader import reseed
from zoo.recipes.tasks import task_of
from zoo.recipes.training import Training
from zoo.registry import _find

CLASSES = 11
SIZES = [(64, 64), (64, 80)]
DIGITS = zoo.list_models("*_digits", task="classification")  # one of each kind of attention
LARGE = ("davit_large*", "davit_huge*", "davit_giant", "dinat_large*", "dinat_s_large*")


def marked(name: str) -> object:
    """A published row is for the slow tests, and for one at a time where it is large."""
    large = any(fnmatchcase(name, pattern) for pattern in LARGE)
    return pytest.param(name, marks=[pytest.mark.slow, *([pytest.mark.large] if large else [])])


def shortened(name: str) -> dict[str, Any]:
    """Arguments that leave two blocks of each stage, one of each kind, and every width as it is published."""
    row = _find(name).config
    if hasattr(row, "stages"):
        return {"stages": [letters[0] + letters[1:][-1:] for letters in row.stages]}
    if hasattr(row, "depth"):  # one resolution: the decoder looks behind four blocks
        arguments = {"depth": 4}
        if hasattr(row, "agent_depth"):
            arguments["agent_depth"] = min(row.agent_depth, 2)
    else:
        arguments = {"depths": [min(2, depth) for depth in row.depths]}
    dilations = getattr(row, "dilations", None)
    if isinstance(dilations, tuple):
        cut = [each[:2] for each in dilations] if "depths" in arguments else dilations[:4]
        arguments["dilations"] = [list(each) if isinstance(each, tuple) else each for each in cut]
    return arguments


def built(name: str, arguments: dict[str, Any]) -> Training:
    """The network of a recipe with narrow decoders, ready to train."""
    overrides = [f"model.name={name}", "model.pretrained=false", f"model.args={arguments}", "optim.ema=null"]
    overrides += ["head.name=upernet", "head.channels=8", "head.auxiliary=8"]
    made = recipe("segmentation/digit_scenes", overrides, names=False)
    task = task_of(made)
    reseed(0)
    model = task.build_model(made, CLASSES).train()
    return Training(model, made, [None], task.objective(made, [str(i) for i in range(CLASSES)]))


def train_a_step(module: Training, size: tuple[int, int]) -> None:
    """Every weight gets a gradient."""
    model = module.model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    targets = torch.randint(-1, CLASSES, (2, *size))
    loss = module.objective.loss(model, (torch.randn(2, 3, *size), targets))
    loss.backward()
    assert loss.isfinite()  # at the second size this holds for what the first step left
    still = [name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()]
    assert not still, still
    optimizer.step()


@pytest.mark.parametrize("name", DIGITS)
def test_a_step_is_trained_at_two_sizes(name):
    module = built(name, {})
    for size in SIZES:
        module.zero_grad(set_to_none=True)
        train_a_step(module, size)


@pytest.mark.parametrize("name", [marked(name) for name in zoo.list_models(task="classification")])
def test_a_step_of_every_row_is_trained_at_two_sizes(name):
    arguments = shortened(name)
    with torch.device("meta"):
        square = only_size(zoo.create_model(name, num_classes=0, **arguments))
    if square:  # it takes squares of one size only, and is built anew for another
        for side in (64, 80):
            train_a_step(built(name, {**arguments, "input_size": side}), (side, side))
        return
    module = built(name, arguments)
    for size in SIZES:
        module.zero_grad(set_to_none=True)
        train_a_step(module, size)
