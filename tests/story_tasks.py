"""Two small tasks on which stories260K, a model of 260 k parameters, is good: how its own stories go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCUMENTS = 40


def write_story_tasks(folder: Path, stories: Path) -> Path:
    """Write "story_cloze" (which of three ends is the story's) and "story_word" (the next word), with their documents."""
    texts = [json.loads(line)["text"] for line in stories.read_text(encoding="utf-8").splitlines()]
    texts = [text for text in texts if len(text.split()) > 80][: DOCUMENTS + 2]
    words = [text.split() for text in texts]
    documents = [
        {
            "query": " ".join(own[:40]),
            "endings": [" ".join(other[40:52]) for other in _rotated(words[i : i + 3], i)],
            "gold": -i % 3,
            "word": own[40].strip('.,!?"'),
        }
        for i, own in enumerate(words[:DOCUMENTS])
    ]
    (folder / "stories.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "stories.jsonl")}},
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "{{query}}",
    }
    cloze: dict[str, Any] = {
        "task": "story_cloze",
        "output_type": "multiple_choice",
        "doc_to_choice": "endings",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    word: dict[str, Any] = {
        "task": "story_word",
        "output_type": "generate_until",
        "doc_to_target": "word",
        "generation_kwargs": {"until": [" ", ".", ",", "!", "?", "\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (cloze, word):
        (folder / f"{task['task']}.yaml").write_text(json.dumps({**common, **task}, indent=2))
    return folder


def _rotated(items: list[Any], by: int) -> list[Any]:
    by %= len(items)
    return items[by:] + items[:by]
