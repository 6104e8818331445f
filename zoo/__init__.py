"""Attention for vision and diffusion: models by name, recipes that train them, kernels under all."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    # In a checkout kernels/, recipes/ and weights/ lie beside zoo/; once installed they lie inside it.
    __path__.append(str(_here.parent))

from zoo._timm import register_when_imported  # noqa: E402
from zoo.errors import ConfigError, DataError, IntegrityError, ResourceError, ZooError  # noqa: E402
from zoo.registry import ModelInfo, create_model, list_models, load_checkpoint, model_info  # noqa: E402

if TYPE_CHECKING:
    from zoo import analysis, ops
    from zoo.acceleration import accelerate
    from zoo.attention import capture_attention
    from zoo.recipes.api import evaluate, generate, predict, recipe, train

__version__ = "0.1.0"

# Imported at first use, so that `import zoo` needs neither Lightning nor matplotlib.
_LAZY = {
    "ops": ("zoo.ops", None),
    "analysis": ("zoo.analysis", None),
    "diffusion": ("zoo.diffusion", None),
    "heads": ("zoo.heads", None),
    "accelerate": ("zoo.acceleration", "accelerate"),
    "capture_attention": ("zoo.attention", "capture_attention"),
    "recipe": ("zoo.recipes.api", "recipe"),
    "train": ("zoo.recipes.api", "train"),
    "evaluate": ("zoo.recipes.api", "evaluate"),
    "generate": ("zoo.recipes.api", "generate"),
    "predict": ("zoo.recipes.api", "predict"),
}

__all__ = [
    "ConfigError",
    "DataError",
    "IntegrityError",
    "ModelInfo",
    "ResourceError",
    "ZooError",
    "accelerate",
    "analysis",
    "capture_attention",
    "create_model",
    "evaluate",
    "generate",
    "list_models",
    "load_checkpoint",
    "model_info",
    "ops",
    "predict",
    "recipe",
    "train",
]

register_when_imported()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = import_module(module)
    return value if attribute is None else getattr(value, attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
