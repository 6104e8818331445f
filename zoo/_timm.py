"""Put the zoo's models into timm's registry as soon as timm is imported, without importing it here.

timm with torch and torchvision takes seconds to import and `import zoo` should not; yet
`timm.create_model("nat_mini")` must work after it, in whichever order the two are imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


class _AfterImport(Loader):
    """timm's own loader, followed by the import of `zoo.models`."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on timm is an ordinary module with its ordinary loader.
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        import_module("zoo.models")

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)


class _TimmFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        sys.meta_path.remove(self)
        spec = find_spec("timm")
        if spec is not None and spec.loader is not None:
            spec.loader = _AfterImport(spec.loader)
        return spec


def register_when_imported() -> None:
    """Register the zoo's models with timm now if timm is loaded, else right after it is."""
    if "timm" in sys.modules:
        import_module("zoo.models")
    elif not any(isinstance(finder, _TimmFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TimmFinder())
