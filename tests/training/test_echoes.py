from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from power_retention.training.text import hash_unit

SCRIPT = Path(__file__).parents[2] / "scripts" / "write_echoes.py"


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Two corpora whose sentences are all different; the second is drawn from nine times as often."""
    for name in ("apple", "pear"):
        texts = [" ".join(f"{name} {i} {j}." for j in range(60)) for i in range(150)]
        lines = (json.dumps({"text": text}) for text in texts)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return [str(tmp_path / "apple.jsonl"), f"{tmp_path / 'pear.jsonl'}:9"]


def echoes(monkeypatch: pytest.MonkeyPatch, out: Path, sources: list[str], *options: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(out), *sources, "--megabytes", "0.3", *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return [json.loads(line)["text"] for line in out.read_text().splitlines()]


def test_passages_come_back(tmp_path: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    texts = echoes(monkeypatch, tmp_path / "echo.jsonl", sources)
    assert 3e5 <= sum(map(len, texts)) < 3.2e5
    for text in texts:
        parts = text.split("\n\n")
        new = list(dict.fromkeys(parts))
        assert new == parts[: len(new)]
        assert 0 < len(parts) - len(new) <= len(new) <= 5
    shares = [sum(name in text for text in texts) / len(texts) for name in ("apple", "pear")]
    assert shares[0] < 0.25 < 0.75 < shares[1]


def test_nothing_that_is_held_out_and_the_same_every_time(
    tmp_path: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = echoes(monkeypatch, tmp_path / "echo.jsonl", sources)
    documents = [json.loads(line)["text"] for line in Path(sources[0]).read_text().splitlines()]
    kept = {document.split()[1] for document in documents if hash_unit(document, 0) < 0.05}
    seen = {sentence.split()[1] for text in texts for sentence in text.split(".") if sentence.startswith("apple ")}
    assert kept
    assert seen
    assert not kept & seen
    assert echoes(monkeypatch, tmp_path / "again.jsonl", sources) == texts


def test_what_is_asked_was_said(tmp_path: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    texts = echoes(monkeypatch, tmp_path / "asked.jsonl", sources, "--asking", "--characters", "3000")
    lengths = sorted(map(len, texts))
    assert lengths[0] < 1200 < 2500 < lengths[-1] < 6000
    questions = 0
    for text in texts:
        for found in re.finditer(r"^What is the (\w+) of (\w+)\? The \1 of \2 is (\d+)\.$", text, re.MULTILINE):
            questions += 1
            noun, name, value = found.groups()
            assert f"The {noun} of {name} is {value}." in text[: found.start()]
    assert questions > 20
    assert all(text.count("\n\n") >= 2 for text in texts)
