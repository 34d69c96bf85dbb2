"""What makes ``import power_retention`` enough for the Auto classes, without making it wait for transformers.

Where transformers' Auto classes are loaded already, our models join them at once; otherwise as soon as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_CONFIGURATIONS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"  # imports the first


class _ThenRegister(Loader):
    """Loads a module as its own loader does, then registers our models."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        # While the second is being imported, the Auto classes are not complete: its turn comes.
        if module.__name__ == _MODELS or _MODELS not in sys.modules:
            self.finder.register()


class _Finder(MetaPathFinder):
    """Sees when the Auto classes are imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in (_CONFIGURATIONS, _MODELS):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, self)
        return spec

    def register(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            import_module("power_retention.models")


def register_models() -> None:
    """Make the Auto classes know our models, now or when they are imported; harmless when called again."""
    if _MODELS in sys.modules:
        import_module("power_retention.models")
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
