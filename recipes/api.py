"""What `zoo.recipe`, `zoo.train`, `zoo.evaluate`, `zoo.predict` and `zoo.generate` are.

Prediction and generation import no trainer.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.recipes.config import recipe
    from zoo.recipes.evaluate import evaluate
    from zoo.recipes.generate import generate
    from zoo.recipes.predict import predict
    from zoo.recipes.run_folder import Trained, load_trained
    from zoo.recipes.schema import Recipe
    from zoo.recipes.tasks.base import Evaluation, Prediction
    from zoo.recipes.train import RunResult, train

__all__ = [
    "Evaluation",
    "Prediction",
    "Recipe",
    "RunResult",
    "Trained",
    "evaluate",
    "generate",
    "load_trained",
    "predict",
    "recipe",
    "train",
]

_HOMES = {
    "Recipe": "schema",
    "recipe": "config",
    "Evaluation": "tasks.base",
    "evaluate": "evaluate",
    "generate": "generate",
    "Prediction": "tasks.base",
    "predict": "predict",
    "Trained": "run_folder",
    "load_trained": "run_folder",
    "RunResult": "train",
    "train": "train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zoo.recipes.api' has no attribute {name!r}")
    return getattr(import_module(f"zoo.recipes.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
