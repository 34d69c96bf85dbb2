"""``power-retention chat`` in a pipe: real processes, one after the other."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from power_retention.cli import main
from power_retention.conversion.convert import convert, save_conversion
from power_retention.conversion.source import open_source
from power_retention.ops import PowerState
from power_retention.serving.states import StateDirectory


@pytest.fixture(scope="module")
def folder(stories_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    converted = tmp_path_factory.mktemp("chatting") / "stories"
    save_conversion(convert(open_source(str(stories_dir)), None), converted)
    return converted


def chat(folder: Path, said: str, states: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "power_retention.cli", "chat", folder, "--states", states, "--temperature", "0"]
    return subprocess.run(
        [*map(str, command), "--max-tokens", "10", *options],
        input=said, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )  # fmt: skip


def answers(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_keeps_forks_and_goes_on_in_another_process(folder: Path, tmp_path: Path) -> None:
    states = tmp_path / "states"
    StateDirectory(states).save("foreign", [PowerState.empty(1, 1, 8)], model="another", tokens_seen=3)
    script = "Once upon a time\n/save story\nShe said\n/fork other\n/load story\nShe said\n/states\n/reset\nShe said\n"
    first = chat(folder, script, states, "--json")
    opening, onward, again, anew = answers(first)
    assert again == onward
    assert onward["tokens_seen"] > opening["tokens_seen"]
    assert anew["tokens_seen"] == onward["tokens_seen"] - opening["tokens_seen"]
    assert all(name in first.stderr for name in ("story", "other", "none read again", "Everything said is forgotten"))
    listed = {line.split()[0]: line for line in first.stderr.splitlines() if " kB  " in line}
    assert {name: line.endswith("of another model") for name, line in listed.items()} == {
        "story": False, "other": False, "foreign": True,
    }  # fmt: skip
    second = chat(folder, "She said\n", states, "--json", "--load", "story")
    assert answers(second) == [onward]
    plain = chat(folder, "/load story\nShe said\n/quit\nnever heard\n", states)
    assert plain.stdout == onward["answer"] + "\n"


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("/load nowhere\n", "There is no state called 'nowhere'"),
        ("Once\n/save ../x\n", "no name of a state"),
        ("/save\n", "/save needs a name"),
        ("/dance\n", "/dance is no command"),
        ("Once\n/save a\n/fork a\n", "A state called 'a' is kept already"),
        (b"\xff\xfe\n", "no UTF-8 text"),
    ],
)
def test_refused_in_a_sentence(
    folder: Path,
    tmp_path: Path,
    said: str | bytes,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--states", str(tmp_path / "states"), "--max-tokens", "3"]
    monkeypatch.setattr(sys, "argv", ["power-retention", "chat", str(folder), *options])
    told = io.StringIO(said) if isinstance(said, str) else io.TextIOWrapper(io.BytesIO(said), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", told)
    with pytest.raises(SystemExit, match="1"):
        main()
    assert sentence in " ".join(capsys.readouterr().err.split())
