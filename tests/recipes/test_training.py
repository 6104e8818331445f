"""The optimiser of a training: its rate at every step, and what each group of parameters gets of it."""

from __future__ import annotations

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from zoo.recipes.config import recipe
from zoo.recipes.run_folder import build_backbone
from zoo.recipes.schema import Optim
from zoo.recipes.tasks.classification import Classification
from zoo.recipes.training import Training, schedule


@pytest.mark.parametrize("kind", ["cosine", "linear", "poly", "constant"])
def test_the_learning_rate_is_a_function_of_the_step(kind):
    optim = Optim(schedule=kind, lr=1.0, epochs=10, warmup_epochs=2, warmup_lr=0.1, min_lr=0.01)

    def rates(order: list[int]) -> dict[int, float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=optim.lr)
        rule = schedule(optimizer, optim, steps_per_epoch=5)
        found = {}
        for step in order:
            rule.step_update(step)
            found[step] = optimizer.param_groups[0]["lr"]
        return found

    forward = rates(list(range(55)))
    assert forward == rates(list(reversed(range(55))))
    assert forward[0] == pytest.approx(0.1) and forward[5] == pytest.approx(0.55)
    assert forward[50] == pytest.approx(0.01)
    middle = {"cosine": 0.505, "linear": 0.505, "poly": 0.01 + 0.99 * 0.5**0.9, "constant": 1.0}[kind]
    assert forward[25] == pytest.approx(middle, abs=0.01)


def test_the_cosine_is_timms():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    optim = Optim(lr=1.0, epochs=300, warmup_epochs=20, min_lr=5e-6, warmup_lr=1e-6)
    rule = schedule(optimizer, optim, steps_per_epoch=2)
    theirs = CosineLRScheduler(
        optimizer, 600, lr_min=5e-6, warmup_t=40, warmup_lr_init=1e-6, t_in_epochs=False
    )
    for step in (0, 39, 40, 300, 599, 619):
        assert rule._get_lr(step) == theirs._get_lr(step)


def test_layer_decay_and_no_decay_groups_reach_the_optimiser(recipe_file, monkeypatch):
    made = recipe(recipe_file, ["optim.layer_decay=0.5", "optim.lr=1.0"])
    module = Training(build_backbone(made, 2), made, [None] * 3, Classification(made, 2))
    module._trainer = type("Trainer", (), {"world_size": 1})()
    groups = module.configure_optimizers().param_groups
    assert len({group["lr_scale"] for group in groups}) > 3
    assert {group["weight_decay"] for group in groups} == {0.0, made.optim.weight_decay}
    undecayed = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    for name, parameter in module.model.named_parameters():
        assert (id(parameter) in undecayed) == (parameter.ndim <= 1 or "rpb" in name), name


def test_the_rate_is_scaled_to_the_batch(recipe_file):
    made = recipe(recipe_file, ["optim.lr=1.0", "optim.lr_base_batch=32", "optim.accumulate=2"])
    module = Training(build_backbone(made, 2), made, [None] * 3, Classification(made, 2))
    module._trainer = type("Trainer", (), {"world_size": 3})()
    module.configure_optimizers()
    assert module.schedule.base_values[0] == pytest.approx(8 * 2 * 3 / 32)
