from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from power_retention.conversion.source import Source

REPOSITORY = Path(__file__).parents[1]

torch.set_num_threads(1)

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
