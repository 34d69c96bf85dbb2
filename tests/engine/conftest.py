"""The real vLLM on the CPU; `make test-vllm` makes its environment. Elsewhere these tests are not collected."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine's objects are within reach, and a start takes seconds
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
)

import engines
from transformers import PreTrainedModel
from vllm import LLM


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a tiny random model with stories260K's tokenizer, once for each set of changes to its configuration."""
    written: dict[str, Path] = {}

    def write(**changes: object) -> Path:
        name = repr(sorted(changes.items()))
        if name not in written:
            written[name] = engines.write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", **changes)
        return written[name]

    return write


@pytest.fixture
def start() -> Iterator[Callable[..., LLM]]:
    """Starts an engine; the one before it is stopped, and the last with the test."""
    running: list[LLM] = []

    def begin(folder: Path, **options: object) -> LLM:
        engines.stop(running)
        running.append(engines.start(folder, **options))
        return running[-1]

    yield begin
    engines.stop(running)


@pytest.fixture(scope="session")
def hugging_face() -> Callable[[Path], PreTrainedModel]:
    """Opens our Hugging Face class."""
    return engines.open_model
