"""A pytest plugin that points timm's own model tests at the zoo's models, and at nothing else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
from timm.models import _registry, model_entrypoint

import zoo

zoo.list_models()
OURS = {
    name for name in _registry.list_models() if model_entrypoint(name).__module__.startswith("zoo.models.")
}
_list_models = _registry.list_models
TOKEN_MODELS = "*_deit_*"  # ours that give tokens rather than maps


def list_models(*arguments: Any, **settings: Any) -> list[str]:
    """timm's function over our models alone; its choice of timm's modules does not apply to them."""
    if len(arguments) > 1:
        arguments = (arguments[0], "", *arguments[2:])
    settings.pop("module", None)
    for name in settings.keys() & {"filter", "exclude_filters"}:
        if "deit*" in settings[name]:  # timm lists models of tokens by name, to test them in their own way
            settings[name] = [*settings[name], TOKEN_MODELS]
    return [name for name in _list_models(*arguments, **settings) if name.partition(".")[0] in OURS]


def list_pretrained(filter: str = "", exclude_filters: str = "") -> list[str]:
    """timm's function over our models alone."""
    return list_models(filter, pretrained=True, exclude_filters=exclude_filters, include_tags=True)


timm.list_models = timm.models.list_models = list_models
timm.list_pretrained = timm.models.list_pretrained = list_pretrained


def pytest_report_header() -> str:
    return f"timm {timm.__version__}'s tests over {len(OURS)} models of the zoo: {', '.join(sorted(OURS))}"


def pytest_configure(config: pytest.Config) -> None:
    for marker in ("base", "cfg", "cfg_nonstd", "forward", "backward", "features", "timeout(seconds)"):
        config.addinivalue_line("markers", f"{marker}: as timm marks its tests")
    for marker in ("torchscript", "fxforward", "fxbackward"):
        config.addinivalue_line("markers", f"{marker}: as timm marks its tests; left out here")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what runs over our models and what they claim.

    Tests that name a model of timm's test that model. TorchScript and FX tracing are deprecated in torch,
    and the zoo's models do not claim them. Whether published files load is a matter of the network:
    `zoo.weights` reads ours.
    """
    ours, others = [], []
    for item in items:
        model = getattr(item, "callspec", None) and item.callspec.params.get("model_name")
        is_ours = isinstance(model, str) and model.partition(".")[0] in OURS
        traced = any(word in item.originalname for word in ("torchscript", "_fx"))
        (ours if is_ours and not traced else others).append(item)
        loads = item.originalname in ("test_model_load_pretrained", "test_model_features_pretrained")
        if is_ours and loads and not _registry.get_pretrained_cfg(model).file:
            item.add_marker(pytest.mark.skip(reason="needs the published file from the network"))
    config.hook.pytest_deselected(items=others)
    items[:] = ours
