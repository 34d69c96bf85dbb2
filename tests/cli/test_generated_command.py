"""`evaluate --generated`: the report, what was written, the table and the card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import Here, here  # noqa: F401 (a fixture)

from power_retention.evaluation.generated import Free


def test_the_command(stories_dir: Path, stories_text: Path, tmp_path: Path, here: Here) -> None:  # noqa: F811
    assert here("convert", stories_dir, tmp_path / "converted", "--no-calibrate").code == 0
    stories = [json.loads(line)["text"] for line in stories_text.read_text().splitlines()[:24]]
    questions = tmp_path / "names.jsonl"
    questions.write_text(
        "".join(
            json.dumps({"prompt": " ".join(words[:n]), "answers": [words[n].strip(",.")]}) + "\n"
            for words in (story.split() for story in stories)
            for n in (6, 9)
        )
    )
    report = here("evaluate", tmp_path / "converted", "--generated", questions, "--no-hard-swap", "--json").json
    row = report["tasks"]["names"]
    assert (row["kind"], row["documents"], row["shots"], row["metric"]) == (
        "generation",
        48,
        None,
        "begins with an answer",
    )
    folder = tmp_path / "converted" / "evaluation"
    written = [json.loads(line) for line in (folder / "generated.jsonl").read_text().splitlines()]
    for model in ("teacher", "student"):
        right = [Free("", tuple(line["answers"]), ("",)).score(line[model]) for line in written]
        assert row["scores"][model]["value"] == pytest.approx(sum(right) / 48)
    assert row["scores"]["teacher"]["value"] > row["scores"]["student"]["value"]
    assert (folder / "recovery.png").is_file()
    shown = here("evaluate", tmp_path / "converted", "--generated", questions, "--no-hard-swap", "--limit", "4").out
    assert "4 documents" in shown
    assert "-shot" not in shown
    assert here("card", tmp_path / "converted").code == 0
    assert "in the question, by generation" in (tmp_path / "converted" / "README.md").read_text()
