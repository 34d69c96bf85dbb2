"""`evaluate`, `generate` and `convert` at the edges: what stays in a report, what is too long or too short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import Here, here  # noqa: F401 (a fixture)
from transformers import AutoTokenizer

from tiny_models import PARENTS, tiny_parent


def test_calls_add_up(converted: Path, stories_text: Path, tmp_path: Path, here: Here) -> None:  # noqa: F811
    losses = ("--text", stories_text, "--windows", "2", "--length", "64")
    long = ("--long", "--haystack", stories_text, "--seeds", "1", "--depths", "2", "--stream", "0")
    whole = ("evaluate", converted, "--out", tmp_path, "--json")
    first = here(*whole, *losses, "--contexts", "64", "--prompt", "Once").json
    here(*whole, *long, "--lengths", "300", "--long-tasks", "needle,needle")
    here(*whole, *long, "--lengths", "400", "--long-tasks", "needle")
    here(*whole, *long, "--lengths", "900", "--long-tasks", "facts")
    last = here(*whole, *losses, "--contexts", "", "--prompt", "").json
    assert (last["samples"], last["decode"]) == (first["samples"], first["decode"])
    tasks = last["long"]["tasks"]
    assert {name: list(task["lengths"]) for name, task in tasks.items()} == {"needle": ["300", "400"], "facts": ["900"]}
    assert {row["contexts"] for row in tasks["needle"]["lengths"]["300"].values()} == {2}
    assert last["long"]["lengths"] == [300, 400, 900]
    other = here(*whole, *long, "--lengths", "300", "--long-tasks", "needle", "--seed", "7").json["long"]["tasks"]
    assert list(other) == ["needle"]  # of other contexts: nothing to add it to
    assert other["needle"]["lengths"]["300"] != tasks["needle"]["lengths"]["300"]
    before = (tmp_path / "evaluation.json").read_text()
    assert "needle" in here.refusal(
        "evaluate", converted, "--out", tmp_path, *long, "--lengths", "8", "--long-tasks", "needle"
    )
    assert (tmp_path / "evaluation.json").read_text() == before


def test_windows_as_long_as_the_teachers(converted: Path, stories_text: Path, tmp_path: Path, here: Here) -> None:  # noqa: F811
    given = (
        "evaluate",
        converted,
        "--text",
        stories_text,
        "--windows",
        "1",
        "--contexts",
        "",
        "--prompt",
        "",
        "--out",
        tmp_path,
    )
    result = here(*given, "--length", "4096")
    assert "was made for 512 tokens" in result.err
    assert "nan" not in result.out
    assert json.loads((tmp_path / "evaluation.json").read_text())["held_out"]["length"] == 512


def test_one_document_and_a_little_text(converted: Path, stories_dir: Path, tmp_path: Path, here: Here) -> None:  # noqa: F811
    book = tmp_path / "book.txt"
    book.write_text("Once upon a time there was a little dog. " * 30)
    assert "Of a single document nothing is held out" in here.refusal("evaluate", converted, "--text", book)
    book.write_text("Once upon a time.")
    assert "calibration needs 128" in here.refusal("convert", stories_dir, tmp_path / "out", "--text", book)


@pytest.mark.parametrize("kind", ["qwen2", "starcoder2"])
def test_parents_whose_configuration_names_no_width(
    kind: str,
    stories_dir: Path,
    stories_text: Path,
    tmp_path: Path,
    here: Here,  # noqa: F811
) -> None:
    parent = tiny_parent(kind)
    assert parent.config.vocab_size >= PARENTS[kind].vocab_size
    parent.resize_token_embeddings(512)
    parent.save_pretrained(tmp_path / "parent")
    AutoTokenizer.from_pretrained(stories_dir).save_pretrained(tmp_path / "parent")
    assert here("convert", tmp_path / "parent", tmp_path / "model", "--text", stories_text).code == 0
    options = ("--text", stories_text, "--windows", "2", "--length", "32", "--contexts", "64", "--prompt", "", "--json")
    decode = here("evaluate", tmp_path / "model", *options).json["decode"]
    assert [len(decode[name]) for name in ("teacher", "student")] == [1, 1]


def test_words_keep_their_distance(converted: Path, here: Here) -> None:  # noqa: F811
    text = here("generate", converted, "Once", "--max-new-tokens", "3", "--json").json["text"]
    assert text.startswith(" ")
    assert here("generate", converted, "Once", "--max-new-tokens", "3").out == f"Once{text}\n"


def test_refused_before_anything_is_read(converted: Path, tmp_path: Path, here: Here) -> None:  # noqa: F811
    missing = tmp_path / "nowhere" / "x.state"
    assert "There is no folder" in here.refusal("generate", converted, "Once", "--save-state", missing)
    for arguments in (("--repetition-penalty", "0"), ("--seed", "9" * 20), ("--top-p", "2")):
        assert here("generate", converted, "Once", *arguments).code == 2
    assert "ends in no kind of figure" in here.refusal("plan", "smollm2-135m", "--plot", tmp_path / "x.v2")
    assert "has no figure" in here.refusal("plan", "smollm2-135m", "--dry-run", "--plot", tmp_path / "x.png")
