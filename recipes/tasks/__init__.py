"""What a run does differently for each task: data, loss, metrics, evaluation, prediction, pictures."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.recipes.schema import Recipe
    from zoo.recipes.tasks.base import Task


def task_of(recipe: Recipe | None) -> Task:
    """Return the task of a recipe; models that come without one classify."""
    name = recipe.task if recipe is not None else "classification"
    return import_module(f"zoo.recipes.tasks.{name}").TASK
