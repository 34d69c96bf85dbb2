"""What makes ``import power_retention`` enough for the Auto classes, without making it wait for transformers.

Where transformers' Auto classes are loaded already, our models join them at once; otherwise as soon as they are, and nothing
of transformers is half imported: our models need more of it than the Auto classes do.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_CONFIGURATIONS = "transformers.models.auto.configuration_auto"  # the first of the Auto classes to be imported


class _Finder(MetaPathFinder):
    """Sees transformers' modules come, and when the last of those that are being imported is complete."""

    def __init__(self) -> None:
        self.running = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "transformers":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self.follow(spec.loader)
        return spec

    def follow(self, loader: Loader) -> None:
        load = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            depth = getattr(self.running, "depth", 0)
            self.running.depth = depth + 1
            try:
                load(module)
            finally:
                self.running.depth = depth
            if depth == 0 and _CONFIGURATIONS in sys.modules:
                self.register()

        loader.exec_module = exec_module  # type: ignore[method-assign]  # of this module's own loader

    def register(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            import_module("power_retention.models")


def register_models() -> None:
    """Make the Auto classes know our models, now or when they are imported; harmless when called again."""
    if _CONFIGURATIONS in sys.modules:
        import_module("power_retention.models")
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
