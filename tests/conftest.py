from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from power_retention.conversion.source import Source

REPOSITORY = Path(__file__).parents[1]

torch.set_num_threads(1)
# A shell ignores Ctrl-C in what it starts in the background, and so would the commands that are tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("default", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


# The fixtures import what they need themselves: transformers takes seconds, which the operator's tests need not wait.


@pytest.fixture(scope="session")
def stories_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K, a real Llama of 260 k parameters, as a Hugging Face directory; not to be written to."""
    import real_models

    return real_models.write_stories_model(tmp_path_factory.mktemp("models") / "stories260k")


@pytest.fixture(scope="session")
def stories_text() -> Path:
    """300 stories that stories260K wrote, 230 k characters, as JSONL with the field "text"."""
    import real_models

    return real_models.STORIES_TEXT


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, downloaded once into $POWER_RETENTION_CACHE or .cache."""
    cache = Path(os.environ.get("POWER_RETENTION_CACHE", REPOSITORY / ".cache"))
    script = REPOSITORY / "scripts" / "fetch_demo_assets.py"
    subprocess.run([sys.executable, script, "--model", "--cache", cache], check=True)
    return cache / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Source:
    """SmolLM2-135M-Instruct, opened once, for it takes a quarter of a minute: copy it before changing it."""
    from power_retention.conversion.source import open_source

    return open_source(smollm2_gguf)


@pytest.fixture(scope="session")
def offline_tasks() -> Path:
    """Definitions and documents of benchmarks, downloaded once into $POWER_RETENTION_CACHE or .cache."""
    cache = Path(os.environ.get("POWER_RETENTION_CACHE", REPOSITORY / ".cache"))
    subprocess.run([sys.executable, REPOSITORY / "scripts" / "fetch_tasks.py", "--cache", cache], check=True)
    return cache / "tasks"


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a folder that is a real disk of so many kilobytes; skips where mounting is not allowed."""
    mounted: list[Path] = []

    def mount(kilobytes: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small disk takes root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)  # a failed test may still hold a file open
