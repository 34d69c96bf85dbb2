"""`evaluate --long` on a real small model: its report, figures, tables, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_cli import Here, here  # noqa: F401 (a fixture)

from power_retention.models.sizes import state_bytes


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source files, of which one defines what two others use."""
    root = tmp_path_factory.mktemp("tree")
    (root / "shapes.py").write_text(
        "".join(f"def {name}(x):\n    return x\n\n" for name in ("round_up", "square", "flat")) * 5
    )
    for user in ("park", "house"):
        (root / f"{user}.py").write_text(
            f"import shapes\n\n{'# more' * 80}\nx = shapes.square(1)\ny = shapes.flat(x)\n"
        )
    for i in range(12):
        (root / f"toy{i}.py").write_text(f"ball_{i} = {i}\n" * 60)
    return root


def test_report_figures_and_tables(
    converted: Path,
    stories_text: Path,
    tree: Path,
    tmp_path: Path,
    here: Here,  # noqa: F811
) -> None:
    options = (
        "--long", "--haystack", stories_text, "--tree", tree, "--lengths", "450,900", "--depths", "2", "--seeds", "2",
        "--stream", "1024", "--long-tasks", "needle, facts,identifiers", "--out", tmp_path / "report",
    )  # fmt: skip
    report = here("evaluate", converted, *options, "--json").json
    assert json.loads((tmp_path / "report" / "evaluation.json").read_text()) == report
    long = report["long"]

    assert list(long["models"]) == ["student", "teacher", "sliding window", "untrained"]
    from power_retention.models import PowerRetentionConfig

    config = PowerRetentionConfig.from_pretrained(converted)
    a_token = 5 * 4 * 2 * 8 * 2  # layers, heads, keys and values, width, bytes
    assert long["models"]["student"]["bytes"] == state_bytes(config, activation_bytes=4)
    assert long["models"]["teacher"]["longest"] == 512
    assert long["models"]["untrained"]["start"] == "hard swap"
    assert 0 <= state_bytes(config) - long["models"]["sliding window"]["bytes"] < a_token
    assert long["models"]["sliding window"]["window"] == state_bytes(config) // a_token

    assert list(long["tasks"]) == ["needle", "facts", "identifiers"]
    needle = long["tasks"]["needle"]["lengths"]
    assert needle["900"]["teacher"] is None
    student = needle["900"]["student"]
    assert (student["questions"], student["contexts"], list(student["by_depth"])) == (4, 4, ["0", "1"])
    assert 0 <= student["likelihood"]["value"] <= 1
    facts = long["tasks"]["facts"]["lengths"]["900"]["student"]
    assert set(facts["by_variant"]) == {"one fact", "two facts"}
    names = long["tasks"]["identifiers"]["lengths"]["900"]["student"]
    assert names["gain_nats"]["value"] != 0
    assert names["by_variant"]["without it"]["questions"] == names["questions"]

    stream = long["positions"]["text"]
    assert [entry["stop"] for entry in stream["models"]["student"]] == [64, 128, 256, 512, 1024]
    assert [entry["stop"] for entry in stream["models"]["teacher"]] == [64, 128, 256, 512]
    assert stream["models"]["teacher"][-1]["loss"] < stream["models"]["student"][-1]["loss"]
    assert stream["rise"]["student"]["to"] == 1024
    for name in ("long-tasks", "long-depths", "long-positions"):
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    few = ("--depths", "1", "--seeds", "1", "--stream", "0", "--long-tasks", "needle,facts", "--out", tmp_path / "few")
    shown = here("evaluate", converted, "--long", "--haystack", stories_text, "--lengths", "200", *few).out
    assert "By generation, % ± standard error" in shown
    assert "By likelihood, % ± standard error" in shown
    assert "facts was not asked of every seed at 200 tokens" in " ".join(shown.split())
    assert "Loss by position" not in shown


def test_refusals(converted: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("POWER_RETENTION_CACHE", str(tmp_path))
    assert here.refusal("evaluate", converted, "--long").startswith("Long contexts need other text to hide things in")
    text = tmp_path / "short.txt"
    text.write_text("A cat sat there. " * 9)
    message = here.refusal("evaluate", converted, "--long", "--haystack", text)
    assert "200 words" in message
    assert "--haystack" in message
    ask = ("evaluate", converted, "--long", "--haystack", text)
    assert "There is no long-context task 'noodle'" in here.refusal(*ask, "--long-tasks", "noodle")
    assert "--lengths must be positive numbers" in here.refusal(*ask, "--lengths", "4k")


def test_a_model_without_a_state_is_refused(converted: Path, stories_text: Path, tmp_path: Path, here: Here) -> None:  # noqa: F811
    model = Path(shutil.copytree(converted, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"power": 24}))
    message = here.refusal("evaluate", model, "--long", "--haystack", stories_text)
    assert "--generated is read into one" in message
