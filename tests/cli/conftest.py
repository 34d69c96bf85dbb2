"""What all tests of commands share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import transformers


@pytest.fixture(autouse=True)
def _library_settings() -> Iterator[None]:
    """The commands silence transformers for good, which is right for a process and not for a test."""
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
