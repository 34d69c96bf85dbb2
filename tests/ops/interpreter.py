"""Makes Triton's interpreter usable for tests: it must be switched on before Triton is imported."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

from triton.runtime import interpreter


def accept_numpy_2_4() -> None:
    """Triton 3.6 turns one-element arrays into loop bounds with int(), which NumPy 2.4 refuses."""
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


accept_numpy_2_4()
