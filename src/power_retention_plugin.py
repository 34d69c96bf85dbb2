"""What makes ``lm_eval --model hf --model_args pretrained=DIR`` know our models, without a word from the user.

lm-evaluation-harness opens models with the Auto classes, which know ours once :mod:`power_retention.models` is imported, and
has no hook for that.  PyTorch has one: it calls the entry points of the group ``torch.backends`` at the end of ``import torch``
(TORCH_DEVICE_BACKEND_AUTOLOAD=0 switches that off).  Ours leaves a note for Python's import system, and nothing else happens
unless the harness's Hugging Face model is then imported: our models are imported just before it.

This module is beside the package and not in it, so that programs that have nothing to do with us import nothing of it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

# The second is imported by the first, after torch: it serves programs that import the harness before torch.
_HARNESS_MODELS = frozenset({"lm_eval.models.huggingface", "lm_eval.models.utils_hf"})


class _RegisterOnImport:
    """Finds no module; sees which are looked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in _HARNESS_MODELS:
            sys.meta_path.remove(self)
            try:
                import_module("power_retention.models")
            except ImportError as error:  # other people's models must still open
                warnings.warn(f"Power-retention models cannot be opened here: {error}", stacklevel=2)
        return None


def register_with_harness() -> None:
    """The entry point; cheap, and harmless when called again."""
    if not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterOnImport())
