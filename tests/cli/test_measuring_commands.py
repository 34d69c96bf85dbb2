"""`bench` and `tune` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import Here, here  # noqa: F401 – a fixture

QUICK = ("bench", "--cpu", "--quick", "--shape", "2/1x8", "--lengths", "32,96", "--contexts", "64")


def test_bench_writes_a_report_and_figures(here: Here, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "new" / "report.json"
    result = here(*QUICK, "--out", out, "--json")
    assert result.code == 0
    assert result.json == json.loads(out.read_text())
    assert {row["tokens"] for row in result.json["times"]} == {32, 96}
    names = {"report.json", "report-time.png", "report-ceiling.png", "report-decode.png"}
    assert {path.name for path in out.parent.iterdir()} == names
    (out.parent / "report-time.png").unlink()
    again = here("bench", "--redraw", out)
    assert again.code == 0
    assert (out.parent / "report-time.png").exists()
    assert "the fastest attention that is right" in again.out
    assert "report.json" not in again.out.split("Written")[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--lengths", "0"), "--lengths must be positive whole numbers"),
        (("--contexts", "a"), "--contexts must be positive whole numbers"),
        (("--shape", "40"), "such as 40/8x128"),
        (("--contender", "nobody"), "'nobody' cannot be benched here; there are: power retention"),
        (("--contender", "retention"), "'retention' cannot be benched here (the package retention is not installed)"),
        (("--redraw", "nothing.json"), "nothing.json is no report of `power-retention bench`"),
    ],
)
def test_bench_refuses_in_one_sentence(here: Here, arguments: tuple[str, ...], said: str) -> None:  # noqa: F811
    assert said in " ".join(here.refusal("bench", "--cpu", "--quick", *arguments).split())


def test_tune_needs_something_to_tune(here: Here) -> None:  # noqa: F811
    assert "TRITON_INTERPRET=1" in here.refusal("tune")


@pytest.mark.parametrize("command", ["bench", "tune"])
def test_help_has_examples(here: Here, command: str) -> None:  # noqa: F811
    assert f"power-retention {command} --" in here(command, "--help").out
