"""What all tests of commands share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(scope="session")
def converted(stories_dir: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated conversion, which speaks, if badly."""
    folder = tmp_path_factory.mktemp("models") / "converted"
    command = [sys.executable, "-m", "power_retention.cli", "convert", stories_dir, folder, "--text", stories_text]
    subprocess.run([*command, "--windows", "4"], check=True, capture_output=True, timeout=120)
    return folder
